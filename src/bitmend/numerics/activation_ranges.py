"""How the range of a static grid is chosen from what calibration saw.

Many batches pass by; what is kept of them is their ends and an even sample (`RangeSample`). From these, `choose_range` makes
candidates, rounds the sample by each, and keeps the one with the least squared error:

- `minmax`: the ends themselves, nothing to compare;
- `percentile`: quantiles on both sides, those of 0.999, 0.9999 and 0.99999 above and of what is left of 1 below (the public
  code of RepQ-ViT, arXiv 2212.08254);
- `mse`: both ends moved in together in 90 steps of 1 % (the OMSE observer in the public code of FQ-ViT, arXiv 2111.13824).

Grids that begin at a fixed place have one end to choose; the split of `TwinSoftmaxSpec` is chosen among all of its values,
whichever the observer.
"""

import math
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bitmend.errors import NumericsError
from bitmend.numerics.activations import ActivationSpec
from bitmend.numerics.log_sqrt2 import LogSqrt2Spec
from bitmend.numerics.qtensor import ObserverName
from bitmend.numerics.twin_uniform import LARGEST_SPLIT_EXPONENT, TwinGeluSpec, TwinSoftmaxSpec

AnyRounding = ActivationSpec | LogSqrt2Spec | TwinSoftmaxSpec | TwinGeluSpec  # of activations, while a model runs
SpecT = TypeVar("SpecT", bound=AnyRounding)

SAMPLE_LIMIT = 1 << 18  # values: a few lie beyond the largest of `QUANTILES`
# Whole strides share factors with the widths of layers, and would meet the same features of every token. Twice an irrational
# stride is one, too.
FIRST_STRIDE = math.sqrt(5)
QUANTILES = (0.999, 0.9999, 0.99999)
SHRINK_STEPS = 90
MOST_ROUNDED = 1 << 22  # values, all candidates together


class RangeSample:
    """The ends of many values, and an even sample of them.

    What is kept depends on the values and their order alone, not on how they were cut into batches. While there are few, all
    are kept; then those at the places floor(j s), with a stride s that doubles whenever the sample is full.

    Attributes:
        count: how many values came.

    Cost: one pass over each batch, and 4 bytes for each value of the sample.
    """

    def __init__(self, limit: int = SAMPLE_LIMIT) -> None:
        self.count = 0
        self._limit = limit
        self._stride = 1.0
        self._kept: Float[Tensor, " sample"] | None = None
        self._ends: tuple[Tensor, Tensor] | None = None

    @property
    def lowest(self) -> float:
        """The smallest value of all, NaN where one is NaN, 0 where there is none."""
        return 0.0 if self._ends is None else float(self._ends[0])

    @property
    def highest(self) -> float:
        """The largest value of all, NaN where one is NaN, 0 where there is none."""
        return 0.0 if self._ends is None else float(self._ends[1])

    @property
    def values(self) -> Float[Tensor, " sample"]:
        """The sample, float32, in the order in which it came."""
        return torch.empty(0) if self._kept is None else self._kept

    def add_(self, values: Float[Tensor, "*shape"]) -> None:
        """Add a batch of values, all on one device."""
        flat = values.detach().reshape(-1)
        if not len(flat):
            return
        low, high = flat.amin().float(), flat.amax().float()
        if self._ends is not None:
            low, high = torch.minimum(low, self._ends[0]), torch.maximum(high, self._ends[1])
        self._ends = low, high
        total = self.count + len(flat)
        while total / self._stride > self._limit:
            self._thin_()
        places = self._places(len(self.values), total) - self.count
        kept = flat[places.to(flat.device)].float()
        self._kept = kept if self._kept is None else torch.cat([self._kept, kept])
        self.count = total

    def _thin_(self) -> None:
        """Double the stride."""
        if self._stride == 1:
            self._stride = FIRST_STRIDE
            kept = self._places(0, self.count).to(self.values.device)
        else:
            self._stride *= 2
            kept = torch.arange(0, len(self.values), 2, device=self.values.device)
        if self._kept is not None:
            self._kept = self._kept[kept]

    def _places(self, first: int, total: int) -> Tensor:
        """Return the places of the sample from its `first` value on, among all values of which there are `total`."""
        bound = int(total / self._stride) + 2
        places = (torch.arange(first, bound, dtype=torch.float64) * self._stride).long()
        return places[places < total]


