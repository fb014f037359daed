"""GPTQ: round columns in order, pushing each column's error onto the columns after it.

Source: Frantar et al. 2023, arXiv:2210.17323, Algorithm 1. Symbols: W (out, in); G = mean x x^T (in, in), the paper's H up
to a factor 2 that cancels because damping is relative; H = G + damping mean(diag G) I; H^-1 = U^T U, U upper triangular.
The loop is `linalg.column_sweep`.

How we differ: the factorisation is in float64, from one Cholesky factor of H with its columns reversed (no inverse is
formed); dead inputs keep their weights rounded to nearest, where the public code sets them to zero; groups are static,
that is their scales come from the original weights before the sweep, so that a column order never changes the grid.

Cost: 4/3 in^3 operations in float64, shared by all sites with the same input, and out in^2 / 2 multiply-adds in float32.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bitmend.linalg.cholesky import Damping, InverseFactor
from bitmend.linalg.column_sweep import UniformRounder, column_sweep
from bitmend.linalg.moments import Moments
from bitmend.linalg.solver_cost import ONE_SWEEP, SolverCost
from bitmend.numerics.qtensor import QTensor
from bitmend.protocols import SOLVERS, Need, Problem, Solution

BLURRED_BY_DAMPING = 1e-2  # share of the damped error below which float32 sums say too little of the rest


@SOLVERS.register("gptq", paper="arXiv:2210.17323")
@dataclass(frozen=True)
class Gptq:
    """Second-order rounding of one weight matrix, each column's error repaired by the columns after it.

    Example: W = (0.5, 0.5), levels {-1, 0, 1}, G = ((1, 0.9), (0.9, 1)), no damping. Round-to-nearest (ties to even)
    gives (0, 0) with objective 0.95. GPTQ rounds 0.5 to 0, hands 0.9 * 0.5 = 0.45 to the second column, which becomes
    0.95 and rounds to 1: (0, 1) with objective 0.05, the best there is.

    Attributes:
        damping: added to the diagonal of G, as a fraction of its mean; dimensionless, > 0.
        order: "diagonal" rounds columns by decreasing mean square of their input, "natural" from left to right.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT})
    damping: Damping = 0.01
    order: Literal["natural", "diagonal"] = "diagonal"

    def cost(self) -> SolverCost:
        """Return what the forecast counts: one factor and one sweep."""
        return ONE_SWEEP

    def solve(self, problem: Problem) -> Solution:
        """Return the rounded matrix.

        Raises:
            FactorizationError: the moments stay indefinite after the damping ladder.
        """
        if problem.fit is None:
            raise ValueError("gptq needs the moments of its input")
        factor = problem.fit.inverse_factor(self.damping, self.order)
        qparams = problem.qparams()
        rows, columns = problem.weight.shape
        rounder = UniformRounder(qparams, problem.spec, (rows, columns), problem.weight.dtype)
        damped_error = float(column_sweep(problem.weight, factor, rounder).sum(dtype=torch.float64))
        qtensor = QTensor(rounder.codes(), qparams, problem.spec)
        return Solution(
            qtensor,
            {"damping": factor.damping, "dead_columns": factor.dead_columns},
            fit_error=_without_damping(damped_error, problem.weight, qtensor, problem.fit, factor),
        )


def _without_damping(
    damped_error: float, weight: Float[Tensor, "out in"], qtensor: QTensor, fit: Moments, factor: InverseFactor
) -> float | None:
    """Return tr(E G E^T) from tr(E H E^T), H = G + lambda I.

    None where the damping is so much of it that it blurs, and where errors are against the full-precision network.
    """
    if fit.D is not None:
        return None
    distance = float((qtensor.dequantize() - weight).square_().sum(dtype=torch.float64))
    error = damped_error - float(factor.added(fit.G)) * distance
    return error if error > BLURRED_BY_DAMPING * damped_error else None
