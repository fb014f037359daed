"""What a solver of one matrix says of its own cost, for the forecast of a run.

Everything is counted in units of the matrix (out, in) or of its moments (in, in), so that it holds on every machine. A solver
has a method `cost(self) -> SolverCost` where the default, one sweep as by GPTQ, would be wrong; it may be left out.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class SolverCost:
    """The work of one call of `solve`, and what it holds beside the moments.

    Attributes:
        factors: factorisations of an (in, in) moment; shared by the sites of a group.
        squares: (in, in) float64 matrices that are kept beside the moments, factors counted; shared likewise.
        wide_squares: of these, how many are made only where a site has at least half as many rows as columns.
        square_products: float64 products of two (in, in) matrices; two with a triangular one count as one; shared likewise.
        sweeps: passes over all columns, however many copies of the matrix each takes along.
        copies: copies of the matrix in all sweeps together.
        stacked: copies in one sweep, at most.
        stacked_entries: of a sweep, at most, for solvers that work on some rows at a time; None for all rows at once.
        residual_terms: of each sweep.
        searches: for scales, of the whole matrix, beside the one on the weight itself, which the proof needs anyway.
        products: (out, in) x (in, in) in float32.
        double_products: the same in float64.
        double_matrices: (out, in) float64 matrices that are held at once.
        again: the cost of fitting once more, on all rows, what was accepted; None when that is the same again.
    """

    factors: int = 0
    squares: int = 0
    wide_squares: int = 0
    square_products: int = 0
    sweeps: int = 0
    copies: int = 0
    stacked: int = 0
    stacked_entries: int | None = None
    residual_terms: int = 0
    searches: int = 0
    products: int = 0
    double_products: int = 0
    double_matrices: int = 0
    again: "SolverCost | None" = None


# GPTQ, which is also what is assumed of a solver that asks for moments and says nothing of its cost.
ONE_SWEEP = SolverCost(factors=1, squares=1, sweeps=1, copies=1, stacked=1)
