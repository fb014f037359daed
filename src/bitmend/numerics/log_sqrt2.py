"""Levels each of which is the one before it divided by the square root of 2, and zero: for what softmax gives.

Most of the weights that attention gives lie near 0 and a few near 1, and it is their relative size that counts. Evenly spaced
levels make zeros of the small ones, unless they take steps that are too coarse for the large ones.

    code = round(-2 log2(x / delta)),    value = delta 2^(-code / 2),    0 where the code is 2^b - 1 or more

Source: RepQ-ViT, arXiv 2212.08254. Two codes are a factor of 2, so that kernels shift, and multiply odd codes by sqrt(2).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitmend.numerics.activations import check_bits, check_range, known_range


@dataclass(frozen=True)
class LogSqrt2Spec:
    """How values from 0 on are rounded in the logarithm.

    The last of the 2^bits codes stands for zero, so that a value takes the bits that it is said to take. (In the public code
    of the paper all codes stand for levels above 0 and zero comes on top, as one value more than the codes can tell.)

    Attributes:
        bits: 2 to 8.
        range: delta, the largest level. None: not known yet; then it is the largest of what comes at once.
    """

    bits: int
    range: float | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_range(self.range)

    def __str__(self) -> str:
        return f"activations of {self.bits} bits, in steps of a factor of sqrt(2), one range for all tokens"

    def round(self, values: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Return the level nearest in the logarithm, computed in float32, in the dtype of `values`.

        What lies above the range goes to its end, zero and what lies below it to zero; what is not finite becomes NaN.
        """
        numbers = values.float()
        delta = known_range(numbers, self.range)
        # The difference of the logarithms: a quotient may leave float32 where both numbers are small.
        codes = torch.round(2 * (torch.log2(delta) - torch.log2(numbers.clamp(min=0)))).clamp_(min=0)
        levels = torch.where(codes >= 2**self.bits - 1, 0.0, delta * torch.exp2(codes / -2))
        # What is not finite would end at a level, unseen.
        return levels.add_(numbers * 0).to(values.dtype)
