"""Solve one matrix for several strengths of the residual correction at once, and measure each on moments.

The strength `a` says how much of the residual r = W dx a layer is asked to repair: 0 is GPTQ (for `rescomp_first`: its
second term alone), 1 believes all of it. A form says how:

- `gptaq`: causally, column by column, `a w_q P_q` (arXiv:2504.02692);
- `shift`: the target itself moves, `W + a W C H^-1` (QEP, CoreQ), and is then rounded as by GPTQ;
- `rescomp`: `gptaq`'s term and the pull back to the original weight, `a w_q P_q + a (w0_q - w_q) P2_q`;
- `rescomp_first`: the same with `a` on the first term only, the second held at 0.25.

Each solution Q is measured on moments that need not be those it was fitted to:

    J(Q) = tr(E G E^T) - 2 tr(E C^T W^T) + tr(W D W^T),        E = Q - W      (mean squared output error)
    e(Q) = [tr(W C B^T) - tr(E G B^T)] / tr(B G B^T)

`B` is the direction in which the solution moves when `a` grows (from the moments that were fitted). e is the remaining
error projected on that direction, in units of B: positive when the residual is under-corrected. If Q moved by exactly B
per unit of a, e would be -dJ/da / (2 tr(B G B^T)), the Newton step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bitmend.errors import RecipeError
from bitmend.linalg.cholesky import InverseFactor
from bitmend.linalg.column_sweep import Residual, round_columns
from bitmend.linalg.moments import BLURRED, Moments, product_for_sums
from bitmend.linalg.residual import causal_rows, target_shift
from bitmend.linalg.solver_cost import SolverCost
from bitmend.numerics.granularity import PerTensor
from bitmend.numerics.observers import choose_qparams, empty_groups, interpolate_qparams
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec, stack_qparams

Form = Literal["gptaq", "shift", "rescomp", "rescomp_first"]
GridSource = Literal["auto", "original", "shifted"]
RESCOMP_SECOND = 0.25


class StrengthSolver:
    """Rounds one matrix at given strengths, on fixed moments.

    Cost of construction: one factor and one P for all sites that share the moments; the scale search once for a grid on
    the original weight, twice with `top`. Cost of `solve`: one sweep over as many stacked copies as there are strengths.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        spec: QuantSpec,
        moments: Moments,
        *,
        form: Form,
        grid: GridSource = "auto",
        damping: float,
        order: str,
        qparams: Callable[[], QParams] | None = None,
        top: float | None = None,
    ) -> None:
        """Prepare.

        Args:
            weight: full-precision weight.
            spec: grid.
            moments: to fit on, with C.
            form: how the residual is repaired.
            grid: choose scales on the original weight or on the moved target (form `shift` only); `auto` takes the moved
                target where there is one.
            damping: of the factor.
            order: of the columns.
            qparams: gives the scales for `original`, where they are known already.
            top: largest strength that will be asked for. With it, scales for a moved target are searched at strength 0 and at
                `top` only and interpolated between, which costs less and compares strengths rather than searches; without
                it they are searched anew for each strength.
        """
        if moments.C is None:
            raise ValueError("a residual correction needs the cross moment C")
        if grid == "shifted" and form != "shift":
            raise RecipeError(
                f"grid 'shifted' needs a moved target, which form {form!r} has not; set solver.form = 'shift'"
            )
        if isinstance(spec.granularity, PerTensor):
            raise RecipeError("candidates are solved row by row, so their scales must be per channel or per group")
        self.weight, self.spec, self.moments, self.form = weight, spec, moments, form
        self.factor: InverseFactor = moments.inverse_factor(damping, order)
        self._cross = moments.C
        self._key = (damping, order)
        self._shift = target_shift(weight, moments, self.factor) if form == "shift" else None
        on_original = grid == "original" or (grid == "auto" and form != "shift")
        search = qparams or (lambda: choose_qparams(weight, spec))
        self._grid_of_weight = search() if on_original or top else None
        self._top = None if on_original else top
        self._grid_at_top = None if not self._top else choose_qparams(self._targets([self._top]), spec)
        if self._grid_of_weight is not None and self._grid_at_top is not None:
            self._grid_of_weight = _start_at_zero(self._grid_of_weight, self._grid_at_top, empty_groups(weight, spec))

    def solve(self, strengths: Sequence[float]) -> list[QTensor]:
        """Return one solution for each strength, from one sweep."""
        rows, count = len(self.weight), len(strengths)
        stacked = self._targets(strengths)
        residuals = [] if self._shift is not None else self._terms(self._by_row(strengths))
        solved = round_columns(stacked, self.factor, self._grids(strengths, stacked), self.spec, residuals)
        return [solved.rows(start, start + rows) for start in range(0, count * rows, rows)]

    def _by_row(self, strengths: Sequence[float]) -> Float[Tensor, " stacked"]:
        a = torch.tensor(strengths, dtype=torch.float64, device=self.weight.device)
        return a.repeat_interleave(len(self.weight))

    def _targets(self, strengths: Sequence[float]) -> Float[Tensor, "stacked in"]:
        """Return what is rounded for each strength, one below the other."""
        stacked = self.weight.repeat(len(strengths), 1)
        if self._shift is not None:
            # One after the other: all at once in float64 they take gigabytes of a wide matrix.
            for moved, strength in zip(stacked.chunk(len(strengths)), strengths, strict=True):
                moved.copy_((self._shift * strength).add_(self.weight))
        return stacked

    def _grids(self, strengths: Sequence[float], stacked: Float[Tensor, "stacked in"]) -> QParams:
        low, high, top = self._grid_of_weight, self._grid_at_top, self._top
        if low is None:
            return choose_qparams(stacked, self.spec)
        if high is None or top is None:
            return stack_qparams([low] * len(strengths))
        return stack_qparams([interpolate_qparams(low, high, a / top, self.spec) for a in strengths])

    def direction(self) -> Float[Tensor, "out in"]:
        """Return B, how the unrounded solution moves per unit of strength, at strength 0; float64.

        The unrounded columns are W (I - a P)^-1 for `gptaq`, so B = W P. A second term of fixed strength s pulls the move
        back on its way: B = W P (I + s P2)^-1. When both terms grow with the strength, B = W P at 0 and shrinks after it.
        """
        if self._shift is not None:
            return self._shift
        moved = self.weight.double()[:, self.factor.order] @ self._causal_rows()
        if self.form == "rescomp_first":
            P2 = self._causal_rows_of_drift()
            pulled = torch.eye(len(P2), dtype=P2.dtype, device=P2.device) + RESCOMP_SECOND * P2
            moved = torch.linalg.solve_triangular(pulled, moved, upper=True, left=False)
        direction = torch.empty_like(moved)
        direction[:, self.factor.order] = moved
        return direction

    def _terms(self, a: Float[Tensor, " stacked"]) -> list[Residual]:
        terms = [Residual(self._causal_rows(), a)]
        if self.form != "gptaq":
            second = a if self.form == "rescomp" else torch.full_like(a, RESCOMP_SECOND)
            terms.append(Residual(self._causal_rows_of_drift(), second, "drift"))
        return terms

    def _causal_rows_of_drift(self) -> Float[Tensor, "in in"]:
        key = ("causal_rows_of_drift", *self._key)
        return self.moments.remember(key, lambda: causal_rows(self.moments.G + self._cross, self.factor))

    def _causal_rows(self) -> Float[Tensor, "in in"]:
        return self.moments.remember(("causal_rows", *self._key), lambda: causal_rows(self._cross, self.factor))


