"""ERQ written out in numpy from the two problems it solves: a ridge regression, then halves, each by least squares.

Independent of `solvers/erq.py`: normal equations by explicit inverses, one output row after the other.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray


def erq_fixed_order(
    weight: Float[ndarray, "out in"],
    G: Float[ndarray, "in in"],
    C: Float[ndarray, "in in"],
    damping: float,
    strength: float,
    order: Int[ndarray, " in"],
) -> tuple[Float[ndarray, "out in"], list[tuple[Int[ndarray, " half"], Int[ndarray, " rest"]]]]:
    """Return the regressed weight, and which columns are rounded together, with those that take over their error.

    Args:
        weight: W.
        G: mean x x^T.
        C: mean dx x^T.
        damping: fraction of the mean diagonal.
        strength: of the regression.
        order: in which columns are taken.
    """
    ridge = damping * np.mean(np.diag(G)) * np.eye(len(G))
    regressed = np.stack([row + strength * np.linalg.inv(G + ridge).T @ (row @ C) for row in weight])
    halves, left = [], list(order)
    while left:
        count = -(-len(left) // 2)
        halves.append((np.array(left[:count]), np.array(left[count:], dtype=int)))
        left = left[count:]
    return regressed, halves


def hand_on(
    row: Float[ndarray, " in"],
    error: Float[ndarray, " half"],
    half: Int[ndarray, " half"],
    rest: Int[ndarray, " rest"],
    G: Float[ndarray, "in in"],
    damping: float,
) -> Float[ndarray, " in"]:
    """Return a row of weights whose open columns have taken over an error: min_d |e x_S + d x_R|^2 + ridge |d|^2."""
    ridge = damping * np.mean(np.diag(G)) * np.eye(len(rest))
    change = np.linalg.inv(G[np.ix_(rest, rest)] + ridge) @ G[np.ix_(rest, half)] @ error
    moved = row.copy()
    moved[rest] -= change
    return moved