def choose_range(sample: RangeSample, spec: SpecT, observer: ObserverName) -> SpecT | None:
    """Return a grid with the range that suits a sample, in place of the one it had; all else stays as it is.

    Args:
        sample: of all that the grid will round.
        spec: the grid; one with evenly spaced levels becomes static, with one range for all.
        observer: how candidates are made, see the module. Of two with the same error, the wider one.

    Returns:
        None where there is nothing to go by: no values, or only zeros; for grids whose range lies above 0, nothing above 0.

    Raises:
        NumericsError: NaN or Inf among the values.
        RecipeError: evenly spaced levels in groups, which cannot be static.

    Cost: nothing for minmax, a sort of the sample and 3 roundings of it for percentile, 90 roundings for mse and 20 for
    `TwinSoftmaxSpec`, of at most 2^22 values together.
    """
    low, high = sample.lowest, sample.highest
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NumericsError(
            f"a range must be chosen from finite values, but they reach from {low} to {high}; look for NaN or Inf in what "
            "the model gives on the calibration data"
        )
    if high <= 0 and (low == 0 or not isinstance(spec, ActivationSpec)):
        return None
    candidates = [replace(spec, **changes) for changes in _candidates(sample, spec, observer)]
    if len(candidates) == 1:
        return candidates[0]
    # Many candidates are close to one another, and none of them depends on the few largest values, as quantiles do.
    fewer = max(1, len(sample.values) * len(candidates) // MOST_ROUNDED)
    return _best(candidates, sample.values[::fewer])


def _best(candidates: list[SpecT], values: Float[Tensor, " sample"]) -> SpecT:
    """Return the first of the grids that round the values with the least squared error."""
    errors = []
    for candidate in candidates:
        difference = (candidate.round(values) - values).double()
        error = float(difference.dot(difference))
        errors.append(error if math.isfinite(error) else math.inf)  # sums of huge values leave float32
    return candidates[errors.index(min(errors))]


def _candidates(sample: RangeSample, spec: AnyRounding, observer: ObserverName) -> list[dict[str, Any]]:
    """Return what may be filled in, wide ranges first."""
    if isinstance(spec, TwinSoftmaxSpec):
        return [{"split_exponent": exponent} for exponent in range(LARGEST_SPLIT_EXPONENT + 1)]
    ends = _ends(sample, observer)
    if not isinstance(spec, ActivationSpec):
        highs = [high for _, high in ends if high > 0] or [sample.highest]
        return [{"range": high} for high in highs]
    if spec.symmetric:
        return [{"ranges": (max(-low, high),)} for low, high in ends]
    return [{"lows": (low,), "ranges": (high,)} for low, high in ends]


def _ends(sample: RangeSample, observer: ObserverName) -> list[tuple[float, float]]:
    """Return the candidates for both ends, each of which holds 0 and something besides."""
    widest = min(sample.lowest, 0.0), max(sample.highest, 0.0)
    if observer == "minmax":
        return [widest]
    if observer == "mse":
        shrinks = [1 - step / 100 for step in range(SHRINK_STEPS)]
        return [(widest[0] * shrink, widest[1] * shrink) for shrink in shrinks]
    ordered = sample.values.sort().values
    pairs = [(_quantile(ordered, 1 - share), _quantile(ordered, share)) for share in reversed(QUANTILES)]
    pairs = [(min(low, 0.0), max(high, 0.0)) for low, high in pairs]
    # All of them are zero where fewer than one value in a thousand is not.
    return [(low, high) for low, high in pairs if low < high] or [widest]


def _quantile(ordered: Float[Tensor, " sample"], share: float) -> float:
    """Return a quantile of sorted values, straight between two neighbours."""
    place = share * (len(ordered) - 1)
    below = int(place)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low + (high - low) * (place - below)