def solve_at(
    weight: Float[Tensor, "out in"],
    spec: QuantSpec,
    moments: Moments,
    form: Form,
    strength: float,
    qparams: QParams,
    damping: float,
    order: str,
) -> tuple[QTensor, InverseFactor]:
    """Return the solution at one strength and at given scales (made for nearly the same target), and the factor used."""
    solver = StrengthSolver(
        weight, spec, moments, form=form, grid="original", damping=damping, order=order, qparams=lambda: qparams
    )
    return solver.solve([strength])[0], solver.factor


def cost_at_a_strength(form: Form, times: int = 1) -> SolverCost:
    """Return what preparing `times` solvers and solving at one strength costs."""
    terms = {"shift": 0, "gptaq": 1, "rescomp": 2, "rescomp_first": 2}[form]
    return SolverCost(
        factors=times,
        squares=times * (1 + max(1, terms)),
        wide_squares=0 if terms else times,
        square_products=times * max(1, terms),
        sweeps=1,
        copies=1,
        stacked=1,
        residual_terms=terms,
        double_products=times,
        double_matrices=2,
    )


def _start_at_zero(low: QParams, high: QParams, empty: Bool[Tensor, "out groups"]) -> QParams:
    """Return `low` with scale 0 in groups that hold zeros only: there the moved target is the move alone, from 0 on."""
    zero_point = low.zero_point
    if zero_point is not None and high.zero_point is not None:
        zero_point = torch.where(empty, high.zero_point, zero_point)
    return QParams(torch.where(empty, 0.0, low.scale), zero_point)


