"""The slow kernel that every other one is compared with: dequantise a tile of output rows, multiply, next tile."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from bitmend.runtime.packed import PackedWeight


def linear(
    inputs: Float[Tensor, "*batch in"], weight: PackedWeight, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*batch out"]:
    """Return `inputs @ weight.T + bias` in the dtype of `inputs`.

    The weight is computed in float32 and rounded once to the dtype of `inputs`. Cost: one dequantisation of the whole
    matrix a call, however few tokens there are; memory for one tile of about 4 MB, unless gradients are recorded, which
    keep every tile.
    """
    tiles = weight.tiles()
    outputs = []
    for start in tiles:
        stop = min(start + tiles.step, weight.shape[0])
        part = None if bias is None else bias[start:stop].to(inputs.dtype)
        outputs.append(functional.linear(inputs, weight.rows(start, stop, inputs.dtype), part))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
