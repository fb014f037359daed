"""Round to nearest: every entry by itself, no data.

The base that every other solver has to beat at the same bits. Cost: one pass over the matrix after the scales are chosen.
"""

from dataclasses import dataclass
from typing import ClassVar

from bitmend.linalg.solver_cost import SolverCost
from bitmend.numerics.qtensor import quantize
from bitmend.protocols import SOLVERS, Need, Problem, Solution


@SOLVERS.register("rtn")
@dataclass(frozen=True)
class Rtn:
    """Round every weight to its nearest level; needs no calibration data.

    Example: the row (0.9, -0.4, 0.1) on the symmetric 2-bit min-max grid has scale 0.9 / 1.5 = 0.6, hence steps
    (1.5, -0.67, 0.17), codes (1, -1, 0) and values (0.6, -0.6, 0).
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    def cost(self) -> SolverCost:
        """Return what the forecast counts: nothing but the rounding that every proof takes."""
        return SolverCost()

    def solve(self, problem: Problem) -> Solution:
        """Return the nearest codes."""
        qparams = problem.qparams()
        return Solution(quantize(problem.weight, qparams, problem.spec))