@dataclass(frozen=True)
class Measured:
    """A solution measured on some moments.

    Attributes:
        error: J over mean ||W x||^2, the energy of the unrounded output on quantised inputs; dimensionless.
        projection: e, in units of strength; NaN when there is no residual to repair.
    """

    error: float
    projection: float


class StrengthMeter:
    """Measures solutions of one matrix on fixed moments, with everything that does not depend on them computed once."""

    def __init__(self, weight: Float[Tensor, "out in"], direction: Float[Tensor, "out in"], moments: Moments) -> None:
        """Prepare; `moments` must hold C and D."""
        if moments.C is None or moments.D is None:
            raise ValueError("measuring a residual correction needs the moments C and D")
        self._weight = weight
        self._direction = direction
        self._G = moments.G
        self._target = product_for_sums(weight, moments.C.T)
        self._constant = torch.sum(_product(weight, moments.D).mul_(weight))
        energy = torch.sum(_product(weight, moments.G).mul_(weight))
        self._energy = energy.clamp(min=torch.finfo(torch.float64).tiny)
        self.gain = float(torch.sum(_product(direction, moments.G) * direction))
        self._pull = torch.sum(self._target * direction)

    @property
    def no_residual(self) -> bool:
        """Whether the residual is too small to measure: at most 1e-8 of the layer's output energy."""
        return self.gain <= 1e-8 * float(self._energy)

    @property
    def closed_form(self) -> float:
        """The strength at which e would vanish if the solution were W + a B: tr(W C B^T) / tr(B G B^T).

        That is what the form `shift` does before rounding; the other forms follow B for small strengths only.
        """
        return 0.0 if self.no_residual else float(self._pull) / self.gain

    @property
    def relative_gain(self) -> float:
        """tr(B G B^T) over mean ||W x||^2: half the second derivative of the relative error along the direction."""
        return self.gain / float(self._energy)

    def measure(self, solution: Float[Tensor, "out in"]) -> Measured:
        """Return J and e of a solution, given in float64.

        Cost: one (out, in) x (in, in) product in float32; again in float64 where J is so small that float32 would blur it.
        """
        E = solution - self._weight
        measured = self._measure(E, _product(E, self._G))
        return measured if measured.error > BLURRED else self._measure(E, E @ self._G)

    def _measure(self, E: Float[Tensor, "out in"], EG: Float[Tensor, "out in"]) -> Measured:
        error = torch.sum(EG * E) - 2 * torch.sum(E * self._target) + self._constant
        projection = float("nan")
        if not self.no_residual:
            projection = float((self._pull - torch.sum(EG * self._direction)) / self.gain)
        return Measured(float(error / self._energy), projection)


def _product(left: Float[Tensor, "out in"], right: Float[Tensor, "in in"]) -> Float[Tensor, "out in"]:
    return product_for_sums(left, right).double()
