"""The triangular factor that column-by-column rounding needs: H^-1 = U^T U with U upper triangular, H = G + lambda I.

With the order of columns reversed, H = L L^T (one Cholesky factorisation), and U is L^-1 with its rows and columns reversed:
no inverse of H is ever formed. Row j of U / U_jj is how the columns after j best take over an error made at column j;
1 / U_jj^2 is what that error costs when they do.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from bitmend.errors import FactorizationError
from bitmend.linalg.lapack import inverse_cholesky_, reverse_

# A fraction of the mean diagonal. Checked where a recipe is read, so that a slip is told before anything runs.
Damping = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
COPIED_ROWS = 256
DAMPING_LADDER = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class InverseFactor:
    """A factor of the damped inverse, with the column order it belongs to.

    Attributes:
        U: upper triangular, rows and columns in `order`, float64.
        order: `order[k]` is the column that is rounded as the k-th.
        damping: the fraction of the mean diagonal that was added in the end.
        requested_damping: the fraction that was asked for; smaller when the first try failed.
        dead_columns: how many inputs were zero on every token.
    """

    U: Float[Tensor, "in in"]
    order: Int[Tensor, " in"]
    damping: float
    requested_damping: float
    dead_columns: int

    def damped(self, G: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
        """Return H = G + damping mean(diag G) I, whose inverse this is the factor of; G in the matrix's own order."""
        return G + self.added(G) * torch.eye(len(G), dtype=G.dtype, device=G.device)

    def added(self, G: Float[Tensor, "in in"]) -> Tensor:
        """Return what was added to the diagonal of G."""
        return self.damping * _mean_diagonal(G)


def _mean_diagonal(G: Float[Tensor, "in in"]) -> Tensor:
    mean = G.diagonal().mean()
    # Every input is zero, or the matrix is no moment at all: the ladder will tell.
    return mean if mean > 0 else torch.ones_like(mean)


def column_order(G: Float[Tensor, "in in"], order: str) -> Int[Tensor, " in"]:
    """Return the columns in the order in which they are rounded: natural, or by decreasing diagonal of G."""
    diagonal = G.diagonal()
    if order == "natural":
        return torch.arange(len(diagonal), device=G.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def _in_order(G: Float[Tensor, "in in"], order: Int[Tensor, " in"]) -> Float[Tensor, "in in"]:
    """Return a copy in float64 with rows and columns in another order, some rows at a time: beside it, little memory."""
    result = torch.empty_like(G, dtype=torch.float64)
    for rows, into in zip(torch.split(order, COPIED_ROWS), torch.split(result, COPIED_ROWS), strict=True):
        into.copy_(G.index_select(0, rows).gather(1, order.expand(len(rows), -1)))
    return result


def factor_inverse(G: Float[Tensor, "in in"], damping: float, order: str) -> InverseFactor:
    """Factor (G + damping * mean(diag G) * I)^-1 in float64, raising the damping where that fails.

    A dead column needs no special care: its row of H is the damping alone, so it is rounded to nearest by itself.

    Args:
        G: symmetric second moment.
        damping: fraction of the mean diagonal, > 0 (0 is allowed when G itself is positive definite).
        order: "natural" or "diagonal".

    Raises:
        FactorizationError: G stays indefinite after the whole ladder, or is not finite.

    Cost: 2/3 in^3 operations; beside G, in^2 float64 at the peak where scipy's LAPACK does it, else twice that.
    """
    if not bool(torch.isfinite(G.sum())):  # one pass: a sum of finite float64 of this kind does not overflow
        raise FactorizationError("the second moment of the inputs must be finite, but it holds NaN or Inf")
    permutation = column_order(G, order)
    backwards = permutation.flip(0)
    mean = _mean_diagonal(G.double())
    dead = int((G.diagonal() == 0).sum())
    steps = [damping, *(step for step in DAMPING_LADDER if step > damping)]
    for step in steps:
        damped = _in_order(G, backwards)
        damped.diagonal().add_(step * mean)
        inverse = inverse_cholesky_(damped)
        del damped
        if inverse is not None:
            return InverseFactor(reverse_(inverse), permutation, step, damping, dead)
    H = G.double()
    smallest = float(torch.linalg.eigvalsh(H)[0] / mean)
    raise FactorizationError(
        f"the second moment of the inputs must be positive definite, but stays indefinite with damping up to {steps[-1]} "
        f"(smallest eigenvalue {smallest:.2e} of the mean diagonal); calibrate on more rows or raise solver.damping"
    )
