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

Neither ever raises f: rows whose f, taken in float64, would not fall keep what they had.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitmend.linalg.column_sweep import UniformRounder
from bitmend.numerics.granularity import group_of_column
from bitmend.numerics.observers import stored_scales
from bitmend.numerics.qtensor import QParams, QTensor

BLOCK_COLUMNS = 32
CHUNK_ENTRIES = 2**23  # of the work arrays of the scale refit: 64 MiB in float64


def row_objectives(
    qtensor: QTensor, target: Float[Tensor, "out in"], H: Float[Tensor, "in in"]
) -> Float[Tensor, " out"]:
    """Return f of each row, in float64; f of the matrix is their sum. Cost: one (out, in) x (in, in) product."""
    E = qtensor.dequantize(torch.float64) - target.double()
    return ((E @ H.double()) * E).sum(1)


def descend_codes(qtensor: QTensor, target: Float[Tensor, "out in"], H: Float[Tensor, "in in"], sweeps: int) -> QTensor:
    """Change codes, column by column from left to right, while f falls.

    Args:
        qtensor: where to start; scales per channel or per group.
        target: what to be near to.
        H: symmetric, with a positive diagonal.
        sweeps: over all columns, at most; ends early when a sweep changes nothing.

    Cost: 3 out in^2 operations a sweep in float32, and two products in float64 for the guard.
    """
    _check_rows(qtensor)
    if sweeps < 1:
        return qtensor
    rows, columns = qtensor.codes.shape
    rounder = UniformRounder(qtensor.qparams, qtensor.spec, (rows, columns), torch.float32)
    weights = H.float()
    curvature = H.diagonal().tolist()
    wanted = target.T.float()
    current = qtensor.dequantize(torch.float32).T.contiguous()  # a column is one contiguous row of memory
    for _ in range(sweeps):
        start = current.clone()
        slope = weights @ (current - wanted)
        for left in range(0, columns, BLOCK_COLUMNS):
            right = min(left + BLOCK_COLUMNS, columns)
            for j in range(left, right):
                best = rounder.round(j, current[j] - slope[j] / curvature[j])
                change = best - current[j]
                current[j] = best
                slope[j:right].addr_(weights[j, j:right], change)
            moved = current[left:right] - start[left:right]
            slope[right:].addmm_(weights[right:, left:right], moved)
        if torch.equal(current, start):
            break
    descended = replace(qtensor, codes=rounder.codes())
    return _better_rows(qtensor, descended, target, H)


def refit_scales(qtensor: QTensor, target: Float[Tensor, "out in"], H: Float[Tensor, "in in"]) -> QTensor:
    """Give each row the scales that are best for its codes, rounded to the type they are stored in.

    A row keeps its scales where the best ones would not all be positive, or rounding them costs more than they win. A group
    whose levels are all zero keeps its scale.

    Cost: 2 out in^2 operations and out groups^3 / 3, in float64; memory bounded by working on some rows at a time.
    """
    _check_rows(qtensor)
    rows, columns = qtensor.codes.shape
    groups = qtensor.qparams.scale.shape[1]
    step = max(1, CHUNK_ENTRIES // (groups * columns))
    pieces = [
        _refit_rows(qtensor, target, H.double(), start, min(start + step, rows)) for start in range(0, rows, step)
    ]
    scales = torch.cat(pieces)
    usable = (scales > 0).all(1, keepdim=True) & scales.isfinite().all(1, keepdim=True)
    scales = torch.where(usable, scales, qtensor.qparams.scale.double())
    refitted = replace(qtensor, qparams=replace(qtensor.qparams, scale=stored_scales(scales.float(), qtensor.spec)))
    return _better_rows(qtensor, refitted, target, H)


def select_rows(candidates: list[QTensor], target: Float[Tensor, "out in"], H: Float[Tensor, "in in"]) -> QTensor:
    """Return a matrix whose every row is that of the candidate with the smallest f (the first of equals)."""
    objectives = torch.stack([row_objectives(candidate, target, H) for candidate in candidates])
    chosen = objectives.argmin(0)
    result = candidates[0]
    for index, candidate in enumerate(candidates[1:], 1):
        result = _merge_rows(result, candidate, chosen == index)
    return result


def _refit_rows(
    qtensor: QTensor, target: Float[Tensor, "out in"], H: Float[Tensor, "in in"], start: int, stop: int
) -> Float[Tensor, "rows groups"]:
    part = qtensor.rows(start, stop)
    group = group_of_column(part.spec.granularity, part.codes.shape[1]).to(part.codes.device)
    groups = part.qparams.scale.shape[1]
    # Levels are what a matrix of unit scales stands for.
    unit = replace(part, qparams=replace(part.qparams, scale=torch.ones_like(part.qparams.scale)))
    levels = unit.dequantize(torch.float64)
    Z = torch.zeros(len(levels), groups, levels.shape[1], dtype=torch.float64, device=levels.device)
    Z.scatter_(1, group.expand(len(levels), 1, -1), levels.unsqueeze(1))
    ZH = Z @ H
    A = ZH @ Z.transpose(1, 2)
    b = (ZH @ target[start:stop].double().unsqueeze(2)).squeeze(2)
    energy = A.diagonal(dim1=1, dim2=2)
    empty = energy <= 0
    A = A + torch.diag_embed(torch.where(empty, 1.0, 1e-9 * energy))
    b = torch.where(empty, part.qparams.scale.double(), b)
    solution, failed = torch.linalg.solve_ex(A, b)
    return torch.where((failed != 0).unsqueeze(1), torch.nan, solution)


def _better_rows(old: QTensor, new: QTensor, target: Float[Tensor, "out in"], H: Float[Tensor, "in in"]) -> QTensor:
    return _merge_rows(old, new, row_objectives(new, target, H) < row_objectives(old, target, H))


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
