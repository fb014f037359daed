"""A residual strength of its own for every matrix, the best of a fixed grid on held-out rows.

The plain rival of MARR's loop (arXiv:2605.17997): all strengths of the grid are solved in one stacked sweep, measured on
held-out moments, and the best is kept. Symbols and forms as in `linalg.strength`.

Scales of a moved target are interpolated, and kept by the refit, as `marr` does it.

Cost: one sweep over as many stacked copies as the grid has points, as many (out, in) x (in, in) products, one refit sweep.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from bitmend.errors import RecipeError
from bitmend.linalg.cholesky import Damping
from bitmend.linalg.moments import Moments
from bitmend.linalg.solver_cost import SolverCost
from bitmend.linalg.strength import Form, GridSource, StrengthMeter, StrengthSolver, cost_at_a_strength, solve_at
from bitmend.protocols import SOLVERS, Event, Need, Problem, Solution


@SOLVERS.register("strength_grid", paper="ours, against arXiv:2605.17997")
@dataclass(frozen=True)
class StrengthGrid:
    """GPTQ with a residual correction whose strength is the best of a fixed grid on held-out rows, for each matrix.

    Attributes:
        form: how the residual is repaired; see `linalg.strength`.
        grid: scales from the original weight or from the moved target (`shifted`, form `shift` only); `auto` takes the moved
            target where there is one.
        feedback: `held_out`, or `in_sample` for the study.
        points: how many strengths, evenly spaced from 0 to `max_strength`.
        max_strength: the largest one.
        damping: added to the diagonal of G, as a fraction of its mean; dimensionless, > 0.
        order: "diagonal" rounds columns by decreasing mean square of their input, "natural" from left to right.
    """

    needs: ClassVar[frozenset[Need]] = frozenset(
        {Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT, Need.HELD_OUT}
    )
    form: Form = "shift"
    grid: GridSource = "auto"
    feedback: Literal["held_out", "in_sample"] = "held_out"
    points: int = 11
    max_strength: float = 1.0
    damping: Damping = 0.01
    order: Literal["natural", "diagonal"] = "diagonal"

    def __post_init__(self) -> None:
        if self.points < 1 or not self.max_strength >= 0:
            raise RecipeError(
                f"strength_grid needs at least one point and a max_strength of 0 or more; got {self.points} points and "
                f"{self.max_strength}"
            )

    def cost(self) -> SolverCost:
        """Return what the forecast counts: all strengths stacked in one sweep and measured, then the refit."""
        return replace(
            cost_at_a_strength(self.form),
            copies=self.points,
            stacked=self.points,
            searches=1,
            products=4 + self.points,
            double_matrices=6,
            again=cost_at_a_strength(self.form),
        )

    def solve(self, problem: Problem) -> Solution:
        """Return the rounded matrix.

        Raises:
            FactorizationError: the moments stay indefinite after the damping ladder.
        """
        fit = problem.fit
        if fit is None:
            raise ValueError("strength_grid needs the moments G, C and D of its input")
        solver = self._solver(problem, fit)
        judge = fit if self.feedback == "in_sample" or problem.held_out is None else problem.held_out
        meter = StrengthMeter(problem.weight, solver.direction(), judge)
        strengths = [self.max_strength * k / max(1, self.points - 1) for k in range(self.points)]
        solutions = solver.solve(strengths)
        errors = [meter.measure(solution.dequantize(torch.float64)).error for solution in solutions]
        best = min(range(len(errors)), key=errors.__getitem__)
        diagnostics = {
            "residual_strength": strengths[best],
            "steps": [{"strength": a, "error": error} for a, error in zip(strengths, errors, strict=True)],
            "damping": solver.factor.damping,
            "dead_columns": solver.factor.dead_columns,
        }
        events: tuple[Event, ...] = ()
        if problem.held_out is None and self.feedback == "held_out":
            message = "no rows are held out, so the residual strength was judged on the rows it was fitted to"
            events = (
                Event("fallback", problem.site.name, f"{message}; set calibration.held_out above 0", degrades=True),
            )
        return Solution(solutions[best], diagnostics, events)

    def solve_again(self, problem: Problem, judged: Solution) -> Solution:
        """Return the matrix fitted at the strength and the scales that `judged` has chosen.

        Raises:
            FactorizationError: the moments stay indefinite after the damping ladder.
        """
        moments = problem.fit
        if moments is None:
            raise ValueError("strength_grid needs the moments G and C of its input")
        strength = judged.diagnostics["residual_strength"]
        qtensor, factor = solve_at(
            problem.weight, problem.spec, moments, self.form, strength, judged.qtensor.qparams, self.damping, self.order
        )
        found = {"damping": factor.damping, "dead_columns": factor.dead_columns}
        return Solution(qtensor, {**judged.diagnostics, **found}, judged.events)

    def _solver(self, problem: Problem, moments: Moments) -> StrengthSolver:
        return StrengthSolver(
            problem.weight,
            problem.spec,
            moments,
            form=self.form,
            grid=self.grid,
            damping=self.damping,
            order=self.order,
            qparams=problem.qparams,
            top=self.max_strength,
        )
