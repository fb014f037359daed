"""GPTAQ: GPTQ that also repairs, column by column, what earlier layers left behind.

Source: Li et al. 2025, arXiv:2504.02692, equations 9 and 13-17. Symbols: x, x~ inputs of the quantised and the
full-precision network, dx = x~ - x, G = mean x x^T, C = mean dx x^T, H = G + damping mean(diag G) I, H^-1 = U^T U,
P = triu(C U^T, 1) U. Column q hands w_q P_q to the columns after it, on top of its rounding error.

The paper's equations have the strength 1; the public code multiplies P by 0.25, which its authors call an empirical choice.
So `residual_strength` is a field, 0.25 unless set; 0 is exactly GPTQ.

How we differ from the public code: see `linalg.column_sweep` (`compat="reference"` reproduces its blocks of 128 columns);
damping is added once, not once more for each matrix that shares its moments; dead inputs keep their weights; the
full-precision stream is free of every quantiser. Grids are fixed before the sweep, on the original weight.

Cost: GPTQ's, 4/3 in^3 more for P (shared), and another out in^2 / 2 multiply-adds.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from bitmend.linalg.cholesky import Damping
from bitmend.linalg.column_sweep import Residual, round_columns
from bitmend.linalg.residual import causal_rows
from bitmend.linalg.solver_cost import ONE_SWEEP, SolverCost
from bitmend.protocols import SOLVERS, Need, Problem, Solution

REFERENCE_BLOCK = 128


@SOLVERS.register("gptaq", paper="arXiv:2504.02692")
@dataclass(frozen=True)
class Gptaq:
    """GPTQ against the full-precision network's output, the residual believed at one fixed strength.

    Attributes:
        residual_strength: how much of the residual is repaired; 0 is GPTQ, 1 the paper's equation.
        damping: added to the diagonal of G, as a fraction of its mean; dimensionless, > 0.
        order: "diagonal" rounds columns by decreasing mean square of their input, "natural" from left to right.
        compat: "exact" is block-size invariant; "reference" takes rounded columns as the source of the residual across
            blocks of 128 columns, as the public code does.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT})
    residual_strength: float = 0.25
    damping: Damping = 0.01
    order: Literal["natural", "diagonal"] = "diagonal"
    compat: Literal["exact", "reference"] = "exact"

    def cost(self) -> SolverCost:
        """Return what the forecast counts: GPTQ's work, P of two triangular products, and a residual term."""
        return replace(ONE_SWEEP, squares=2, square_products=1, residual_terms=1)

    def solve(self, problem: Problem) -> Solution:
        """Return the rounded matrix.

        Raises:
            FactorizationError: the moments stay indefinite after the damping ladder.
        """
        moments, weight = problem.fit, problem.weight
        if moments is None or moments.C is None:
            raise ValueError("gptaq needs the moments G and C of its input")
        cross, factor = moments.C, moments.inverse_factor(self.damping, self.order)
        P = moments.remember(("causal_rows", self.damping, self.order), lambda: causal_rows(cross, factor))
        strength = torch.full((len(weight),), self.residual_strength, dtype=weight.dtype, device=weight.device)
        qtensor = round_columns(
            weight,
            factor,
            problem.qparams(),
            problem.spec,
            (Residual(P, strength),),
            lazy_block=REFERENCE_BLOCK if self.compat == "reference" else None,
        )
        diagnostics = {"damping": factor.damping, "dead_columns": factor.dead_columns}
        return Solution(qtensor, {**diagnostics, "residual_strength": self.residual_strength})
