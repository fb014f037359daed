"""HQQ: half-quadratic search of scale and zero point, no data. Started by `bench_peers.py` in its environment.

HQQ has no file that other tools read. What is saved is a plain folder with the weights as HQQ itself dequantises them (in
float16, its default); its bits are counted here, from the tensors that it would keep: packed codes, scales, zero points.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import protocol

RUN = protocol.start()

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from transformers import AutoModelForCausalLM, AutoTokenizer

WIDTHS = (1, 2, 3, 4, 8)


def main():
    RUN.imports_done("hqq")
    if RUN.bits not in WIDTHS:
        protocol.unsupported(f"HQQ packs {WIDTHS} bits, not {RUN.bits}")
    with RUN.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(RUN.model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(RUN.model)
    config = BaseQuantizeConfig(nbits=RUN.bits, group_size=None if RUN.group_size == -1 else RUN.group_size, axis=1)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    layers = {}
    with RUN.phase("quantise"):
        for name, module in linears.items():
            layers[name] = HQQLinear(
                module, quant_config=config, compute_dtype=torch.float16, device="cpu", del_orig=False
            )
    counted = 0
    with RUN.phase("save"):
        model = model.float()
        for name, layer in layers.items():
            with torch.no_grad():
                linears[name].weight.copy_(layer.dequantize())
            counted += 8 * layer.W_q.nbytes + sum(8 * layer.meta[part].nbytes for part in ("scale", "zero"))
        model.save_pretrained(RUN.output / "model")
        tokenizer.save_pretrained(RUN.output / "model")
    RUN.note(quantised_bits=counted, quantised_weights=sum(module.weight.numel() for module in linears.values()))
    RUN.told(axis=1, scale_dtype=str(next(iter(layers.values())).meta["scale"].dtype), asymmetric=True)
    RUN.finish(RUN.output / "model", "folder")


if __name__ == "__main__":
    main()
