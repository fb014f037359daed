"""Evenly spaced levels: `value = (code - zero_point) * scale`.

Codes are signed, `-2^(b-1) .. 2^(b-1)-1`, in the asymmetric case too, because that is what compressed-tensors stores.
At one bit the symmetric grid has no zero: its codes -1 and 0 stand for `-scale` and `+scale`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bitmend.errors import RecipeError


@dataclass(frozen=True)
class UniformGrid:
    """Evenly spaced levels of 1 to 8 bits.

    Attributes:
        bits: width of a code, 1 to 8.
        symmetric: without a zero point; the level 0 is then code 0 (at one bit there is no level 0).
    """

    bits: int
    symmetric: bool

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise RecipeError(f"bits must be a whole number from 1 to 8; got {self.bits}")

    @property
    def min_code(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def max_code(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def is_sign(self) -> bool:
        """Whether this is the one-bit grid `-scale, +scale`."""
        return self.bits == 1 and self.symmetric

    def nearest_levels(
        self,
        values: Float[Tensor, "*shape"],
        scale: Float[Tensor, "*#shape"],
        zero_point: Float[Tensor, "*#shape"] | None,
    ) -> Float[Tensor, "*shape"]:
        """Return the nearest levels, in units of `scale`; ties go to the even step, zero to plus on the sign grid.

        Args:
            values: any real numbers; those outside the grid go to its ends.
            scale: distance of two levels, in the units of `values`; a zero is read as 1 (all its values are zero).
            zero_point: the code of the level 0, as floating-point whole numbers, or None on a symmetric grid.
        """
        if self.is_sign:
            return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)
        steps = torch.round(values / torch.where(scale == 0, 1.0, scale))
        if zero_point is None:
            return steps.clamp_(self.min_code, self.max_code)
        return torch.minimum(torch.maximum(steps, self.min_code - zero_point), self.max_code - zero_point)

    def codes_of_levels(
        self, levels: Float[Tensor, "*shape"], zero_point: Float[Tensor, "*#shape"] | None
    ) -> Int8[Tensor, "*shape"]:
        """Return the codes of levels that `nearest_levels` gave."""
        if self.is_sign:
            return ((levels - 1) / 2).to(torch.int8)
        return (levels if zero_point is None else levels + zero_point).to(torch.int8)

    def encode(
        self,
        values: Float[Tensor, "*shape"],
        scale: Float[Tensor, "*#shape"],
        zero_point: Float[Tensor, "*#shape"] | None,
    ) -> Int8[Tensor, "*shape"]:
        """Return the codes of the levels nearest to `values`; arguments as in `nearest_levels`."""
        return self.codes_of_levels(self.nearest_levels(values, scale, zero_point), zero_point)

    def decode(
        self,
        codes: Int8[Tensor, "*shape"],
        scale: Float[Tensor, "*#shape"],
        zero_point: Float[Tensor, "*#shape"] | None,
    ) -> Float[Tensor, "*shape"]:
        """Return the values that `codes` stand for, in the dtype of `scale`."""
        levels = codes.to(scale.dtype)
        if self.is_sign:
            levels = 2 * levels + 1
        elif zero_point is not None:
            levels = levels - zero_point
        return levels * scale
