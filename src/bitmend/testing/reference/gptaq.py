"""Rounding that also repairs what reached the site: GPTAQ, ResComp and the shifted target, column by column.

All columns are spoken of in the rounding order; `C` has both axes in that order. Row `q` of the residual map is

    P_q,: = C_{q, q+1:} (H_{q+1:, q+1:})^-1,     zero up to and including q,

and while column `q` is rounded the later columns get, on top of the optimal-brain update,

    GPTAQ     strength * w_q P_q,:                                    w_q as it is just before it is rounded
    ResComp   strength * w_q P_q,: + second * (w0_q - w_q) P2_q,:     P2 built from G + C; w0 the weight at the start

The shifted target rounds `W + strength * W C H^-1` and adds nothing.

A worked example, that of `obq` with `C = ((0, -0.4), (0, 0))`: `P_01 = -0.4 / 2 = -0.2`. At strength 1, column 1 is
`0.4 + 0.2 - 1.4 * 0.2 = 0.32` and rounds to 0; at strength 0.25 it is 0.53 and rounds to 1. Column 1 first: the only
entry of `C` now points to a column already rounded, `P = 0`, and the codes are those without it, `(2, 0)`.
Shifted: `C H^-1 = ((2/15, -4/15), (0, 0))`, so the target is `(1.4 + 1.4 * 2/15, 0.4 - 1.4 * 4/15) = (1.5867, 0.0267)`;
column 0 goes to 2, column 1 becomes `0.0267 - 0.4133 / 2 = -0.18` and rounds to 0.
"""

import numpy as np
from jaxtyping import Float, Int

from bitmend.testing.reference.obq import nearest_codes, obq_fixed_order


def residual_rows(
    H: Float[np.ndarray, "in in"], cross: Float[np.ndarray, "in in"], order: Int[np.ndarray, " in"]
) -> Float[np.ndarray, "in in"]:
    """Return the residual map in the rounding order, one linear solve a row.

    Args:
        H: damped second moment, in the columns' own order.
        cross: `C` for GPTAQ, `G + C` for the second term of ResComp, in the columns' own order.
        order: `order[k]` is the column rounded k-th.
    """
    H = H.astype(np.float64)[np.ix_(order, order)]
    cross = cross.astype(np.float64)[np.ix_(order, order)]
    P = np.zeros_like(H)
    for q in range(len(order) - 1):
        P[q, q + 1 :] = cross[q, q + 1 :] @ np.linalg.inv(H[q + 1 :, q + 1 :])
    return P


def gptaq_fixed_order(
    W: Float[np.ndarray, "out in"],
    H: Float[np.ndarray, "in in"],
    C: Float[np.ndarray, "in in"],
    strength: float | Float[np.ndarray, " out"],
    scale: Float[np.ndarray, "out groups"],
    zero_point: Float[np.ndarray, "out groups"] | None,
    group_of_column: Int[np.ndarray, " in"],
    min_code: int,
    max_code: int,
    order: Int[np.ndarray, " in"],
) -> Int[np.ndarray, "out in"]:
    """Return the codes of GPTAQ, columns in their own order; arguments as in `obq_fixed_order`.

    Args:
        W: weight.
        H: damped second moment of the quantised stream's inputs.
        C: mean of `(x_fp - x_q) x_q^T`.
        strength: factor of the residual term, one number or one a row of the weight.
        scale: distance of two levels.
        zero_point: code of the level 0, or None for 0.
        group_of_column: index of the scale of each column.
        min_code: smallest code.
        max_code: largest code.
        order: `order[k]` is the column rounded k-th.
    """
    P = residual_rows(H, C, order)
    return _sweep(W, H, P, strength, None, 0.0, scale, zero_point, group_of_column, min_code, max_code, order)


