"""The size column of the QwT paper by its counting rule, beside the bytes that our file takes.

    python benchmarks/bench_sizes.py

The rule (that of QwT's public code): weights of the blocks' layers at n bits; the layer that reads the pictures and the
classifier at 8 bits; biases, norms, class token, positions in float32; scales and zero points not counted; each compensation
16 bits a weight and 32 a bias; MB are 10^6 bytes. Ours: codes packed in words, 16-bit scales, all else in 16 bits, the file's
header not counted. Models are built on meta: no weights, no downloads.
"""

import argparse

import torch
import transformers
from torch import nn

from bitmend.numerics.granularity import PerChannel
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.runtime.packed import packed_shapes
from bitmend.sites import layer_kind, read_matrix

WIDTHS = (4, 6, 8)
COMPENSATION_WEIGHT, COMPENSATION_BIAS, SINGLE, HALF, ENDS = 16, 32, 32, 16, 8
GROUP = 64  # input channels that one group of a compensating 1x1 convolution reads
VIT = {"small": (384, 1536, 6), "base": (768, 3072, 12), "tiny": (192, 768, 3)}
PAPER = {  # MB at 4, 6 and 8 bits, without and with QwT
    "DeiT-T": ((3.3, 4.2), (4.6, 5.5), (5.9, 6.8)),
    "ViT-S": ((11.8, 15.4), (17.2, 20.7), (22.5, 26.0)),
    "ViT-B": ((44.9, 59.1), (66.2, 80.4), (87.4, 101.6)),
    "Swin-T": ((14.9, 19.2), (21.7, 26.0), (28.6, 32.9)),
    "Swin-S": ((25.8, 33.7), (38.0, 45.9), (50.1, 58.0)),
    "ResNet-50": (None, None, None),
}


def build(name):
    """Return a model on meta."""
    with torch.device("meta"):
        if name.startswith(("ViT", "DeiT")):
            hidden, inner, heads = VIT[{"T": "tiny", "S": "small", "B": "base"}[name[-1]]]
            keys = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads}
            return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000, **keys))
        if name.startswith("Swin"):
            depths = {"T": [2, 2, 6, 2], "S": [2, 2, 18, 2]}[name[-1]]
            return transformers.SwinForImageClassification(transformers.SwinConfig(depths=depths, num_labels=1000))
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))


def layers_of(model):
    """Return the layers by path, and which of them are the ends: the first convolution and the last linear layer."""
    layers = {path: part for path, part in model.named_modules() if layer_kind(part) is not None}
    first = next(path for path, part in layers.items() if isinstance(part, nn.Conv2d))
    last = [path for path, part in layers.items() if isinstance(part, nn.Linear)][-1]
    return layers, {first, last}


def compensations(model):
    """Return the weights and biases of one compensation a block."""
    weights = biases = 0
    for module in model.modules():
        kind = type(module).__name__
        if kind in ("ViTLayer", "SwinLayer"):
            width = module.layernorm_before.weight.numel()
            weights, biases = weights + width**2, biases + width
        elif kind in ("ResNetBottleNeckLayer", "ResNetBasicLayer"):
            convolutions = [part for part in module.layer.modules() if isinstance(part, nn.Conv2d)]
            given, made = convolutions[0].in_channels, convolutions[-1].out_channels
            groups = max(given // GROUP, 1)
            weights, biases = weights + made * given // groups, biases + made
    return weights, biases


def by_the_rule(model, bits):
    """Return bytes without and with compensation."""
    layers, ends = layers_of(model)
    weights = {path: part.weight.numel() for path, part in layers.items()}
    rest = sum(parameter.numel() for parameter in model.parameters()) - sum(weights.values())
    rest += sum(
        part.running_mean.numel() + part.running_var.numel()
        for part in model.modules()
        if isinstance(part, nn.BatchNorm2d)
    )
    total = sum(count * (ENDS if path in ends else bits) for path, count in weights.items()) + SINGLE * rest
    extra, biases = compensations(model)
    return total / 8, (total + COMPENSATION_WEIGHT * extra + COMPENSATION_BIAS * biases) / 8


def ours(model, bits):
    """Return the bytes that our file takes, its header apart."""
    layers, ends = layers_of(model)
    total, counted = 0, set()
    for path, part in layers.items():
        spec = QuantSpec(UniformGrid(ENDS if path in ends else bits, symmetric=True), PerChannel())
        shapes = packed_shapes(tuple(read_matrix(part).shape), spec).values()
        total += sum(dtype.itemsize * rows * columns for dtype, (rows, columns) in shapes)
        counted.add(f"{path}.weight")
    for name, tensor in model.state_dict().items():
        if name not in counted:
            total += tensor.numel() * (HALF // 8 if tensor.is_floating_point() else tensor.itemsize)
    return total


def main():
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("| model | W | rule (MB) | paper | with QwT, rule | paper | QwT (MB) | ours (MB) |")
    print("|---|---|---|---|---|---|---|---|")
    for name, published in PAPER.items():
        model = build(name)
        for bits, pair in zip(WIDTHS, published, strict=True):
            plain, compensated = by_the_rule(model, bits)
            wanted = ("-", "-") if pair is None else pair
            cells = [name, bits, f"{plain / 1e6:.2f}", wanted[0], f"{compensated / 1e6:.2f}", wanted[1]]
            cells += [f"{(compensated - plain) / 1e6:.2f}", f"{ours(model, bits) / 1e6:.2f}"]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
