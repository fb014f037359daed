"""How scales and zero points are chosen from the data.

All observers start from the range of each group, `lo = min(w, 0)` and `hi = max(w, 0)`:

- symmetric: the grid of `2^b` levels spans `2 max|w|`, so `scale = max|w| / ((2^b - 1) / 2)`. The largest positive entry
  may clip by half a level, the largest negative one fits. (At one bit the levels are `-scale, +scale`.)
- asymmetric: `scale = (hi - lo) / (2^b - 1)`, and the zero point is the whole code nearest to where 0 lies.

`minmax` keeps that range; `percentile` starts from quantiles of the entries instead; `mse` shrinks the range step by step
(below 3 bits down to a fiftieth of it, because there the best step is far inside the range of the largest entry) and keeps
the step with the smallest error of round-to-nearest, |error|^2.4 summed over the group. The exponent and the 80 steps of
1 % are those of the GPTQ line of work (the public code of GPTAQ, arXiv:2504.02692); the exponent above 2 protects large
weights, which round-to-nearest error under-counts.

On narrow symmetric grids the steps are first ranked: the error of an entry depends on its share of the largest one alone, so
a table of all steps' errors at a few thousand shares, summed over the group's entries, tells nearly how the steps compare.
Only the best few are then computed from the entries themselves.
"""

from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitmend.numerics.granularity import PerGroup, PerTensor, group_of_column, num_groups
from bitmend.numerics.qtensor import QParams, QuantSpec
from bitmend.numerics.uniform import UniformGrid

MSE_STEPS = 80
MSE_POWER = 2.4
PERCENTILE = 0.999
CHUNK_ENTRIES = 1 << 18  # entries searched at a time: the work arrays then stay in the cache
# Ranking by a table: its rows over the shares from -1 to 1; how many steps are computed exactly; where it is precise enough.
TABLE_ROWS = 4096
RANKED_STEPS = 8
RANKED_BITS, RANKED_GROUP = 4, 32


def choose_qparams(weight: Float[Tensor, "rows columns"], spec: QuantSpec) -> QParams:
    """Return scales (rounded to the type they are stored in) and zero points for a matrix.

    Args:
        weight: finite float32.
        spec: grid, granularity and observer.

    Raises:
        RecipeError: the group size does not divide the width.

    Cost: one pass for minmax, a sort for percentile, up to 80 passes for mse (100 below 3 bits); on symmetric grids of at
    most 4 bits with groups of 32 and more, 8 passes and a lookup of 80 numbers an entry.
    """
    columns = weight.shape[1]
    count = num_groups(spec.granularity, columns)
    if isinstance(spec.granularity, PerTensor):
        return _search(weight.reshape(1, 1, -1), spec)
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else columns
    whole = columns // size
    parts = []
    if whole:
        parts.append(_search(weight[:, : whole * size].reshape(len(weight), whole, size), spec))
    if whole < count:
        parts.append(_search(weight[:, whole * size :].unsqueeze(1), spec))
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return QParams(torch.cat([part.scale for part in parts], 1), torch.cat(zeros, 1) if zeros else None)


def _search(groups: Float[Tensor, "rows groups size"], spec: QuantSpec) -> QParams:
    """Choose one scale for each (row, group), a cache-sized piece of rows at a time."""
    rows_at_a_time = max(1, CHUNK_ENTRIES // max(1, groups[0].numel()))
    parts = [_search_rows(part, spec) for part in torch.split(groups, rows_at_a_time)]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return QParams(torch.cat([part.scale for part in parts]), torch.cat(zeros) if zeros else None)


def _search_rows(groups: Float[Tensor, "rows groups size"], spec: QuantSpec) -> QParams:
    low, high = _range(groups, spec)
    widest = _qparams_of_range(low, high, spec)
    if spec.observer != "mse":
        return widest
    if spec.grid.symmetric and spec.grid.bits <= RANKED_BITS and groups.shape[-1] >= RANKED_GROUP:
        return _best_of_ranked(groups, spec)
    return _best_of_all(groups, low, high, widest, spec)


def _best_of_ranked(groups: Float[Tensor, "rows groups size"], spec: QuantSpec) -> QParams:
    """Return the best of the steps that a table of errors ranks first; the larger range of two with the same error."""
    largest = groups.abs().amax(-1)
    # Shares of the largest entry, -1 to 1, as rows of the table.
    half = (TABLE_ROWS - 1) / 2
    rows = (groups * (half / torch.where(largest == 0, 1.0, largest)).unsqueeze(-1)).add_(half + 0.5).to(torch.int32)
    table = _error_table(spec.grid).to(groups.device)
    errors = torch.nn.functional.embedding_bag(rows.flatten(0, 1), table, mode="sum")
    ranked = errors.topk(RANKED_STEPS, dim=1, largest=False).indices.sort(dim=1).values.view(*largest.shape, -1)
    shrinks = torch.tensor(_steps(spec.grid.bits), dtype=groups.dtype, device=groups.device)
    best_scale, best_error = largest, torch.full_like(largest, torch.inf)
    for step in ranked.unbind(-1):
        tried = _qparams_of_range(-largest * shrinks[step], largest * shrinks[step], spec)
        error = _rounding_error(groups, tried, spec.grid)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, tried.scale, best_scale)
    return QParams(best_scale, None)


