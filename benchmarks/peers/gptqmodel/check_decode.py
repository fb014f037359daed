"""Compare `decode_gptq.py` with the weights that GPTQModel itself unpacks.

Run by the Python of its environment: `python check_decode.py CHECKPOINT`.
"""

import argparse
import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "3")

import torch
from decode_gptq import decode, read_checkpoint
from gptqmodel import BACKEND, GPTQModel


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(1)
    modules = decode(*read_checkpoint(options.checkpoint))
    loaded = GPTQModel.load(options.checkpoint, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    found = dict(loaded.model.named_modules())
    worst = 0.0
    for name, part in modules.items():
        theirs = found[name].dequantize_weight().T.float()
        worst = max(worst, (theirs - part["weight"]).abs().max().item() / part["scale"].abs().max().item())
    print(f"{len(modules)} modules, largest difference {worst:.2e} of a step")
    if worst > 2.0 ** (loaded.quantize_config.bits - 11):  # they multiply in fp16: half an ulp of the largest level
        raise SystemExit("the two readings differ by more than fp16 rounding")


if __name__ == "__main__":
    main()
