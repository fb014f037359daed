"""Descent: GPTQ on the moved target, scales chosen by the error they leave, then coordinate descent on codes and scales.

What the study of MARR found to matter more than how the residual strength is chosen (docs/results): all of the residual is
repaired at once (the target moves, `linalg.residual`), by one strength for all matrices, and the work goes into making the
rounding error small in the metric that it is judged by:

1. T = W + strength * W C H^-1, and scales for T by the recipe's observer;
2. each row is rounded by GPTQ with those scales times each of `scale_factors`, all in one stacked sweep, and keeps the factor
   that leaves the smallest error. An observer looks at rounding to nearest, which GPTQ does not do;
3. `rounds` times: coordinate descent on the codes, then the best scales for them in closed form; then the codes once more.

f(Q) = tr((Q - T) H (Q - T)^T) never rises after step 2, row by row (`linalg.coordinate_descent`). The file has the layout and
the size of GPTQ's.

Sources: target shift arXiv:2504.09629, arXiv:2602.05902; coordinate descent arXiv:2309.01885; scales refitted between passes
arXiv:2505.07004. Choosing the scale of a row by the solved error, and their combination, are ours.

Cost: one sweep over as many stacked copies as there are factors, some rows at a time, so that memory stays bounded;
(rounds + 1) * sweeps sweeps of descent; `rounds` refits.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from bitmend.errors import RecipeError
from bitmend.linalg.cholesky import Damping, InverseFactor
from bitmend.linalg.column_sweep import UniformRounder, column_sweep
from bitmend.linalg.coordinate_descent import descend_codes, judge, refit_scales, select_rows
from bitmend.linalg.residual import target_shift
from bitmend.linalg.solver_cost import SolverCost
from bitmend.numerics.granularity import PerTensor
from bitmend.numerics.observers import choose_qparams, stored_scales
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec, stack_qparams, stack_rows
from bitmend.protocols import SOLVERS, Need, Problem, Solution

STACKED_ENTRIES = 2**24  # of the stacked target; the sweep holds about six times as many numbers
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@SOLVERS.register("descent", paper="ours; parts of arXiv:2504.09629, arXiv:2309.01885, arXiv:2505.07004")
@dataclass(frozen=True)
class Descent:
    """GPTQ on the moved target, finished by coordinate descent on codes and scales.

    Attributes:
        residual_strength: share of the move, 0 to 1; 0 repairs nothing of what earlier layers lost.
        scale_factors: multiples of the observer's scales that each row may choose from; the first of equally good ones.
        sweeps: of coordinate descent, at most, each time.
        rounds: of codes and scales in turn; 0 and 0 sweeps leave what the stacked sweep gives.
        damping: added to the diagonal of G, as a fraction of its mean; dimensionless, > 0.
        order: "diagonal" rounds columns by decreasing mean square of their input, "natural" from left to right.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT})
    residual_strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    scale_factors: tuple[Factor, ...] = (1.0, 0.7, 0.8, 0.9, 1.12, 1.25, 1.4)
    sweeps: Annotated[int, Field(ge=0)] = 3
    rounds: Annotated[int, Field(ge=0)] = 2
    damping: Damping = 0.01
    order: Literal["natural", "diagonal"] = "diagonal"

    def __post_init__(self) -> None:
        if not self.scale_factors:
            raise RecipeError("descent needs at least one scale factor, but solver.scale_factors is empty; set [1.0]")

    def cost(self) -> SolverCost:
        """Return what the forecast counts; a sweep of descent costs three products, a refit of scales one in float64."""
        candidates = len(self.scale_factors)
        descents = self.rounds + 1
        return SolverCost(
            factors=1,
            squares=3,
            wide_squares=1,
            square_products=1,
            sweeps=1,
            copies=candidates,
            stacked=candidates,
            stacked_entries=STACKED_ENTRIES,
            searches=1,
            products=2 * self.sweeps * descents,
            double_products=1 + candidates + 4 * descents + self.rounds,
            double_matrices=8,
        )

    def solve(self, problem: Problem) -> Solution:
        """Return the rounded matrix; diagnostics hold f after each stage, relative to GPTQ's on T with the first factor.

        Raises:
            FactorizationError: the moments stay indefinite after the damping ladder.
            RecipeError: one scale for a whole matrix, which rows cannot choose by themselves.
        """
        moments, spec = problem.fit, problem.spec
        if moments is None or moments.C is None:
            raise ValueError("descent needs the moments G and C of its input")
        if isinstance(spec.granularity, PerTensor):
            raise RecipeError("descent chooses scales row by row, so they must be per channel or per group")
        factor = moments.inverse_factor(self.damping, self.order)
        shift = target_shift(problem.weight, moments, factor)
        target = (problem.weight.double() + self.residual_strength * shift).to(problem.weight.dtype)
        H = factor.damped(moments.G)
        plain, start = self._start(target, factor, spec)
        stage = judge(start, target, H)
        objectives = [plain, float(stage.objectives.sum())]
        for _ in range(self.rounds):
            stage = refit_scales(descend_codes(stage, target, H, self.sweeps), target, H)
            objectives.append(float(stage.objectives.sum()))
        stage = descend_codes(stage, target, H, self.sweeps)
        objectives.append(float(stage.objectives.sum()))
        diagnostics = {
            "residual_strength": self.residual_strength,
            "objective": [objective / objectives[0] if objectives[0] else 1.0 for objective in objectives],
            "damping": factor.damping,
            "dead_columns": factor.dead_columns,
        }
        return Solution(stage.qtensor, diagnostics)

    def _start(self, target: Float[Tensor, "out in"], factor: InverseFactor, spec: QuantSpec) -> tuple[float, QTensor]:
        """Return f of GPTQ's answer for the first scale factor, and the answer where each row has its best factor."""
        base = choose_qparams(target, spec)
        rows = max(1, STACKED_ENTRIES // (target.shape[1] * len(self.scale_factors)))
        first, chosen = 0.0, []
        for start in range(0, len(target), rows):
            part = target[start : start + rows]
            candidates, errors = self._solve_candidates(part, factor, spec, base.of_rows(slice(start, start + rows)))
            first += float(errors[0].double().sum())
            chosen.append(select_rows(candidates, errors))
        return first, stack_rows(chosen)

    def _solve_candidates(
        self, target: Float[Tensor, "out in"], factor: InverseFactor, spec: QuantSpec, base: QParams
    ) -> tuple[list[QTensor], Float[Tensor, "factor out"]]:
        """Return GPTQ's answer for each scale factor and f of its rows, both from one stacked sweep."""
        scaled = [QParams(stored_scales(base.scale * times, spec), base.zero_point) for times in self.scale_factors]
        stacked, qparams = target.repeat(len(scaled), 1), stack_qparams(scaled)
        rounder = UniformRounder(qparams, spec, (len(stacked), stacked.shape[1]), stacked.dtype)
        errors = column_sweep(stacked, factor, rounder).reshape(len(scaled), len(target))
        solved = QTensor(rounder.codes(), qparams, spec)
        return [solved.rows(start, start + len(target)) for start in range(0, len(stacked), len(target))], errors
