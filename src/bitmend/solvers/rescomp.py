"""ResComp: GPTAQ that also aims at the output of the original weight, not of the compensated one.

Source: "Rethinking residual errors in compensation-based LLM quantization" (ICLR 2026), whose public code puts 0.25 on
both of its terms. With w0_q the original column and w_q the column when its turn comes:

    W_later += strength w_q P_q + drift_strength (w0_q - w_q) P2_q,    P = triu(C U^T, 1) U,   P2 = triu((G + C) U^T, 1) U.

G + C is the cross moment mean x~ x^T of both streams. The second term partly undoes the deliberate compensation of earlier
columns, so both strengths want to be small. How we differ: sources of both terms are taken before rounding, everywhere, so
that the answer does not depend on a block size; damping once.

Cost: GPTAQ's, 4 in^3 more for P2 (shared), and another out in^2 / 2 multiply-adds.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from bitmend.linalg.cholesky import Damping
from bitmend.linalg.column_sweep import Residual, round_columns
from bitmend.linalg.residual import causal_rows
from bitmend.linalg.solver_cost import ONE_SWEEP, SolverCost
from bitmend.protocols import SOLVERS, Need, Problem, Solution


@SOLVERS.register("rescomp", paper="Rethinking residual errors, ICLR 2026")
@dataclass(frozen=True)
class ResComp:
    """GPTAQ with a second term that pulls compensated columns back towards the original output.

    Attributes:
        residual_strength: of the first term, as in `gptaq`.
        drift_strength: of the second term; 0 is `gptaq`.
        damping: added to the diagonal of G, as a fraction of its mean; dimensionless, > 0.
        order: "diagonal" rounds columns by decreasing mean square of their input, "natural" from left to right.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT})
    residual_strength: float = 0.25
    drift_strength: float = 0.25
    damping: Damping = 0.01
    order: Literal["natural", "diagonal"] = "diagonal"

    def cost(self) -> SolverCost:
        """Return what the forecast counts: GPTQ's work, two P of two products each, and two residual terms."""
        return replace(ONE_SWEEP, squares=3, square_products=2, residual_terms=2)

    def solve(self, problem: Problem) -> Solution:
        """Return the rounded matrix.

        Raises:
            FactorizationError: the moments stay indefinite after the damping ladder.
        """
        moments, weight = problem.fit, problem.weight
        if moments is None or moments.C is None:
            raise ValueError("rescomp needs the moments G and C of its input")
        cross, both = moments.C, moments.G + moments.C
        factor = moments.inverse_factor(self.damping, self.order)
        key = (self.damping, self.order)
        first = moments.remember(("causal_rows", *key), lambda: causal_rows(cross, factor))
        second = moments.remember(("causal_rows_of_drift", *key), lambda: causal_rows(both, factor))
        ones = torch.ones(len(weight), dtype=weight.dtype, device=weight.device)
        residuals = (
            Residual(first, self.residual_strength * ones),
            Residual(second, self.drift_strength * ones, "drift"),
        )
        qtensor = round_columns(weight, factor, problem.qparams(), problem.spec, residuals)
        return Solution(qtensor, {"damping": factor.damping, "dead_columns": factor.dead_columns})
