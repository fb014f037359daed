"""Round the columns of a matrix in order, handing each column's error to the columns after it.

The loop that GPTQ (arXiv:2210.17323), GPTAQ (arXiv:2504.02692) and their relatives share. With H^-1 = U^T U, columns in
rounding order and w_k the column k as it stands when its turn comes:

    q_k = nearest level of w_k        e_k = (w_k - q_k) / U_kk
    W_later += - e_k U_k,later + (strength of the row) * s_k P_k,later      (for each residual term)

Residual terms correct what earlier layers left behind; GPTQ has none. Their source s_k is the column itself, w_k (GPTAQ),
or how far compensation has already carried it from the original weight, w0_k - w_k (the second term of ResComp).

Everything uses w_k from before rounding, everywhere, so that the answer does not depend on how the work is cut into
blocks. The public code of GPTAQ rounds in place, so that its source is w_k inside a block of 128 columns but the rounded
q_k across blocks, and its answers depend on the block size; `lazy_block` reproduces that.

The columns are cut in halves recursively: the left half is finished, its whole effect on the right half is one matrix
product, then the right half follows. All but the leaves is matrix products whatever the sizes of the caches are.

Rows are independent. So one sweep may hold several candidates for the same matrix, one below the other, each row with a
strength and a grid of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from bitmend.linalg.cholesky import InverseFactor
from bitmend.numerics.granularity import group_of_column
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec

LEAF_COLUMNS = 16


@runtime_checkable
class ColumnRounder(Protocol):
    """Chooses the level of each entry of one column when the sweep reaches it, and remembers the choice."""

    def round(self, column: int, values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return the rounded values of the matrix column number `column`."""
        ...


