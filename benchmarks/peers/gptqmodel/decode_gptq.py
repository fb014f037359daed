"""Decode a GPTQ checkpoint into plain tensors, without GPTQModel.

Needs torch, numpy and safetensors only, so it runs in the library's own environment:

    python decode_gptq.py CHECKPOINT OUT.safetensors

For each quantised module NAME, OUT holds
    NAME.codes   uint8   (out, in)      unsigned, 0 .. 2^bits - 1
    NAME.scale   float32 (out, groups)  the file's fp16 values; a peer may write negative ones
    NAME.zero    int32   (out, groups)  the code of the level 0
    NAME.g_idx   int32   (in,)          group of each column
    NAME.weight  float32 (out, in)      (code - zero) * scale
and NAME.bias where there is one; everything that is not quantised is left out. The header's metadata says bits,
group_size, sym, desc_act and checkpoint_format.

The packing, little end first: `qweight` int32 (in * bits / 32, out) along the input, `qzeros` int32
(groups, out * bits / 32) along the output, `scales` (groups, out). 2, 4 and 8 bits put 32/bits codes in a word; 3 bits
put 32 codes in 3 words, where codes 10 and 21 cross a border, which is the same as one string of bits. Version 1 of the
format stores zero - 1 modulo 2^bits; "gptq_v2" stores zero. Planar layouts (5, 6, 7 bits) are not read.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def unpack(words, bits):
    """Return the codes of each column of `words`, int32 (n * bits / 32, columns) -> uint8 (n, columns)."""
    stream = np.ascontiguousarray(words.T).astype("<u4").view(np.uint8)  # (columns, bytes), lowest byte first
    flags = np.unpackbits(stream, axis=1, bitorder="little")
    flags = flags.reshape(flags.shape[0], -1, bits).astype(np.uint16)
    return (flags << np.arange(bits, dtype=np.uint16)).sum(axis=2).astype(np.uint8).T


def read_checkpoint(folder):
    """Return every tensor of the folder and its quantization_config."""
    folder = Path(folder)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    config = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if config is None:
        config = json.loads((folder / "quantize_config.json").read_text())
    return tensors, config


def module_bits(words, in_features):
    """Return the width of the module's codes from its shape; `dynamic` overrides make it differ from the config's."""
    bits, rest = divmod(words * 32, in_features)
    if rest or bits not in (2, 3, 4, 8):
        raise ValueError(f"{words} words do not hold {in_features} codes of 2, 3, 4 or 8 bits")
    return bits


def decode(tensors, config):
    """Return `{name: {codes, scale, zero, g_idx, weight}}`."""
    version = config.get("checkpoint_format", config.get("format", "gptq"))
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format must be gptq or gptq_v2, not {version}")
    modules = {}
    for key in sorted(tensors):
        if not key.endswith(".qweight"):
            continue
        name = key.removesuffix(".qweight")
        part = {field: tensors.get(f"{name}.{field}") for field in ("qweight", "qzeros", "scales", "g_idx", "bias")}
        scale = part["scales"].float().T.contiguous()
        groups = scale.shape[1]
        if part["g_idx"] is None:
            size = config["group_size"]
            in_features = part["qweight"].shape[0] * 32 // config["bits"]
            g_idx = torch.arange(in_features, dtype=torch.int32) // (in_features if size == -1 else size)
        else:
            g_idx = part["g_idx"].to(torch.int32)
        bits = module_bits(part["qweight"].shape[0], len(g_idx))
        codes = torch.from_numpy(unpack(part["qweight"].numpy(), bits).T.copy())
        zero = torch.from_numpy(unpack(part["qzeros"].numpy().T, bits).astype(np.int32))
        if version == "gptq":
            zero = (zero + 1) % 2**bits
        if zero.shape != scale.shape or int(g_idx.max()) >= groups:
            shapes = f"zeros {tuple(zero.shape)}, scales {tuple(scale.shape)}"
            raise ValueError(f"{name}: {shapes}, group numbers up to {g_idx.max()}")
        spread = g_idx.long()
        weight = (codes.float() - zero[:, spread].float()) * scale[:, spread]
        modules[name] = {"codes": codes, "scale": scale, "zero": zero, "g_idx": g_idx, "weight": weight}
        if part["bias"] is not None:
            modules[name]["bias"] = part["bias"].float()
    return modules


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--original", type=Path, help="the model before quantisation: prints each relative error")
    options = parser.parse_args()
    tensors, config = read_checkpoint(options.checkpoint)
    modules = decode(tensors, config)
    flat = {f"{name}.{field}": t.contiguous() for name, part in modules.items() for field, t in part.items()}
    keys = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
    save_file(flat, options.output, metadata={key: json.dumps(config.get(key)) for key in keys})
    if options.original:
        original = {}
        for file in sorted(options.original.glob("*.safetensors")):
            original.update(load_file(file))
        for name, part in modules.items():
            weight = original[f"{name}.weight"].float()
            error = ((part["weight"] - weight).norm() / weight.norm()).item()
            print(f"{name:45s} relative error {error:.4f}")
    print(f"{len(modules)} modules -> {options.output}")


if __name__ == "__main__":
    main()
