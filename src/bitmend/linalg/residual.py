"""What the difference of the two streams asks of a weight matrix.

With r = W dx the error that earlier layers left in this layer's output, two ways to answer it from the moments:

- all at once (target shift): the weight that fits the full-precision output best on the quantised inputs is
  W + W C H^-1, so `B = W C H^-1` is the whole correction;
- causally (GPTAQ, arXiv:2504.02692, eq. 16-17): when column q is rounded, only its own share w_q dx_q is handed to the
  columns after it. `P = triu(C U^T, 1) U` holds in row q what each later column takes over per unit of w_q.

C is the cross moment mean dx x^T; U the upper factor of the damped inverse, H^-1 = U^T U. Everything in float64.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bitmend.linalg.cholesky import InverseFactor
from bitmend.linalg.moments import Moments

PANEL = 256  # rows or columns of a triangular product that are computed at once


def causal_rows(cross: Float[Tensor, "in in"], factor: InverseFactor) -> Float[Tensor, "in in"]:
    """Return P = triu(C U^T, 1) U, rows and columns in rounding order.

    Args:
        cross: C (or G + C for the second term of ResComp), in the matrix's own column order.
        factor: of the damped inverse.

    Cost: 4/3 in^3 operations: both products leave out what is known to be zero.
    """
    rows = cross[factor.order][:, factor.order]
    for start in range(0, len(rows), PANEL):
        panel, U = rows[start : start + PANEL], factor.U[start:, start:]
        panel[:, start:] = torch.triu(panel[:, start:] @ U.T, 1) @ U
        panel[:, :start] = 0
    return rows


def target_shift(weight: Float[Tensor, "out in"], moments: Moments, factor: InverseFactor) -> Float[Tensor, "out in"]:
    """Return B = W C H^-1, in the matrix's own column order, float64.

    Cost: 4 out in^2 operations; for more than half as many rows as columns 2 out in^2, after 2 in^3 once for all sites
    that share the moments.
    """
    if moments.C is None:
        raise ValueError("a target shift needs the cross moment C")
    cross = moments.C
    if 2 * len(weight) < len(cross):
        return _times_inverse(weight.double() @ cross, factor)
    # The factor is kept beside the result, so that its id cannot become another's.
    _, rows = moments.remember(("shift_rows", id(factor)), lambda: (factor, _times_inverse(cross, factor)))
    return weight.double() @ rows


def _times_inverse(values: Float[Tensor, "rows in"], factor: InverseFactor) -> Float[Tensor, "rows in"]:
    """Return `values` H^-1; both products leave out what is known to be zero."""
    ordered, columns = values[:, factor.order], len(factor.U)
    for start in range(0, columns, PANEL):
        stop = min(start + PANEL, columns)
        ordered[:, start:stop] = ordered[:, start:] @ factor.U[start:stop, start:].T
    for start in reversed(range(0, columns, PANEL)):
        stop = min(start + PANEL, columns)
        ordered[:, start:stop] = ordered[:, :stop] @ factor.U[:stop, start:stop]
    product = torch.empty_like(values)
    product[:, factor.order] = ordered
    return product
