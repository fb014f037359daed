"""The inverse of a Cholesky factor in float64 by the faster of two LAPACKs, in the memory of the matrix itself.

torch's CPU builds bring MKL, which takes twice as long for this on an AMD core as the OpenBLAS that scipy brings (width
2,816, one thread: 0.9 s against 0.5 s). So scipy's is used where `numerics.products` finds such a CPU, with as many threads
as torch has for wide matrices and one for others: its threads go on spinning for a while after a call, on the cores that
torch's need by then. Anywhere else it is torch's. What comes out depends on the kind of CPU, on torch's threads and on
scipy's version, all of which a run's fingerprint holds.
"""

from functools import cache

import torch
from jaxtyping import Float
from scipy.linalg import lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

from bitmend.numerics.products import onednn_is_slower

WIDE = 2048  # from this width on, more than one thread pays for what its spinning costs afterwards
LEAF, PIECE = 64, 512  # of a triangular inverse: smallest square, and columns of a corner that are computed at once


def inverse_cholesky_(H: Float[Tensor, "in in"]) -> Float[Tensor, "in in"] | None:
    """Return L^-1 with H = L L^T, L lower triangular, or None where H is not positive definite.

    Args:
        H: symmetric, float64, contiguous. Its memory is used up: the answer may lie in it.

    Cost: 2/3 in^3 operations; in OpenBLAS no memory but H's, else in^2 float64 more.
    """
    if H.device.type == "cpu" and not onednn_is_slower():
        return _by_scipy_(H)
    L, info = torch.linalg.cholesky_ex(H)
    return _inverse_of_lower_(L) if int(info) == 0 else None


def _by_scipy_(H: Float[Tensor, "in in"]) -> Float[Tensor, "in in"] | None:
    """As `inverse_cholesky_`. Fortran's upper triangle is the lower one of the same memory read row by row."""
    with _blas().limit(limits=torch.get_num_threads() if len(H) >= WIDE else 1):
        factor, failed = lapack.dpotrf(H.numpy().T, lower=0, clean=1, overwrite_a=1)
        if failed:
            return None
        inverse, failed = lapack.dtrtri(factor, lower=0, overwrite_c=1)
    return None if failed else torch.from_numpy(inverse.T)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _inverse_of_lower_(L: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    """Invert a lower triangular matrix in its own memory, by halves: all but the smallest pieces are matrix products."""
    size = len(L)
    if size <= LEAF:
        identity = torch.eye(size, dtype=L.dtype, device=L.device)
        return L.copy_(torch.linalg.solve_triangular(L, identity, upper=False))
    half = size // 2
    first, second = _inverse_of_lower_(L[:half, :half]), _inverse_of_lower_(L[half:, half:])
    # The lower left corner in pieces, so that no second matrix of that size is needed.
    corner = L[half:, :half]
    for columns in range(0, half, PIECE):
        some = slice(columns, min(columns + PIECE, half))
        corner[:, some] = -(second @ (corner[:, some.start :] @ first[some.start :, some]))
    return L


def reverse_(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Reverse the order of rows and of columns in a matrix's own memory."""
    size = len(matrix)
    for start in range(0, size // 2, PIECE):
        stop = min(start + PIECE, size // 2)
        upper, lower = matrix[start:stop], matrix[size - stop : size - start]
        kept = upper.flip(0, 1)
        upper.copy_(lower.flip(0, 1))
        lower.copy_(kept)
    if size % 2:
        middle = matrix[size // 2]
        middle.copy_(middle.flip(0))
    return matrix
