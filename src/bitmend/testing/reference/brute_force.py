"""The objective of weight rounding, straight from tokens and from moments, and its exact minimum by trying everything.

Objective of one site, `W` the full-precision and `Q` the rounded weight, averaged over tokens and summed over outputs:

    mean || Q x_q - W x_fp ||^2  =  tr(E G E^T) - 2 tr(E C^T W^T) + tr(W D W^T),      E = Q - W.

Where both streams are the same (`C = D = 0`) only the first term is left.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from jaxtyping import Float


def direct_objective(
    W: Float[np.ndarray, "out in"],
    Q: Float[np.ndarray, "out in"],
    X_q: Float[np.ndarray, "tokens in"],
    X_fp: Float[np.ndarray, "tokens in"],
) -> float:
    """Return the squared output error per token, summed over outputs, from the tokens themselves."""
    total = 0.0
    for x_q, x_fp in zip(X_q.astype(np.float64), X_fp.astype(np.float64), strict=True):
        error = Q.astype(np.float64) @ x_q - W.astype(np.float64) @ x_fp
        total += float(error @ error)
    return total / len(X_q)


def moments(
    X_q: Float[np.ndarray, "tokens in"], X_fp: Float[np.ndarray, "tokens in"]
) -> tuple[Float[np.ndarray, "in in"], Float[np.ndarray, "in in"], Float[np.ndarray, "in in"]]:
    """Return `(G, C, D)`, the token means of `x_q x_q^T`, `d x_q^T` and `d d^T` with `d = x_fp - x_q`."""
    width = X_q.shape[1]
    G, C, D = np.zeros((width, width)), np.zeros((width, width)), np.zeros((width, width))
    for x_q, x_fp in zip(X_q.astype(np.float64), X_fp.astype(np.float64), strict=True):
        d = x_fp - x_q
        G += np.outer(x_q, x_q)
        C += np.outer(d, x_q)
        D += np.outer(d, d)
    return G / len(X_q), C / len(X_q), D / len(X_q)


def moments_objective(
    W: Float[np.ndarray, "out in"],
    Q: Float[np.ndarray, "out in"],
    G: Float[np.ndarray, "in in"],
    C: Float[np.ndarray, "in in"],
    D: Float[np.ndarray, "in in"],
) -> float:
    """Return the same number as `direct_objective`, from the moments."""
    E = Q - W
    return float(np.trace(E @ G @ E.T) - 2 * np.trace(E @ C.T @ W.T) + np.trace(W @ D @ W.T))


def best_codes(
    weight_row: Float[np.ndarray, " in"],
    G: Float[np.ndarray, "in in"],
    levels_per_column: Sequence[Float[np.ndarray, " levels"] | Sequence[float]],
) -> tuple[Float[np.ndarray, " in"], float]:
    """Return the levels `q` that minimise `(q - w) G (q - w)^T` and the minimum, by trying every combination.

    Cost: the product of the numbers of levels, so 4 levels in 6 columns are 4096 trials.

    Args:
        weight_row: one row of the weight.
        G: second moment of the inputs.
        levels_per_column: for each column the values that it may take (values, not codes).
    """
    none = np.zeros_like(G)
    return best_codes_asymmetric(weight_row, G, none, none, levels_per_column)


def best_codes_asymmetric(
    weight_row: Float[np.ndarray, " in"],
    G: Float[np.ndarray, "in in"],
    C: Float[np.ndarray, "in in"],
    D: Float[np.ndarray, "in in"],
    levels_per_column: Sequence[Float[np.ndarray, " levels"] | Sequence[float]],
) -> tuple[Float[np.ndarray, " in"], float]:
    """Return the levels that minimise the objective with two different streams, and the minimum.

    Rows do not interact, so the best matrix is the best of each row. The first of several equal minima wins.
    """
    w = weight_row.astype(np.float64)
    if len(levels_per_column) != len(w):
        raise ValueError(f"levels_per_column must have one entry a column: {len(w)}, not {len(levels_per_column)}")
    best, least = w, np.inf
    for levels in product(*levels_per_column):
        q = np.array(levels, dtype=np.float64)
        value = moments_objective(w[None, :], q[None, :], G, C, D)
        if value < least:
            best, least = q, value
    return best, least