@lru_cache
def _error_table(grid: UniformGrid) -> Float[Tensor, "shares steps"]:
    """Return |error|^2.4 of an entry, for each share of the largest entry and each step."""
    shares = torch.linspace(-1, 1, TABLE_ROWS, device="cpu").unsqueeze(1)
    scales = torch.tensor(_steps(grid.bits), device="cpu") / _half_levels(grid)
    shares = shares.expand(-1, len(scales))
    return (grid.nearest_levels(shares, scales.expand_as(shares), None) * scales - shares).abs_().pow_(MSE_POWER)


def _best_of_all(
    groups: Float[Tensor, "rows groups size"], low: Tensor, high: Tensor, best: QParams, spec: QuantSpec
) -> QParams:
    """Return the best step; one whose largest error alone is too much is not computed further."""
    best_error = _rounding_error(groups, best, spec.grid)
    ends = torch.stack([groups.amin(-1), groups.amax(-1)], -1)
    for shrink in _steps(spec.grid.bits)[1:]:
        tried = _qparams_of_range(low * shrink, high * shrink, spec)
        # The error of the largest entry alone is a lower bound that costs nothing; most small ranges fall by it. The slack
        # is for powers taken of many numbers at once, which may differ from those of two in the last bits.
        bound = _rounding_error(ends, tried, spec.grid, largest=True) * (1 - 1e-5)
        hopeful = (bound < best_error).any(1).nonzero().squeeze(1)
        if len(hopeful) == 0:
            continue
        error = torch.full_like(best_error, torch.inf)
        error[hopeful] = _rounding_error(groups[hopeful], tried.of_rows(hopeful), spec.grid)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        zero_point = None
        if best.zero_point is not None and tried.zero_point is not None:
            zero_point = torch.where(better, tried.zero_point, best.zero_point)
        best = QParams(torch.where(better, tried.scale, best.scale), zero_point)
    return best


def _steps(bits: int) -> list[float]:
    """Return the shares of its range that a group is tried with, from all of it down."""
    linear = [1 - step / 100 for step in range(MSE_STEPS)]
    return linear if bits > 2 else linear + [linear[-1] * 0.89**step for step in range(1, 21)]


def _half_levels(grid: UniformGrid) -> float:
    """Return how many levels lie between 0 and the end of the range, on a symmetric grid."""
    return (2**grid.bits - 1) / 2 if grid.bits > 1 else 1.0


def _range(groups: Float[Tensor, "rows groups size"], spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return the lower and upper end of each group, both including 0."""
    if spec.observer == "percentile":
        rest = (1 - PERCENTILE) / 2
        ends = torch.quantile(groups, torch.tensor([rest, 1 - rest], dtype=groups.dtype, device=groups.device), dim=-1)
        low, high = ends[0], ends[1]
    else:
        low, high = groups.amin(-1), groups.amax(-1)
    return low.clamp(max=0), high.clamp(min=0)


def _qparams_of_range(
    low: Float[Tensor, "rows groups"], high: Float[Tensor, "rows groups"], spec: QuantSpec
) -> QParams:
    grid = spec.grid
    if grid.symmetric:
        largest = torch.maximum(-low, high)
        return QParams(stored_scales(largest / _half_levels(grid), spec), None)
    scale = stored_scales((high - low) / (2**grid.bits - 1), spec)
    zero_point = (grid.min_code - torch.round(low / scale)).clamp_(grid.min_code, grid.max_code)
    return QParams(scale, zero_point)


def interpolate_qparams(low: QParams, high: QParams, share: float, spec: QuantSpec) -> QParams:
    """Return the scales and whole zero points at a share (0 to 1) of the way from `low` to `high`; both ends exact."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share from 0 to 1 is required, but {share} came")
    scale = stored_scales(torch.lerp(low.scale, high.scale, share), spec)
    if low.zero_point is None or high.zero_point is None:
        return QParams(scale, None)
    return QParams(scale, torch.lerp(low.zero_point, high.zero_point, share).round_())


def empty_groups(weight: Float[Tensor, "rows columns"], spec: QuantSpec) -> Bool[Tensor, "rows groups"]:
    """Return which groups hold zeros only: their scale stands for nothing."""
    group = group_of_column(spec.granularity, weight.shape[1]).to(weight.device)
    largest = weight.new_zeros(len(weight), num_groups(spec.granularity, weight.shape[1]))
    return largest.scatter_reduce_(1, group.expand(len(weight), -1), weight.abs(), "amax") == 0


def stored_scales(scale: Float[Tensor, "rows groups"], spec: QuantSpec) -> Float[Tensor, "rows groups"]:
    """Round scales to the type they are stored in; a scale that the type cannot hold becomes its nearest normal number.

    An all-zero group gets scale 1, because any positive number gives it back exactly, and 0 where the grid has no level 0.
    """
    limits = torch.finfo(spec.scale_dtype)
    stored = scale.clamp(limits.tiny, limits.max).to(spec.scale_dtype).to(scale.dtype)
    return torch.where(scale == 0, 0.0 if spec.grid.is_sign else 1.0, stored)


def _rounding_error(
    groups: Float[Tensor, "rows groups size"], qparams: QParams, grid: UniformGrid, *, largest: bool = False
) -> Float[Tensor, "rows groups"]:
    """Return |error|^2.4 of each group: its sum, or its largest term."""
    scale = qparams.scale.unsqueeze(-1)
    zero_point = None if qparams.zero_point is None else qparams.zero_point.unsqueeze(-1)
    rounded = grid.nearest_levels(groups, scale, zero_point).mul_(scale)
    # By way of the logarithm: a power of each entry takes twice as long.
    errors = rounded.sub_(groups).abs_().log_().mul_(MSE_POWER).exp_()
    return errors.amax(-1) if largest else errors.sum(-1)
