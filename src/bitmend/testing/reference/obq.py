"""Optimal brain quantisation in a fixed column order: explicit inverse, one rank-1 downdate a column.

To round column `q` of the remaining columns, with `R = H^-1` over the remaining ones:

    delta w   = (quant(w_q) - w_q) / R_qq * R_q,:          the best answer of the others to this change
    R        <- R - R_:,q R_q,: / R_qq                     the inverse of H without column q

A worked example, one row: `w = (1.4, 0.4)`, `H = ((2, 1), (1, 2))`, levels the whole numbers, column 0 first.
`R = ((2, -1), (-1, 2)) / 3`. Column 0 goes from 1.4 to 1, so `delta w = -0.4 / (2/3) * (2/3, -1/3) = (-0.4, +0.2)`
and column 1 becomes 0.6, which rounds to 1. `R_11` becomes `2/3 - (1/9)/(2/3) = 1/2 = 1/H_11`. The result `(1, 1)` has
the objective `2 * 0.16 - 2 * 0.24 + 2 * 0.36 = 0.56`; plain rounding, `(1, 0)`, has 0.96.
Column 1 first: 0.4 goes to 0, column 0 becomes 1.6 and rounds to 2; `(2, 0)` has 0.56 as well.
"""

import numpy as np
from jaxtyping import Float, Int


def nearest_codes(
    values: Float[np.ndarray, " out"],
    scale: Float[np.ndarray, " out"],
    zero_point: Float[np.ndarray, " out"],
    min_code: int,
    max_code: int,
) -> Int[np.ndarray, " out"]:
    """Return `clip(rint(value / scale) + zero_point)`; halves go to the even step, a scale 0 is read as 1."""
    steps = np.rint(values / np.where(scale == 0, 1.0, scale))
    return np.clip(steps + zero_point, min_code, max_code).astype(np.int64)


def levels_of(
    codes: Int[np.ndarray, "out in"],
    scale: Float[np.ndarray, "out groups"],
    zero_point: Float[np.ndarray, "out groups"] | None,
    group_of_column: Int[np.ndarray, " in"],
) -> Float[np.ndarray, "out in"]:
    """Return `(code - zero_point) * scale`, each column with the scale of its group."""
    zeros = np.zeros_like(scale) if zero_point is None else zero_point
    values = np.empty(codes.shape, dtype=np.float64)
    for j, g in enumerate(group_of_column):
        values[:, j] = (codes[:, j] - zeros[:, g]) * scale[:, g]
    return values


def obq_fixed_order(
    W: Float[np.ndarray, "out in"],
    H: Float[np.ndarray, "in in"],
    scale: Float[np.ndarray, "out groups"],
    zero_point: Float[np.ndarray, "out groups"] | None,
    group_of_column: Int[np.ndarray, " in"],
    min_code: int,
    max_code: int,
    order: Int[np.ndarray, " in"],
) -> Int[np.ndarray, "out in"]:
    """Return the codes, columns in their own (not the rounding) order.

    The one-bit grid without a zero is not covered.

    Args:
        W: weight.
        H: damped second moment of the inputs, positive definite.
        scale: distance of two levels.
        zero_point: code of the level 0, or None for 0.
        group_of_column: index of the scale of each column.
        min_code: smallest code.
        max_code: largest code.
        order: `order[k]` is the column rounded k-th.
    """
    current = W.astype(np.float64).copy()
    R = np.linalg.inv(H.astype(np.float64))
    zeros = np.zeros_like(scale) if zero_point is None else zero_point
    codes = np.zeros(W.shape, dtype=np.int64)
    for q in order:
        s, z = scale[:, group_of_column[q]].astype(np.float64), zeros[:, group_of_column[q]].astype(np.float64)
        codes[:, q] = nearest_codes(current[:, q], s, z, min_code, max_code)
        change = (codes[:, q] - z) * s - current[:, q]
        current += np.outer(change / R[q, q], R[q])
        R = R - np.outer(R[:, q], R[q]) / R[q, q]
        R[q, :] = 0.0
        R[:, q] = 0.0
    return codes
