"""ERQ's two steps: fold what rounding does to a layer's input into its weight, then round half of the rest at a time.

Source: ERQ (ICML 2024; TPAMI 2025). Symbols: W (out, in); x the input as the quantised layer reads it, x + dx in the
full-precision network; G = mean x x^T, C = mean dx x^T, H = G + damping mean(diag G) I.

1. Activation error (Aqer): the weight whose product with x is nearest to W (x + dx) in ridge regression, W + W C H^-1. It is
   the whole target shift, which `rescomp` and `marr` take a part of.
2. Weight error (Wqer): half of the columns still open, S, is rounded to nearest; the others, R, take over what that did:
   W_R -= E_S G_SR (G_RR + damping mean(diag G) I)^-1, E_S = Q_S - W_S; then half of R is rounded, and so on.

It adds nothing to the model, and repairs with its weights what QwT repairs with weights beside them.

How we differ: no flipping of single roundings within a half before it is handed on; damping relative to the mean diagonal,
where the public code adds an absolute number; float64. `activations` must be rounded while moments are taken, as they are.

Cost: 4/3 in^3 operations for the first step, and about in^3 for all halves together, in float64, shared by sites with the
same input; 3 out in^2 multiply-adds a matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitmend.linalg.cholesky import Damping, InverseFactor
from bitmend.linalg.column_sweep import UniformRounder
from bitmend.linalg.moments import Moments
from bitmend.linalg.residual import target_shift
from bitmend.linalg.solver_cost import ONE_SWEEP, SolverCost
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import QTensor
from bitmend.protocols import SOLVERS, Need, Problem, Solution


@SOLVERS.register("erq", paper="ERQ, ICML 2024")
@dataclass(frozen=True)
class Erq:
    """Ridge regression onto the full-precision output, then rounding by halves.

    Example: W = (0.5, 0.5), levels {-1, 0, 1}, G = ((1, 0.9), (0.9, 1)), C = 0, no damping. The first column is rounded to 0;
    the second takes over -(0 - 0.5) 0.9 = 0.45, and 0.95 is rounded to 1: (0, 1), as by GPTQ, which halves of one are.

    Attributes:
        damping: added to the diagonal of G, as a fraction of its mean; dimensionless, > 0.
        strength: of the first step: 0 leaves it out, 1 is the regression.
        order: "diagonal" takes columns by decreasing mean square of their input, "natural" from left to right.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT, Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT})
    damping: Damping = 0.01
    strength: float = 1.0
    order: Literal["natural", "diagonal"] = "diagonal"

    def cost(self) -> SolverCost:
        """Return what the forecast counts: a factor, the halves (as two more), and products of the matrix in float64."""
        return replace(ONE_SWEEP, factors=3, double_products=3, double_matrices=2, searches=2)

    def solve(self, problem: Problem) -> Solution:
        """Return the rounded matrix; its scales are those of the regressed weight.

        Raises:
            FactorizationError: the moments stay indefinite after the damping ladder.
        """
        moments = problem.fit
        if moments is None or moments.C is None:
            raise ValueError("erq needs the moments G and C of its input")
        factor = moments.inverse_factor(self.damping, self.order)
        weight = problem.weight.double()
        if self.strength:
            weight = weight + self.strength * target_shift(problem.weight, moments, factor)
        qparams = choose_qparams(weight.float(), problem.spec)
        rows, columns = problem.weight.shape
        rounder = UniformRounder(qparams, problem.spec, (rows, columns), problem.weight.dtype)
        for half, rest, step in _steps(moments, factor):
            error = torch.zeros(len(weight), len(half), dtype=torch.float64, device=weight.device)
            for place, column in enumerate(half.tolist()):
                error[:, place] = (
                    rounder.round(column, weight[:, column].to(problem.weight.dtype)).double() - weight[:, column]
                )
            if len(rest):
                weight[:, rest] -= error @ step
        qtensor = QTensor(rounder.codes(), qparams, problem.spec)
        return Solution(qtensor, {"damping": factor.damping, "dead_columns": factor.dead_columns})


def _steps(
    moments: Moments, factor: InverseFactor
) -> Iterator[tuple[Int[Tensor, " half"], Int[Tensor, " rest"], Float[Tensor, "half rest"]]]:
    """Yield the columns that are rounded together, those still open, and what the latter take over of each error."""
    key = ("halves", factor.damping, id(factor))
    _, steps = moments.remember(key, lambda: (factor, list(_make_steps(moments.G, factor))))
    yield from steps


def _make_steps(
    G: Float[Tensor, "in in"], factor: InverseFactor
) -> Iterator[tuple[Int[Tensor, " half"], Int[Tensor, " rest"], Float[Tensor, "half rest"]]]:
    H, left = factor.damped(G), factor.order
    while len(left):
        count = (len(left) + 1) // 2
        half, rest = left[:count], left[count:]
        step = torch.zeros(count, 0, dtype=torch.float64, device=G.device)
        if len(rest):
            step = torch.linalg.solve(H[rest][:, rest], H[rest][:, half]).T
        yield half, rest, step
        left = rest