class UniformRounder:
    """Rounds columns to a uniform grid whose scales are fixed before the sweep (static groups)."""

    def __init__(self, qparams: QParams, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> None:
        rows, columns = shape
        self.grid = spec.grid
        self.group = group_of_column(spec.granularity, columns).tolist()
        # One contiguous row of scales per group: each step of the sweep reads one of them. All that a step needs is cut out
        # and computed here, because the small steps outnumber everything else.
        scale = qparams.scale.to(dtype).T.expand(-1, rows).contiguous()
        self.scale = scale.unbind(0)
        self.divisor = torch.where(scale == 0, 1.0, scale).unbind(0)
        zero_point = qparams.zero_point
        self.zero_point = None if zero_point is None else zero_point.to(dtype).T.expand(-1, rows).contiguous()
        if self.zero_point is not None:
            self.ends = tuple((end - self.zero_point).unbind(0) for end in (self.grid.min_code, self.grid.max_code))
        self.levels = torch.empty(columns, rows, dtype=dtype, device=qparams.scale.device)
        self._rows = self.levels.unbind(0)

    def round(self, column: int, values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return the rounded values of a column: those of `UniformGrid.nearest_levels`, in fewer steps."""
        group, levels = self.group[column], self._rows[column]
        if self.grid.is_sign:
            levels.copy_(self.grid.nearest_levels(values, self.scale[group], None))
        else:
            torch.div(values, self.divisor[group], out=levels).round_()
            if self.zero_point is None:
                levels.clamp_(self.grid.min_code, self.grid.max_code)
            else:
                levels.clamp_(self.ends[0][group], self.ends[1][group])
        return levels * self.scale[group]

    def codes(self) -> Int8[Tensor, "rows columns"]:
        """Return the codes of all columns, once the sweep is done."""
        zero_point = None if self.zero_point is None else self.zero_point[self.group].T
        return self.grid.codes_of_levels(self.levels.T, zero_point).contiguous()


@dataclass(frozen=True)
class Residual:
    """One residual term of a sweep.

    Attributes:
        P: strictly upper triangular, rows and columns in rounding order.
        strength: how much of the correction each row believes; dimensionless, 0 switches it off.
        source: `column` for w_k, `drift` for w0_k - w_k.
    """

    P: Float[Tensor, "in in"]
    strength: Float[Tensor, " rows"]
    source: Literal["column", "drift"] = "column"


def column_sweep(
    weight: Float[Tensor, "rows in"],
    factor: InverseFactor,
    rounder: ColumnRounder,
    residuals: Sequence[Residual] = (),
    leaf_columns: int = LEAF_COLUMNS,
    lazy_block: int | None = None,
) -> Float[Tensor, " rows"]:
    """Round all columns of `weight` in the order of `factor`; the rounded matrix is what `rounder` remembers.

    Args:
        weight: the matrix (or several candidates of it, one below the other); not changed. Its dtype is the one that the
            sweep computes in.
        factor: of the damped inverse second moment.
        rounder: chooses the levels.
        residuals: terms that correct the residual; none for GPTQ.
        leaf_columns: columns worked on one by one between two matrix products; changes speed, never the answer (beyond
            floating-point summation order).
        lazy_block: None for the exact answer; a width reproduces public code that forgets the unrounded columns at the
            end of each block of that width.

    Returns:
        The sum of e_k^2 of each row: without residual terms that is its error (q - w) H (q - w)^T, H the damped moment.

    Cost: rows * in^2 / 2 multiply-adds, as much again for each residual term; one copy of the weight and one of the errors.
    """
    dtype = weight.dtype
    columns = weight.index_select(1, factor.order).T.contiguous()
    state = _Sweep(
        columns=columns,
        original=columns.clone() if any(term.source == "drift" for term in residuals) else columns,
        errors=torch.empty_like(columns),
        U=factor.U.to(dtype),
        pivots=factor.U.diagonal().to(dtype),
        order=factor.order.tolist(),
        rounder=rounder,
        residuals=[replace(term, P=term.P.to(dtype), strength=term.strength.to(dtype)) for term in residuals],
        leaf=leaf_columns,
    )
    if lazy_block is None:
        state.run(0, len(columns))
        return state.row_errors()
    for start in range(0, len(columns), lazy_block):
        stop = min(start + lazy_block, len(columns))
        state.run(start, stop)
        state.push(start, stop, len(columns), rounded=True)
    return state.row_errors()


def round_columns(
    weight: Float[Tensor, "rows in"],
    factor: InverseFactor,
    qparams: QParams,
    spec: QuantSpec,
    residuals: Sequence[Residual] = (),
    lazy_block: int | None = None,
) -> QTensor:
    """Sweep `weight` to a uniform grid; arguments as in `column_sweep`."""
    rounder = UniformRounder(qparams, spec, (weight.shape[0], weight.shape[1]), weight.dtype)
    column_sweep(weight, factor, rounder, residuals, lazy_block=lazy_block)
    return QTensor(rounder.codes(), qparams, spec)


@dataclass
class _Sweep:
    """The state of one sweep; `columns[k]` is the k-th column in rounding order, one contiguous row of memory."""

    columns: Tensor
    original: Tensor
    errors: Tensor
    U: Tensor
    pivots: Tensor
    order: list[int]
    rounder: ColumnRounder
    residuals: list[Residual]
    leaf: int

    def __post_init__(self) -> None:
        # Rows, cut out once: a leaf takes less time for its arithmetic than for finding its columns.
        self._column, self._error, self._row = self.columns.unbind(0), self.errors.unbind(0), self.U.unbind(0)
        self._pivot = self.pivots.unbind(0)

    def run(self, start: int, stop: int) -> None:
        """Finish the columns start:stop, without telling those after them."""
        if stop - start <= self.leaf:
            self._run_leaf(start, stop)
            return
        leaves = -(-(stop - start) // self.leaf)
        middle = start + (leaves // 2) * self.leaf
        self.run(start, middle)
        self.push(start, middle, stop)
        self.run(middle, stop)

    def row_errors(self) -> Tensor:
        """Return the sum of squared errors of each row, once all columns are finished."""
        return torch.linalg.vector_norm(self.errors, dim=0).square()

    def _run_leaf(self, start: int, stop: int) -> None:
        for k in range(start, stop):
            values, error = self._column[k], self._error[k]
            rounded = self.rounder.round(self.order[k], values)
            torch.sub(values, rounded, out=error).div_(self._pivot[k])
            if k + 1 < stop:
                later = self.columns[k + 1 : stop]
                later.addr_(self._row[k][k + 1 : stop], error, alpha=-1)
                for term in self.residuals:
                    source = values if term.source == "column" else self.original[k] - values
                    later.addr_(term.P[k, k + 1 : stop], source * term.strength)

    def push(self, start: int, middle: int, stop: int, *, rounded: bool = False) -> None:
        """Hand the errors and residuals of the finished columns start:middle to the columns middle:stop.

        Args:
            start: first finished column.
            middle: first column after them.
            stop: end of the columns that are told.
            rounded: take residual sources from the rounded columns in place of the unrounded ones.
        """
        if middle == stop:
            return
        later = self.columns[middle:stop]
        later.addmm_(self.U[start:middle, middle:stop].T, self.errors[start:middle], alpha=-1)
        if not self.residuals:
            return
        values = self.columns[start:middle]
        if rounded:
            values = values - self.errors[start:middle] * self.pivots[start:middle].unsqueeze(1)
        for term in self.residuals:
            source = values if term.source == "column" else self.original[start:middle] - values
            later.addmm_(term.P[start:middle, middle:stop].T, source * term.strength)
