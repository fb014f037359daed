"""Folds the scale of a batch norm into the convolution before it, so that weights are judged where their error counts.

With mean m, variance v, gain g and bias b of a channel, g (W x - m) / sqrt(v + eps) + b = sign(g) W' x + b', where

    W' = |g| W / sqrt(v + eps),    b' = b - g m / sqrt(v + eps).

Folding is usually done to save an operation, and for scales that all channels share, which it makes fit better. With one
scale a channel the codes of round-to-nearest and GPTQ are the same with and without it: a row and its scale grow by one
factor. What changes is every error that is summed over channels: without folding a channel that the norm turns down counts
as much as one that it turns up, so that a strength chosen for a whole matrix (`marr`), and the verdict whether a candidate
is kept, are about the wrong sum.

How we differ: the norm stays where it is, with mean 0, variance 1 - eps, the sign of g as its gain and b' as its bias, so
that any model code runs as before and a convolution without bias needs none. The sign is left there because a symmetric
grid has one level more below zero than above: the codes of a mirrored row would be others.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitmend.protocols import TRANSFORMS, Calibrated, Event, Transformed
from bitmend.sites import Block, Wiring


@TRANSFORMS.register("fold_batch_norm")
@dataclass(frozen=True)
class FoldBatchNorm:
    """Folds every batch norm of a block into the convolution that it reads."""

    exact: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = False

    def apply_(self, block: Block, wiring: Wiring, streams: Calibrated | None) -> Transformed:
        """Fold; norms that read something else, or have no statistics or no bias of their own, stay as they are.

        Cost: one pass over the weights.
        """
        del streams
        folded = 0
        for path, norm_path in wiring.scaled:
            convolution, norm = block.module.get_submodule(path), block.module.get_submodule(norm_path)
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and _can_be_folded(norm):
                fold_(convolution, norm)
                folded += 1
        norms = sum(isinstance(part, nn.BatchNorm2d) for part in block.module.modules())
        if folded == norms:
            return Transformed()
        message = f"{folded} of {norms} batch norms read a convolution and were folded; the others stay as they are"
        return Transformed(events=(Event("norms_left", block.name, message),))


def _can_be_folded(norm: nn.BatchNorm2d) -> bool:
    return norm.affine and norm.running_var is not None


@torch.no_grad()
def fold_(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Let the convolution give what the norm gave but for sign and bias, and the norm no more than these.

    Example:
        >>> convolution, norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0).eval()
        >>> _ = convolution.weight.fill_(3.0), norm.weight.fill_(4.0), norm.bias.fill_(5.0)
        >>> _ = norm.running_mean.fill_(6.0), norm.running_var.fill_(4.0)  # y = 4 (3 x - 6) / 2 + 5 = 6 x - 7
        >>> fold_(convolution, norm)
        >>> convolution.weight.item(), norm.bias.item()
        (6.0, -7.0)
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain: Float[Tensor, " channel"] = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    factor = gain.abs()
    weight = convolution.weight
    weight.copy_(weight.double() * factor.reshape(-1, 1, 1, 1))
    if convolution.bias is not None:
        convolution.bias.copy_(convolution.bias.double() * factor)
    norm.bias.copy_(norm.bias.double() - norm.running_mean.double() * gain)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    norm.weight.copy_(torch.where(gain < 0, -1.0, 1.0))