def rescomp_fixed_order(
    W: Float[np.ndarray, "out in"],
    H: Float[np.ndarray, "in in"],
    G: Float[np.ndarray, "in in"],
    C: Float[np.ndarray, "in in"],
    strength: float | Float[np.ndarray, " out"],
    second_strength: float | Float[np.ndarray, " out"],
    scale: Float[np.ndarray, "out groups"],
    zero_point: Float[np.ndarray, "out groups"] | None,
    group_of_column: Int[np.ndarray, " in"],
    min_code: int,
    max_code: int,
    order: Int[np.ndarray, " in"],
) -> Int[np.ndarray, "out in"]:
    """Return the codes of ResComp, columns in their own order; arguments as in `gptaq_fixed_order`.

    Args:
        W: weight.
        H: damped second moment of the quantised stream's inputs.
        G: the same without damping; `G + C` is the cross moment of the two streams.
        C: mean of `(x_fp - x_q) x_q^T`.
        strength: factor of the residual of the inputs.
        second_strength: factor of the pull towards the weight at the start.
        scale: distance of two levels.
        zero_point: code of the level 0, or None for 0.
        group_of_column: index of the scale of each column.
        min_code: smallest code.
        max_code: largest code.
        order: `order[k]` is the column rounded k-th.
    """
    P = residual_rows(H, C, order)
    P2 = residual_rows(H, G + C, order)
    return _sweep(W, H, P, strength, P2, second_strength, scale, zero_point, group_of_column, min_code, max_code, order)


def shifted_target(
    W: Float[np.ndarray, "out in"],
    H: Float[np.ndarray, "in in"],
    C: Float[np.ndarray, "in in"],
    strength: float | Float[np.ndarray, " out"],
) -> Float[np.ndarray, "out in"]:
    """Return `W + strength * W C H^-1`; at strength 1 without damping the least-squares weight for `x_q -> W x_fp`."""
    W = W.astype(np.float64)
    shift = W @ C.astype(np.float64) @ np.linalg.inv(H.astype(np.float64))
    return W + _per_row(strength, len(W))[:, None] * shift


def target_shift_fixed_order(
    W: Float[np.ndarray, "out in"],
    H: Float[np.ndarray, "in in"],
    C: Float[np.ndarray, "in in"],
    strength: float | Float[np.ndarray, " out"],
    scale: Float[np.ndarray, "out groups"],
    zero_point: Float[np.ndarray, "out groups"] | None,
    group_of_column: Int[np.ndarray, " in"],
    min_code: int,
    max_code: int,
    order: Int[np.ndarray, " in"],
) -> Int[np.ndarray, "out in"]:
    """Return the codes of optimal brain quantisation of the shifted target; arguments as in `gptaq_fixed_order`."""
    target = shifted_target(W, H, C, strength)
    return obq_fixed_order(target, H, scale, zero_point, group_of_column, min_code, max_code, order)


def _per_row(strength: float | np.ndarray, num_rows: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(strength, dtype=np.float64), (num_rows,))


def _sweep(
    W: np.ndarray,
    H: np.ndarray,
    P: np.ndarray,
    strength: float | np.ndarray,
    P2: np.ndarray | None,
    second_strength: float | np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None,
    group_of_column: np.ndarray,
    min_code: int,
    max_code: int,
    order: np.ndarray,
) -> np.ndarray:
    """Round in `order`; the optimal-brain update is solved anew for each column instead of downdated.

    With column k fixed, the best answer of the later ones to its change `c` is `-c H_{k, k+1:} (H_{k+1:, k+1:})^-1`.
    """
    start = W.astype(np.float64)[:, order]
    current = start.copy()
    H = H.astype(np.float64)[np.ix_(order, order)]
    zeros = np.zeros_like(scale) if zero_point is None else zero_point
    first, second = _per_row(strength, len(W)), _per_row(second_strength, len(W))
    codes = np.zeros(W.shape, dtype=np.int64)
    for k, q in enumerate(order):
        s, z = scale[:, group_of_column[q]].astype(np.float64), zeros[:, group_of_column[q]].astype(np.float64)
        w = current[:, k].copy()
        codes[:, q] = nearest_codes(w, s, z, min_code, max_code)
        change = (codes[:, q] - z) * s - w
        later = slice(k + 1, None)
        if k + 1 < len(order):
            current[:, later] -= np.outer(change, H[k, later] @ np.linalg.inv(H[later, later]))
        current[:, later] += np.outer(first * w, P[k, later])
        if P2 is not None:
            current[:, later] += np.outer(second * (start[:, k] - w), P2[k, later])
    return codes
