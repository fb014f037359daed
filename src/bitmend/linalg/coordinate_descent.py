"""Lower the error of a rounded matrix by changing one code at a time, and refit its scales to its codes.

Both work on the objective that rounding is judged by, for a target T (the weight, or the weight moved towards the
full-precision output) and H = G + lambda I:

    f(Q) = tr((Q - T) H (Q - T)^T)

**Codes.** With R = (Q - T) H, putting q in the place of entry (i, j) changes f by 2 d R_ij + d^2 H_jj, d = q - Q_ij. The best
allowed q is the level nearest to Q_ij - R_ij / H_jj; all rows are independent, so a column is changed in all rows at once.
GPTQ decides each column once and lets later columns answer for it; here each column also answers for the later ones. (As
QuantEase and LNQ, arXiv:2309.01885, arXiv:2505.07004; the lazy blocks are the usual ones.)

**Scales.** With the codes of a row fixed, q = theta Z, where row g of Z holds the row's levels (code - zero point) in the
columns of group g and zeros elsewhere. The best scales solve a small system a row: theta (Z H Z^T) = t H Z^T.

Neither ever raises f: rows whose f, taken in float64, would not fall keep what they had. f is handed on with the matrix, and
follows from the system for the scales where only scales change, so that it is computed once for each change of codes.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitmend.linalg.column_sweep import UniformRounder
from bitmend.numerics.granularity import group_of_column
from bitmend.numerics.observers import stored_scales
from bitmend.numerics.products import linear
from bitmend.numerics.qtensor import QParams, QTensor

BLOCK_COLUMNS = 32
RIDGE = 1e-9  # of the system for the scales, relative to its diagonal: levels of two groups may be collinear


@dataclass(frozen=True)
class Judged:
    """A rounded matrix and what it costs.

    Attributes:
        qtensor: scales per channel or per group.
        objectives: f of each row, float64.
    """

    qtensor: QTensor
    objectives: Float[Tensor, " out"]


def judge(qtensor: QTensor, target: Float[Tensor, "out in"], H: Float[Tensor, "in in"]) -> Judged:
    """Return a matrix with its f. Cost: that of `row_objectives`."""
    _check_rows(qtensor)
    return Judged(qtensor, row_objectives(qtensor, target, H))


def row_objectives(
    qtensor: QTensor, target: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> Float[Tensor, " out"]:
    """Return f of each row, in float64; f of the matrix is their sum. Cost: one (out, in) x (in, in) product."""
    group = group_of_column(qtensor.spec.granularity, qtensor.codes.shape[1]).to(qtensor.codes.device)
    spread = qtensor.qparams.per_column(group)
    zero_point = None if spread.zero_point is None else spread.zero_point.double()
    # Level times scale without the rounding to float32, as the system for the scales has it.
    E = qtensor.spec.grid.decode(qtensor.codes, spread.scale.double(), zero_point) - target.double()
    return ((E @ H.double()) * E).sum(1)


def descend_codes(start: Judged, target: Float[Tensor, "out in"], H: Float[Tensor, "in in"], sweeps: int) -> Judged:
    """Change codes, column by column from left to right, while f falls.

    Args:
        start: where to start.
        target: what to be near to.
        H: symmetric, with a positive diagonal.
        sweeps: over all columns, at most; ends early when a sweep changes nothing.

    Cost: 4 out in^2 operations for the first sweep, 2 for each other in float32, and one product in float64 for the guard.
    """
    if sweeps < 1:
        return start
    qtensor = start.qtensor
    rows, columns = qtensor.codes.shape
    rounder = UniformRounder(qtensor.qparams, qtensor.spec, (rows, columns), torch.float32)
    weights = H.float()
    curvature = H.diagonal().tolist()
    wanted = target.T.float()
    current = qtensor.dequantize(torch.float32).T.contiguous()  # a column is one contiguous row of memory
    for _ in range(sweeps):
        before = current.clone()
        slope = linear(weights, (current - wanted).T.contiguous())
        for left in range(0, columns, BLOCK_COLUMNS):
            right = min(left + BLOCK_COLUMNS, columns)
            for j in range(left, right):
                best = rounder.round(j, current[j] - slope[j] / curvature[j])
                change = best - current[j]
                current[j] = best
                slope[j:right].addr_(weights[j, j:right], change)
            moved = current[left:right] - before[left:right]
            slope[right:].addmm_(weights[right:, left:right], moved)
        if torch.equal(current, before):
            break
    return _better_rows(start, judge(replace(qtensor, codes=rounder.codes()), target, H))


def refit_scales(start: Judged, target: Float[Tensor, "out in"], H: Float[Tensor, "in in"]) -> Judged:
    """Give each row the scales that are best for its codes, in the type they are stored in.

    Stored scales are rounded one group after the other, the later ones making up for it, as GPTQ does with weights. A row
    keeps its scales where the best ones would not all be positive, or rounding them costs more than they win. A group whose
    levels are all zero keeps its scale.

    Cost: 2 out in^2 operations and out groups^3, in float64; 3 out in + 3 out groups^2 float64 of memory.
    """
    qtensor = start.qtensor
    A, b = _scale_system(qtensor, target.double(), H.double())
    old = qtensor.qparams.scale.double()
    energy = A.diagonal(dim1=1, dim2=2)
    empty = energy <= 0
    regular = A + torch.diag_embed(torch.where(empty, 1.0, RIDGE * energy))
    scales = _round_scales(regular, torch.where(empty, old, b), qtensor)
    usable = (scales > 0).all(1, keepdim=True) & scales.isfinite().all(1, keepdim=True)
    scales = torch.where(usable, scales, old).float()
    refitted = replace(qtensor, qparams=replace(qtensor.qparams, scale=scales))
    # f = theta A theta^T - 2 theta b + a term without theta.
    change = _quadratic(scales.double(), A, b) - _quadratic(old, A, b)
    return _better_rows(start, Judged(refitted, start.objectives + change))


def _quadratic(
    scales: Float[Tensor, "out groups"], A: Float[Tensor, "out groups groups"], b: Float[Tensor, "out groups"]
) -> Float[Tensor, " out"]:
    return ((torch.einsum("og,ogh->oh", scales, A) - 2 * b) * scales).sum(1)


def _scale_system(
    qtensor: QTensor, target: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> tuple[Float[Tensor, "out groups groups"], Float[Tensor, "out groups"]]:
    """Return Z H Z^T and t H Z^T of each row, a group of columns at a time: Z is zero outside its groups."""
    # Levels are what a matrix of unit scales stands for.
    unit = replace(qtensor, qparams=replace(qtensor.qparams, scale=torch.ones_like(qtensor.qparams.scale)))
    levels = unit.dequantize(torch.float64)
    group = group_of_column(qtensor.spec.granularity, levels.shape[1]).to(levels.device)
    rows, groups = qtensor.qparams.scale.shape
    A = levels.new_zeros(rows, groups, groups)
    b = levels.new_zeros(rows, groups)
    for k in range(groups):
        columns = group == k
        ZH = levels[:, columns] @ H[columns]
        A[:, k].index_add_(1, group, ZH * levels)
        b[:, k] = (ZH * target).sum(1)
    return A, b


def _round_scales(
    A: Float[Tensor, "out groups groups"], b: Float[Tensor, "out groups"], qtensor: QTensor
) -> Float[Tensor, "out groups"]:
    """Return scales that can be stored and nearly solve theta A = b; NaN in rows whose A is not positive definite."""
    inverse, failed = torch.linalg.inv_ex(A)
    U, indefinite = torch.linalg.cholesky_ex((inverse + inverse.transpose(1, 2)) / 2, upper=True)
    scales = (inverse @ b.unsqueeze(2)).squeeze(2)
    for k in range(scales.shape[1]):
        stored = stored_scales(scales[:, k : k + 1].float(), qtensor.spec).double()
        error = (scales[:, k : k + 1] - stored) / U[:, k, k : k + 1]
        scales[:, k + 1 :] -= error * U[:, k, k + 1 :]
        scales[:, k : k + 1] = torch.where(scales[:, k : k + 1] > 0, stored, torch.nan)
    return torch.where(((failed != 0) | (indefinite != 0)).unsqueeze(1), torch.nan, scales)


def select_rows(candidates: list[QTensor], objectives: Float[Tensor, "candidate out"]) -> QTensor:
    """Return a matrix whose every row is that of the candidate with the smallest objective (the first of equals)."""
    chosen = objectives.argmin(0)
    result = candidates[0]
    for index, candidate in enumerate(candidates[1:], 1):
        result = _merge_rows(result, candidate, chosen == index)
    return result


def _better_rows(old: Judged, new: Judged) -> Judged:
    better = new.objectives < old.objectives
    rows = _merge_rows(old.qtensor, new.qtensor, better)
    return Judged(rows, torch.where(better, new.objectives, old.objectives))


def _merge_rows(one: QTensor, other: QTensor, take_other: Bool[Tensor, " out"]) -> QTensor:
    mask = take_other.unsqueeze(1)
    zero_point = one.qparams.zero_point
    if zero_point is not None and other.qparams.zero_point is not None:
        zero_point = torch.where(mask, other.qparams.zero_point, zero_point)
    qparams = QParams(torch.where(mask, other.qparams.scale, one.qparams.scale), zero_point)
    return QTensor(torch.where(mask, other.codes, one.codes), qparams, one.spec)


def _check_rows(qtensor: QTensor) -> None:
    if len(qtensor.qparams.scale) != len(qtensor.codes):
        raise ValueError("rows are changed one by one, so their scales must be per channel or per group")
