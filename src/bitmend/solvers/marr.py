"""MARR: a residual strength of its own for every matrix, found by a PID loop on held-out reconstruction error.

Source: arXiv:2605.17997. The paper fixes that a coefficient per linear layer scales the residual term, that a PID loop
refines it with the layer's reconstruction error as feedback, and that it stops when that error changes by less than 1e-5
of its start. Gains, sign, start and bounds of the authors are not known to us; those here are ours:

- the residual is repaired by moving the target (form `shift`), with scales for the moved target. GPTAQ's causal form, which
  the paper builds on, is `form = "gptaq"`; on our models it loses to the other at 3 and 2 bits, whatever finds its strength
  (docs/results);
- the feedback is measured on held-out moments. On the rows that the correction was fitted to, the error keeps falling
  until the strength is about 1, whatever is true of other rows;
- its sign and unit come from projecting the remaining error on the direction of the correction (`linalg.strength`): e is
  the distance to the best strength, in units of strength, so that the gains need no tuning to a model. At low bits
  rounding itself gets dearer as the target moves; the slope of the measured errors corrects e for that (`signal="total"`);
- velocity form: u = kp (e_t - e_{t-1}) + ki e_t + kd (e_t - 2 e_{t-1} + e_{t-2}), |u| <= 0.3, strength kept in
  [0, max_strength]. With a plant gain g of the direction the loop is stable while g (ki + 2 kp + 4 kd) < 2;
- the loop starts at the closed form, the strength that would be best if nothing were rounded; 0, the global strength and
  the start are solved in one stacked sweep, which also gives the slope its first points;
- the answer is the visited point with the smallest error, so it is never worse than strength 0 or the global strength on
  the rows it was judged on (which makes its error there a little too good: it was chosen by it).
  `selection="last"` gives the paper's rule.

Scales of a moved target are interpolated between those searched at strength 0 and at `max_strength`; the refit keeps those of
the chosen point.

Cost: one stacked sweep of three copies, one sweep a step (at most `max_steps`); for the refit a second factor and P (shared
by the sites of a group) and one sweep; for the form `shift` one search for scales besides the one on the weight, which the
proof needs anyway; each measured solution costs an (out, in) x (in, in) product.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from bitmend.linalg.cholesky import Damping
from bitmend.linalg.moments import Moments
from bitmend.linalg.solver_cost import SolverCost
from bitmend.linalg.strength import Form, GridSource, StrengthMeter, StrengthSolver, cost_at_a_strength, solve_at
from bitmend.numerics.qtensor import QTensor
from bitmend.protocols import SOLVERS, Event, Need, Problem, Solution

LARGEST_STEP = 0.3
SMALLEST_STEP = 1e-3
CLOSE_ENOUGH = 0.02
FLAT = 1e-5


@SOLVERS.register("marr", paper="arXiv:2605.17997")
@dataclass(frozen=True)
class Marr:
    """GPTQ with a residual correction whose strength each matrix finds for itself, by a PID loop on held-out error.

    Attributes:
        form: how the residual is repaired; see `linalg.strength`.
        grid: scales from the original weight or from the moved target (`shifted`, form `shift` only); `auto` takes the moved
            target where there is one.
        feedback: `held_out`, or `in_sample` for the study.
        signal: `total` corrects the projected error by the measured slope, `projection` does not, `secant` uses the
            slope alone.
        kp: gain on the change of the error.
        ki: gain on the error.
        kd: gain on the change of the change.
        start: where the loop begins: `closed_form`, `global` or `zero`.
        global_strength: the strength to beat.
        max_strength: upper bound; the lower one is 0.
        max_steps: steps of the loop, at most; 0 takes the best of the first sweep.
        selection: `best` visited point, or `last`.
        folds: 1, or 2 to take the feedback from both ways of using the two parts, weighted by how steep each error is; the
            answer is still judged on the held-out part. Meant for `calibration.held_out = 0.5`.
        damping: added to the diagonal of G, as a fraction of its mean; dimensionless, > 0.
        order: "diagonal" rounds columns by decreasing mean square of their input, "natural" from left to right.
    """

    needs: ClassVar[frozenset[Need]] = frozenset(
        {Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT, Need.HELD_OUT}
    )
    form: Form = "shift"
    grid: GridSource = "auto"
    feedback: Literal["held_out", "in_sample"] = "held_out"
    signal: Literal["total", "projection", "secant"] = "total"
    kp: float = 0.2
    ki: float = 0.6
    kd: float = 0.05
    start: Literal["closed_form", "global", "zero"] = "closed_form"
    global_strength: float = 0.25
    max_strength: float = 1.0
    max_steps: int = 6
    selection: Literal["best", "last"] = "best"
    folds: Literal[1, 2] = 1
    damping: Damping = 0.01
    order: Literal["natural", "diagonal"] = "diagonal"

    def cost(self) -> SolverCost:
        """Return what the forecast counts: three strengths stacked, half of the steps allowed, and the refit.

        How many steps a matrix takes is known afterwards only; on the models of docs/results it is about half.
        """
        steps = (self.max_steps + 1) // 2
        return replace(
            cost_at_a_strength(self.form, self.folds),
            sweeps=(1 + steps) * self.folds,
            copies=(3 + steps) * self.folds,
            stacked=3,
            searches=self.folds,
            products=(4 + 3 + steps) * self.folds,
            double_matrices=3 + 3 * self.folds,
            again=cost_at_a_strength(self.form),
        )

    def solve(self, problem: Problem) -> Solution:
        """Return the rounded matrix, with every step of the loop among the diagnostics.

        Raises:
            FactorizationError: the moments stay indefinite after the damping ladder.
        """
        if problem.fit is None:
            raise ValueError("marr needs the moments G, C and D of its input")
        started = time.perf_counter()
        folds = self._folds(problem, problem.fit)
        loop = _Loop(self, folds)
        loop.run()
        chosen = loop.chosen()
        diagnostics = {
            "residual_strength": chosen.strength,
            "judged_on": "held_out" if folds[0].meter_is_held_out else "fit",
            "closed_form_strength": folds[0].meter.closed_form,
            "stop": loop.stop,
            "passes": loop.passes,
            "steps": [point.to_json() for point in loop.points],
            "damping": folds[0].solver.factor.damping,
            "dead_columns": folds[0].solver.factor.dead_columns,
            "loop_seconds": time.perf_counter() - started,
        }
        events = self._events(problem)
        return Solution(chosen.solution, diagnostics, events)

    def solve_again(self, problem: Problem, judged: Solution) -> Solution:
        """Return the matrix fitted at the strength and the scales that `judged` has chosen.

        Raises:
            FactorizationError: the moments stay indefinite after the damping ladder.
        """
        moments = problem.fit
        if moments is None:
            raise ValueError("marr needs the moments G and C of its input")
        strength = judged.diagnostics["residual_strength"]
        qtensor, factor = solve_at(
            problem.weight, problem.spec, moments, self.form, strength, judged.qtensor.qparams, self.damping, self.order
        )
        found = {"damping": factor.damping, "dead_columns": factor.dead_columns}
        return Solution(qtensor, {**judged.diagnostics, **found}, judged.events)

    def _events(self, problem: Problem) -> tuple[Event, ...]:
        if problem.held_out is not None or self.feedback == "in_sample":
            return ()
        message = "no rows are held out, so the residual strength was judged on the rows it was fitted to"
        return (Event("fallback", problem.site.name, f"{message}; set calibration.held_out above 0", degrades=True),)

    def _folds(self, problem: Problem, fit: Moments) -> list["_Fold"]:
        held_out = problem.held_out
        judge = fit if self.feedback == "in_sample" or held_out is None else held_out
        first = self._solver(problem, fit)
        folds = [_Fold(first, StrengthMeter(problem.weight, first.direction(), judge), judge is held_out)]
        if self.folds == 2 and held_out is not None:
            second = self._solver(problem, held_out)
            judge = held_out if self.feedback == "in_sample" else fit
            folds.append(_Fold(second, StrengthMeter(problem.weight, second.direction(), judge), judge is fit))
        return folds

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


@dataclass(frozen=True)
class _Fold:
    """A solver on some rows and a meter on others (or, for the study, on the same)."""

    solver: StrengthSolver
    meter: StrengthMeter
    meter_is_held_out: bool


@dataclass
class _Point:
    """One visited strength.

    `error` is the relative J that the point is chosen by, `mean_error` that of all folds, which the slope is taken from;
    `projection` is e in units of strength.
    """

    strength: float
    error: float
    mean_error: float
    projection: float
    solution: QTensor
    slope: float = 0.0
    feedback: float = float("nan")
    p: float = 0.0
    i: float = 0.0
    d: float = 0.0
    update: float = 0.0

    def to_json(self) -> dict[str, float]:
        names = ("strength", "error", "mean_error", "projection", "slope", "feedback", "p", "i", "d", "update")
        return {name: getattr(self, name) for name in names}


@dataclass
class _Loop:
    """The PID loop of one matrix."""

    marr: Marr
    folds: list[_Fold]
    points: list[_Point] = field(default_factory=list)
    passes: int = 0
    stop: str = "max_steps"
    first: int = 1

    def __post_init__(self) -> None:
        # A fold without a residual has no opinion on the strength.
        self.voting = [fold for fold in self.folds if not fold.meter.no_residual]
        self.gain = sum(fold.meter.relative_gain for fold in self.voting)

    def run(self) -> None:
        """Solve 0, the global strength and the start at once, then step until a stop rule holds."""
        if not self.voting:
            self.visit([0.0])
            self.stop = "no residual"
            return
        start = self._start()
        self.visit(list(dict.fromkeys([0.0, self._clip(self.marr.global_strength), start])))
        # The loop continues from the start, which is the last visited point unless it coincides with another.
        self.points.sort(key=lambda point: point.strength == start)
        self.first = len(self.points)
        feedback: list[float] = []
        for _ in range(self.marr.max_steps):
            point = self.points[-1]
            feedback.append(self._feedback(point))
            self._control(point, feedback)
            if self._stops(point):
                return
            self.visit([self._clip(point.strength + point.update)])

    def chosen(self) -> _Point:
        """Return the point whose solution is kept."""
        if self.marr.selection == "last":
            return self.points[-1]
        return min(self.points, key=lambda point: point.error)

    def visit(self, strengths: Sequence[float]) -> None:
        """Solve and measure some strengths in one stacked sweep a fold."""
        solved = [fold.solver.solve(strengths) for fold in self.folds]
        self.passes += len(self.folds)
        for position, strength in enumerate(strengths):
            seen = [
                fold.meter.measure(solutions[position].dequantize(torch.float64))
                for fold, solutions in zip(self.folds, solved, strict=True)
            ]
            mean_error = sum(one.error for one in seen) / len(seen)
            votes = {id(fold): one.projection for fold, one in zip(self.folds, seen, strict=True)}
            projection = self._vote([votes[id(fold)] for fold in self.voting])
            self.points.append(_Point(strength, seen[0].error, mean_error, projection, solved[0][position]))

    def _start(self) -> float:
        if self.marr.start == "zero":
            return 0.0
        if self.marr.start == "global":
            return self._clip(self.marr.global_strength)
        return self._clip(self._vote([fold.meter.closed_form for fold in self.voting]))

    def _vote(self, wishes: Sequence[float]) -> float:
        """Return the mean over folds, weighted by how steep each fold's error is: the minimum of the mean error."""
        weighted = sum(fold.meter.relative_gain * wish for fold, wish in zip(self.voting, wishes, strict=True))
        return weighted / self.gain if self.voting else 0.0

    def _clip(self, strength: float) -> float:
        return min(max(strength, 0.0), self.marr.max_strength)

    def _feedback(self, point: _Point) -> float:
        """Return the distance to the best strength, as the chosen signal sees it."""
        gain = self.gain / len(self.folds)
        point.slope = _slope(self.points, gain)
        if self.marr.signal == "projection":
            point.feedback = point.projection
        elif self.marr.signal == "total":
            point.feedback = point.projection - point.slope / (2 * gain)
        else:
            point.feedback = _secant(self.points, gain)
        return point.feedback

    def _control(self, point: _Point, e: list[float]) -> None:
        """Write the P, I and D parts of the step, and the clipped step."""
        point.i = self.marr.ki * e[-1]
        point.p = self.marr.kp * (e[-1] - e[-2]) if len(e) > 1 else 0.0
        point.d = self.marr.kd * (e[-1] - 2 * e[-2] + e[-3]) if len(e) > 2 else 0.0
        point.update = min(max(point.p + point.i + point.d, -LARGEST_STEP), LARGEST_STEP)

    def _stops(self, point: _Point) -> bool:
        last = self.points[-2] if len(self.points) > self.first else None
        if abs(point.feedback) < CLOSE_ENOUGH:
            self.stop = "error near zero"
        elif (
            last is not None and abs(point.mean_error - last.mean_error) < FLAT * self.points[self.first - 1].mean_error
        ):
            self.stop = "error flat"
        elif self._clip(point.strength + point.update) == point.strength:
            self.stop = "at the bound"
        elif abs(point.update) < SMALLEST_STEP:
            self.stop = "step too small"
        else:
            return False
        return True


def _slope(points: Sequence[_Point], gain: float) -> float:
    """Return what the measured errors add to the slope that the projections predict, by least squares over pairs.

    Between two points the projections predict J_i - J_j = - gain (e_i + e_j) (a_i - a_j) (trapezoid of -2 gain e). What is
    left over, per unit of strength, is the cost of rounding and clipping that grows with the strength.
    """
    top = bottom = 0.0
    for i, one in enumerate(points):
        for other in points[:i]:
            distance = one.strength - other.strength
            left = one.mean_error - other.mean_error + gain * (one.projection + other.projection) * distance
            top += left * distance
            bottom += distance**2
    return top / bottom if bottom else 0.0


def _secant(points: Sequence[_Point], gain: float) -> float:
    """Return the distance to the best strength from the last two measured errors alone; the projection at the start."""
    for other in reversed(points[:-1]):
        distance = points[-1].strength - other.strength
        if not math.isclose(distance, 0.0, abs_tol=1e-9):
            return -(points[-1].mean_error - other.mean_error) / (2 * gain * distance)
    return points[-1].projection
