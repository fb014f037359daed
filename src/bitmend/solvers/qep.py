"""QEP: move the target by a fixed share of the residual, then round as GPTQ.

Source: quantization error propagation, arXiv:2504.09629: W* = W + strength W C H^-1, then any layer-wise rounding of W*.
Symbols as in `gptq`, C = mean (x~ - x) x^T. The paper's default strength is 1/2; it shows the strength to act like a ridge
term, that is as protection from overfitting. Grids are fitted on the moved target, which is what is rounded.

Cost: GPTQ's and 6 out in^2 operations in float64 for the shift.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from bitmend.linalg.cholesky import Damping
from bitmend.linalg.solver_cost import ONE_SWEEP, SolverCost
from bitmend.linalg.strength import StrengthSolver
from bitmend.protocols import SOLVERS, Need, Problem, Solution


@SOLVERS.register("qep", paper="arXiv:2504.09629")
@dataclass(frozen=True)
class Qep:
    """GPTQ on a target moved towards the full-precision output by one fixed strength.

    Attributes:
        residual_strength: share of the move, 0 to 1; 0 is GPTQ.
        damping: added to the diagonal of G, as a fraction of its mean; dimensionless, > 0.
        order: "diagonal" rounds columns by decreasing mean square of their input, "natural" from left to right.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT})
    residual_strength: float = 0.5
    damping: Damping = 0.01
    order: Literal["natural", "diagonal"] = "diagonal"

    def cost(self) -> SolverCost:
        """Return what the forecast counts: GPTQ's work, the shift of the target, and scales for it."""
        return replace(
            ONE_SWEEP, squares=2, wide_squares=1, square_products=1, searches=1, double_products=1, double_matrices=4
        )

    def solve(self, problem: Problem) -> Solution:
        """Return the rounded matrix.

        Raises:
            FactorizationError: the moments stay indefinite after the damping ladder.
        """
        if problem.fit is None:
            raise ValueError("qep needs the moments G and C of its input")
        solver = StrengthSolver(
            problem.weight,
            problem.spec,
            problem.fit,
            form="shift",
            grid="shifted",
            damping=self.damping,
            order=self.order,
        )
        diagnostics = {"damping": solver.factor.damping, "dead_columns": solver.factor.dead_columns}
        return Solution(solver.solve([self.residual_strength])[0], diagnostics)
