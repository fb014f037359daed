"""CoreQ: move the target by the share of the residual that the inputs explain, then round as GPTQ.

Source: arXiv:2602.05902. With C, D as in `Moments`, one strength per matrix in closed form, an in-sample R^2:

    strength = clip( tr(W C H^-1 C^T W^T) / tr(W D W^T), 0, 1 )

It is large when the residual is a linear function of the inputs, whether or not that function will hold on other rows; the
held-out ratio `StrengthMeter.closed_form` asks the second question. Grids are fitted on the moved target.

Cost: QEP's.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from bitmend.linalg.cholesky import Damping
from bitmend.linalg.solver_cost import ONE_SWEEP, SolverCost
from bitmend.linalg.strength import StrengthSolver
from bitmend.protocols import SOLVERS, Need, Problem, Solution


@SOLVERS.register("coreq", paper="arXiv:2602.05902")
@dataclass(frozen=True)
class CoreQ:
    """GPTQ on a target moved by the share of the residual that is linear in the inputs.

    Attributes:
        damping: added to the diagonal of G, as a fraction of its mean; dimensionless, > 0.
        order: "diagonal" rounds columns by decreasing mean square of their input, "natural" from left to right.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT})
    damping: Damping = 0.01
    order: Literal["natural", "diagonal"] = "diagonal"

    def cost(self) -> SolverCost:
        """Return what the forecast counts: GPTQ's work, the shift of the target, and scales for it."""
        return replace(
            ONE_SWEEP, squares=2, wide_squares=1, square_products=1, searches=1, double_products=3, double_matrices=4
        )

    def solve(self, problem: Problem) -> Solution:
        """Return the rounded matrix.

        Raises:
            FactorizationError: the moments stay indefinite after the damping ladder.
        """
        moments, weight = problem.fit, problem.weight
        if moments is None or moments.C is None or moments.D is None:
            raise ValueError("coreq needs the moments G, C and D of its input")
        solver = StrengthSolver(
            weight, problem.spec, moments, form="shift", grid="shifted", damping=self.damping, order=self.order
        )
        W = weight.double()
        explained = torch.sum(solver.direction() * (W @ moments.C))
        residual = torch.sum((W @ moments.D) * W)
        strength = float((explained / residual).clamp(0, 1)) if float(residual) > 0 else 0.0
        diagnostics = {"damping": solver.factor.damping, "dead_columns": solver.factor.dead_columns}
        return Solution(solver.solve([strength])[0], {**diagnostics, "residual_strength": strength})
