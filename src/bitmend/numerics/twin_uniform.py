"""Two grids of evenly spaced levels side by side, one bit that says which: for what softmax and GELU give.

Both are lopsided. Softmax gives many small numbers and a few near 1; GELU gives numbers from -0.17 on to wherever the largest
lies. One grid that reaches the far end has steps that are too coarse for the near one. Here each half of the codes has a step
of its own. Source: PTQ4ViT, arXiv 2111.12293; how the steps are chosen is in `activation_ranges.py`.

One of the two levels is selected. Public code clips a value into each of both ranges, rounds both parts and adds them: what
lies above the split then comes out too large by all of the lower range.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitmend.errors import RecipeError
from bitmend.numerics.activations import check_bits, check_range, known_range

GELU_DEPTH = 0.16997  # how far GELU falls below 0, at -0.75
LARGEST_SPLIT_EXPONENT = 19


@dataclass(frozen=True)
class TwinSoftmaxSpec:
    """How values from 0 to 1 are rounded: small ones in fine steps, the others in coarse ones.

    With n = 2^(bits - 1): n levels from 0 on in steps of 2^-split_exponent / n, the last of them a step below the split
    2^-split_exponent; and those of 0, 1 / (n - 1), ... 1 that lie at the split or above it.

    Attributes:
        bits: 2 to 8, of which one says which range.
        split_exponent: 0 to 19.
    """

    bits: int
    split_exponent: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not 0 <= self.split_exponent <= LARGEST_SPLIT_EXPONENT:
            raise RecipeError(
                f"the split_exponent of activations must be a whole number from 0 to {LARGEST_SPLIT_EXPONENT}; got "
                f"{self.split_exponent}"
            )

    def __str__(self) -> str:
        return f"activations of {self.bits} bits, in fine steps below 2^-{self.split_exponent} and coarse ones up to 1"

    def round(self, values: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Return the nearest levels, computed in float32, in the dtype of `values`; what is not finite becomes NaN.

        Around the split, too: there the range is chosen by which of the two levels beside it is nearer. By the value alone,
        some that lie above the split would go to 0, when the step of the upper range is more than twice the split.
        """
        numbers = values.float()
        half, split = 2 ** (self.bits - 1), 2.0**-self.split_exponent
        fine = split / half
        # Lowest level of the upper range, in its steps; nothing above the middle rounds to one below it.
        first = math.ceil(split * (half - 1))
        low = torch.round(numbers / fine).clamp_(0, half - 1) * fine
        high = torch.round(numbers * (half - 1)).clamp_(max=half - 1) / (half - 1)
        middle = ((half - 1) * fine + first / (half - 1)) / 2
        # What is not finite would end at a level, unseen.
        return torch.where(numbers < middle, low, high).add_(numbers * 0).to(values.dtype)


@dataclass(frozen=True)
class TwinGeluSpec:
    """How what GELU gives is rounded: each side of 0 in steps of its own.

    With n = 2^(bits - 1): n levels below 0 in steps of 0.16997 / n, and n from 0 on in steps of range / (n - 1).

    Attributes:
        bits: 2 to 8, of which one says which side.
        range: the largest level. None: not known yet; then it is the largest of what comes at once.
    """

    bits: int
    range: float | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_range(self.range)

    def __str__(self) -> str:
        return f"activations of {self.bits} bits, each side of 0 in its own steps, one range for all tokens"

    def round(self, values: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Return the nearest levels, computed in float32, in the dtype of `values`; what is not finite becomes NaN."""
        numbers = values.float()
        half = 2 ** (self.bits - 1)
        down, up = GELU_DEPTH / half, known_range(numbers, self.range) / (half - 1)
        # A step that float32 no longer holds is zero, and so is what it rounds.
        low = torch.round(numbers / down).clamp_(-half, 0) * down
        high = torch.round(numbers / torch.where(up == 0, 1.0, up)).clamp_(0, half - 1) * up
        # What is not finite would end at a level, unseen.
        return torch.where(numbers < 0, low, high).add_(numbers * 0).to(values.dtype)
