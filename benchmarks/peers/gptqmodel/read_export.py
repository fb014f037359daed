"""Load a GPTQ folder with GPTQModel; keep the weights that it unpacks and the logits that it computes.

Run by the Python of GPTQModel's environment: `python read_export.py CHECKPOINT TOKENS.safetensors OUT.safetensors`.
OUT holds NAME.weight (float16, out x in) for each quantised module NAME, and `logits`.
"""

import argparse
import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "3")

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("tokens")
    parser.add_argument("output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = GPTQModel.load(options.checkpoint, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    weights = {
        f"{name}.weight": module.dequantize_weight().T.to(torch.float16).contiguous()
        for name, module in loaded.model.named_modules()
        if hasattr(module, "qweight")
    }
    with torch.inference_mode():
        logits = loaded.model(load_file(options.tokens)["tokens"]).logits.float().contiguous()
    save_file(weights | {"logits": logits}, options.output)


if __name__ == "__main__":
    main()
