"""Round the columns of a matrix in order, handing each column's error to the columns after it.

The loop that GPTQ (arXiv:2210.17323), GPTAQ (arXiv:2504.02692) and their relatives share. With H^-1 = U^T U, columns in
rounding order and w_k the column k as it stands when its turn comes:

    q_k = nearest level of w_k        e_k = (w_k - q_k) / U_kk
    W_later -= e_k U_k,later + (strength of the row) * w_k P_k,later

The second term is the residual correction; P is None for GPTQ. Both terms use w_k from before rounding, everywhere, so
that the answer does not depend on how the work is cut into blocks. (The public code of GPTAQ uses the rounded q_k across
blocks, because it rounds in place; its answers depend on its block size.)

The columns are cut in halves recursively: the left half is finished, its whole effect on the right half is one matrix
product, then the right half follows. All but the leaves is matrix products whatever the sizes of the caches are.

Rows are independent. So one sweep may hold several candidates for the same matrix, one below the other, each row with a
strength and a grid of its own.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from bitmend.linalg.cholesky import InverseFactor
from bitmend.numerics.granularity import group_of_column
from bitmend.numerics.qtensor import QParams, QuantSpec

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
        # One contiguous row of scales per group: each step of the sweep reads one of them.
        self.scale = qparams.scale.to(dtype).T.expand(-1, rows).contiguous()
        zero_point = qparams.zero_point
        self.zero_point = None if zero_point is None else zero_point.to(dtype).T.expand(-1, rows).contiguous()
        self.levels = torch.empty(columns, rows, dtype=dtype, device=qparams.scale.device)

    def round(self, column: int, values: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        group = self.group[column]
        zero_point = None if self.zero_point is None else self.zero_point[group]
        levels = self.grid.nearest_levels(values, self.scale[group], zero_point)
        self.levels[column] = levels
        return levels * self.scale[group]

    def codes(self) -> Int8[Tensor, "rows columns"]:
        """Return the codes of all columns, once the sweep is done."""
        zero_point = None if self.zero_point is None else self.zero_point[self.group].T
        return self.grid.codes_of_levels(self.levels.T, zero_point).contiguous()


@dataclass(frozen=True)
class Residual:
    """The residual correction of a sweep.

    Attributes:
        P: strictly upper triangular, rows and columns in rounding order.
        strength: how much of the correction each row believes; dimensionless, 0 switches it off.
    """

    P: Float[Tensor, "in in"]
    strength: Float[Tensor, " rows"]


def column_sweep(
    weight: Float[Tensor, "rows in"],
    factor: InverseFactor,
    rounder: ColumnRounder,
    residual: Residual | None = None,
    leaf_columns: int = LEAF_COLUMNS,
) -> None:
    """Round all columns of `weight` in the order of `factor`; the result is what `rounder` remembers.

    Args:
        weight: the matrix (or several candidates of it, one below the other); not changed. Its dtype is the one that the
            sweep computes in.
        factor: of the damped inverse second moment.
        rounder: chooses the levels.
        residual: the residual correction, or None.
        leaf_columns: columns worked on one by one between two matrix products; changes speed, never the answer (beyond
            floating-point summation order).

    Cost: rows * in^2 multiply-adds (twice that with a residual); one copy of the weight and one of the errors.
    """
    order: Int[Tensor, " in"] = factor.order
    state = _Sweep(
        columns=weight.T[order].contiguous(),
        errors=torch.empty_like(weight.T, memory_format=torch.contiguous_format),
        U=factor.U.to(weight.dtype),
        pivots=[float(pivot) for pivot in factor.U.diagonal()],
        order=order.tolist(),
        rounder=rounder,
        residual=None
        if residual is None
        else Residual(residual.P.to(weight.dtype), residual.strength.to(weight.dtype)),
        leaf=leaf_columns,
    )
    state.run(0, len(state.columns))


@dataclass
class _Sweep:
    """The state of one sweep; `columns[k]` is the k-th column in rounding order, one contiguous row of memory."""

    columns: Tensor
    errors: Tensor
    U: Tensor
    pivots: list[float]
    order: list[int]
    rounder: ColumnRounder
    residual: Residual | None
    leaf: int

    def run(self, start: int, stop: int) -> None:
        if stop - start <= self.leaf:
            self._run_leaf(start, stop)
            return
        leaves = -(-(stop - start) // self.leaf)
        middle = start + (leaves // 2) * self.leaf
        self.run(start, middle)
        self._push(start, middle, stop)
        self.run(middle, stop)

    def _run_leaf(self, start: int, stop: int) -> None:
        for k in range(start, stop):
            values = self.columns[k]
            rounded = self.rounder.round(self.order[k], values)
            torch.sub(values, rounded, out=self.errors[k]).div_(self.pivots[k])
            if k + 1 < stop:
                later = self.columns[k + 1 : stop]
                later.addr_(self.U[k, k + 1 : stop], self.errors[k], alpha=-1)
                if self.residual is not None:
                    later.addr_(self.residual.P[k, k + 1 : stop], values * self.residual.strength)

    def _push(self, start: int, middle: int, stop: int) -> None:
        """Hand the errors of columns start:middle to columns middle:stop."""
        later = self.columns[middle:stop]
        later.addmm_(self.U[start:middle, middle:stop].T, self.errors[start:middle], alpha=-1)
        if self.residual is not None:
            before = self.columns[start:middle] * self.residual.strength
            later.addmm_(self.residual.P[start:middle, middle:stop].T, before)
