"""Rounding of activations while the model runs: each token to a grid of its own, or all to one that calibration has fixed.

Dynamic: nothing is stored; the scale of a token (or of a group of its features) is computed from its own values and used at
once. Static: one range for all tokens (of each head, inside the attention) is stored, and what lies outside goes to the ends
of the grid. What a layer then reads are the values of the grid's levels, in the dtype of the model: integer kernels compute
the same products from codes and scales.

Evenly spaced levels are here. Activations of vision transformers that they do not suit have grids of their own
(`log_sqrt2.py`, `twin_uniform.py`), always static; what all of them share is `ActivationRounding`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bitmend.errors import RecipeError
from bitmend.numerics.granularity import divisors_text
from bitmend.numerics.uniform import UniformGrid

LARGEST_RANGE = torch.finfo(torch.float32).max


@runtime_checkable
class ActivationRounding(Protocol):
    """A way to round activations."""

    @property
    def bits(self) -> int:
        """Width of a code, 2 to 8."""
        ...

    def round(self, values: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Return the levels that stand for `values`, in their dtype; what is not finite comes back as NaN."""
        ...


def check_bits(bits: int) -> None:
    """Check the width of a code.

    Raises:
        RecipeError: other than 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise RecipeError(f"activation bits must be a whole number from 2 to 8; got {bits}")


def check_range(largest: float | None) -> None:
    """Check the largest value that a grid reaches; None is not known yet.

    Raises:
        RecipeError: one that float32 does not hold, or that leaves nothing to cover.
    """
    if largest is not None and not 0 < largest <= LARGEST_RANGE:
        raise RecipeError(f"the range of activations must be positive and finite; got {largest}")


def known_range(values: Float[Tensor, "*shape"], largest: float | None) -> Float[Tensor, ""]:
    """Return the largest value that a grid reaches: `largest`, or where that is None the largest of `values`.

    Where nothing lies above 0, and so nothing has to be reached, it is 1, by which one can divide.
    """
    if largest is not None:
        return torch.tensor(largest, dtype=torch.float32, device=values.device)
    found = values.amax().float()
    return torch.where(found <= 0, 1.0, found)


@dataclass(frozen=True)
class TokenCodes:
    """Rounded tokens, to be kept.

    Attributes:
        codes: in the signed range of the grid.
        scale: of each group of features, as it is kept.
        zero_point: the code of the level 0 of each group, or None on a symmetric grid.
    """

    codes: Int8[Tensor, "*batch features"]
    scale: Float[Tensor, "*batch groups"]
    zero_point: Int8[Tensor, "*batch groups"] | None


@dataclass(frozen=True)
class ActivationSpec:
    """How the tokens that a layer reads are rounded.

    Attributes:
        bits: 2 to 8.
        symmetric: without a zero point: the largest magnitude of a group decides its scale; else its range does.
        group_size: features that share a scale; -1 for the whole token.
        clip_ratio: share of the largest magnitude (or of the range) that the grid covers; what lies outside goes to its ends.
        scale_bits: 32, or 16 where scales are kept (as bfloat16) and the rounded values must be those that come back.
        ranges: None: each token has a scale of its own. Else the largest magnitude (with zero points: the largest value), the
            same for all tokens: one number, or one for each head of what is (batch, heads, token, width). Empty: not known
            yet; then it is that of what comes at once. Grids without groups only.
        lows: with zero points the smallest values, at most 0, one for each of `ranges`; the grid always holds 0. None or
            empty where `ranges` are, and on symmetric grids.
    """

    bits: int
    symmetric: bool = True
    group_size: int = -1
    clip_ratio: float = 1.0
    scale_bits: int = 32
    ranges: tuple[float, ...] | None = None
    lows: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not 0 < self.clip_ratio <= 1:
            raise RecipeError(f"activation clip_ratio must lie above 0 and be at most 1; got {self.clip_ratio}")
        if self.group_size != -1 and self.group_size < 1:
            raise RecipeError(f"activation group_size must be -1 (a whole token) or positive; got {self.group_size}")
        if self.scale_bits not in (16, 32):
            raise RecipeError(f"the scales of activations must have 16 or 32 bits; got {self.scale_bits}")
        if self.lows is not None and (self.symmetric or self.ranges is None):
            raise RecipeError(
                "lows are the lower ends of static ranges with zero points; give ranges, too, and set symmetric = false, or "
                f"leave lows out; got symmetric = {self.symmetric} and ranges = {self.ranges!r:.80}"
            )
        if self.ranges is not None:
            self._check_static(self.ranges, self.lows or ())

    def _check_static(self, ranges: tuple[float, ...], lows: tuple[float, ...]) -> None:
        if self.group_size != -1:
            raise RecipeError("static ranges need a grid without groups; set group_size = -1, or static = false")
        if self.symmetric:
            if not all(0 < value <= LARGEST_RANGE for value in ranges):
                raise RecipeError(f"static ranges must be positive and finite; got {ranges!r:.80}")
            return
        if len(lows) != len(ranges):
            raise RecipeError(
                f"static ranges with zero points need as many lows as ranges; got {len(lows)} lows and {len(ranges)} ranges"
            )
        # Their distance has to be a number of float32, too.
        if not all(
            low <= 0 <= high and 0 < high - low <= LARGEST_RANGE for low, high in zip(lows, ranges, strict=True)
        ):
            raise RecipeError(
                "static ranges with zero points must be finite, hold 0 and something besides: lows at most 0, ranges at "
                f"least 0, not both 0; got lows {lows!r:.80} and ranges {ranges!r:.80}"
            )

    def __str__(self) -> str:
        shared = "a token" if self.group_size == -1 else f"{self.group_size} features"
        if self.ranges is not None:
            shared = "all tokens" if len(self.ranges) < 2 else "all tokens of a head"
        clipped = "" if self.clip_ratio == 1 else f", clipped to {self.clip_ratio:g}"
        kind = "symmetric" if self.symmetric else "with zero points"
        return f"activations of {self.bits} bits, {kind}, one scale for {shared}{clipped}"

    def check_width(self, width: int) -> None:
        """Check that the groups fit.

        Raises:
            RecipeError: a group size that does not divide `width`; the sentence names the divisors.
        """
        if self.group_size != -1 and width % self.group_size:
            raise RecipeError(
                f"activation group_size must divide the width of the input; got {self.group_size} for {width} features, "
                f"whose divisors are {divisors_text(width)}; choose one, or -1 for one scale per token"
            )

    def round(self, values: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Return the nearest levels of each token's own grid, computed in float32, in the dtype of `values`.

        A group of zeros stays zero. NaN and Inf make their whole group NaN, so that they are seen behind the layer.

        Raises:
            RecipeError: a group size that does not divide the width.
        """
        levels, scale, _ = self._nearest(values)
        return (levels * scale).reshape(values.shape).to(values.dtype)

    def round_with_gradient(self, values: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Return what `round` returns; a gradient passes as if values inside the grid were not rounded.

        It passes through the scales, too: a smaller largest magnitude makes finer steps. (Public code of rotations that are
        learned lets it pass through the values alone, and so never sees that.)
        """
        with torch.no_grad():
            levels, _, _ = self._nearest(values)
        groups, scale, zero_point = self._grid_of(values)
        offset = torch.zeros_like(scale) if zero_point is None else zero_point
        steps = groups / torch.where(scale == 0, 1.0, scale)
        inside = torch.minimum(torch.maximum(steps, self._grid.min_code - offset), self._grid.max_code - offset)
        rounded = scale * (inside + (levels - inside).detach())
        return rounded.reshape(values.shape).to(values.dtype)

    def encode(self, values: Float[Tensor, "*batch features"]) -> TokenCodes:
        """Return what `round` rounds to, to be kept.

        Raises:
            RecipeError: a group size that does not divide the width.
        """
        levels, scale, zero_point = self._nearest(values)
        codes = self._grid.codes_of_levels(levels.nan_to_num(0), zero_point).reshape(values.shape)
        kept = scale.squeeze(-1).to(self._scale_dtype)
        return TokenCodes(
            codes, kept, None if zero_point is None else zero_point.nan_to_num(0).squeeze(-1).to(torch.int8)
        )

    def decode(self, tokens: TokenCodes, dtype: torch.dtype) -> Float[Tensor, "*batch features"]:
        """Return what was kept: bit for bit what `round` gives."""
        groups = tokens.scale.shape[-1]
        codes = tokens.codes.reshape(*tokens.codes.shape[:-1], groups, -1)
        zero_point = None if tokens.zero_point is None else tokens.zero_point.float().unsqueeze(-1)
        values = self._grid.decode(codes, tokens.scale.float().unsqueeze(-1), zero_point)
        return values.reshape(tokens.codes.shape).to(dtype)

    def bits_per_value(self, width: int) -> float:
        """Return the bits that a kept value takes: its code and its share of scale and zero point.

        A cache keeps a scale for each token also where it is the same for all.
        """
        size = width if self.group_size == -1 else self.group_size
        return self.bits + (self.scale_bits + (0 if self.symmetric else 8)) / size

    @property
    def _grid(self) -> UniformGrid:
        return UniformGrid(self.bits, self.symmetric)

    @property
    def _scale_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.scale_bits == 16 else torch.float32

    def _nearest(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return levels (*batch, groups, size), in units of the scales, the scales and zero points (*batch, groups, 1)."""
        groups, scale, zero_point = self._grid_of(values)
        levels = self._grid.nearest_levels(groups, scale, zero_point)
        if self.ranges is not None:
            # What is not finite would end at the end of the grid, unseen; here it spoils its token, as it does elsewhere.
            spoilt = groups.sum(-1, keepdim=True) * 0
            return levels.add_(spoilt), scale + spoilt, None if zero_point is None else zero_point.expand_as(spoilt)
        return levels, scale, zero_point

    def _grid_of(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the values in groups (*batch, groups, size), their scales and zero points (*batch, groups, 1)."""
        width = values.shape[-1]
        self.check_width(width)
        grid = self._grid
        if self.ranges is not None:
            groups = values.float().unsqueeze(-2)
            if not self.symmetric:
                return groups, *self._with_zero_point(*(end.unsqueeze(-1) for end in self._ends(values)))
            scale = self._kept(self._largest(values) * (self.clip_ratio / grid.max_code))
            return groups, scale.unsqueeze(-1), None
        size = width if self.group_size == -1 else self.group_size
        groups = values.float().reshape(*values.shape[:-1], width // size, size)
        if self.symmetric:
            return groups, self._kept(groups.abs().amax(-1, keepdim=True) * (self.clip_ratio / grid.max_code)), None
        return groups, *self._with_zero_point(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True))

    def _with_zero_point(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales and zero points of ranges."""
        grid = self._grid
        # The range always holds 0, which is then a level of its own.
        low = low.clamp(max=0) * self.clip_ratio
        high = high.clamp(min=0) * self.clip_ratio
        scale = self._kept((high - low) / (grid.max_code - grid.min_code))
        zero_point = grid.min_code - torch.round(low / torch.where(scale == 0, 1.0, scale))
        # A scale that was rounded down may leave the codes.
        return scale, zero_point.clamp(grid.min_code, grid.max_code)

    def _largest(self, values: Tensor) -> Tensor:
        """Return the largest magnitude of all tokens, to be broadcast over (*batch, groups)."""
        assert self.ranges is not None
        if self.ranges:
            return _by_head(self.ranges, values)
        every = values.float().abs()
        return every.amax((0, 2, 3)).reshape(-1, 1, 1) if values.ndim == 4 else every.amax().reshape(1)

    def _ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest value of all tokens, to be broadcast over (*batch, groups)."""
        assert self.ranges is not None
        if self.ranges and self.lows:
            return _by_head(self.lows, values), _by_head(self.ranges, values)
        every = values.float()
        if values.ndim == 4:
            return every.amin((0, 2, 3)).reshape(-1, 1, 1), every.amax((0, 2, 3)).reshape(-1, 1, 1)
        return every.amin().reshape(1), every.amax().reshape(1)

    def _kept(self, scale: Tensor) -> Tensor:
        """Return the scale as it comes back from where it is kept."""
        return scale.to(self._scale_dtype).float()


def _by_head(ends: tuple[float, ...], values: Tensor) -> Tensor:
    """Return one end of stored ranges, to be broadcast over (*batch, groups).

    Raises:
        RecipeError: several ranges for values of another number of heads.
    """
    found = torch.tensor(ends, dtype=torch.float32, device=values.device)
    if len(found) == 1:
        return found
    if values.ndim != 4 or values.shape[1] != len(found):
        raise RecipeError(
            f"{len(found)} ranges need values of as many heads, (batch, heads, token, width); got {tuple(values.shape)}"
        )
    return found.reshape(-1, 1, 1)
