import numpy as np
import pytest

from bitmend.testing.reference.erq import erq_fixed_order, hand_on


def test_the_regression_is_the_minimum():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(50, 4))
    residual = 0.3 * x @ draw.normal(size=(4, 4)) + 0.1 * draw.normal(size=(50, 4))
    weight = draw.normal(size=(3, 4))
    G, C = x.T @ x / 50, residual.T @ x / 50
    regressed, _ = erq_fixed_order(weight, G, C, 1e-12, 1.0, np.arange(4))
    wanted = np.linalg.lstsq(x, (x + residual) @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(regressed, wanted, rtol=1e-6)


def test_halves_of_five_columns():
    _, halves = erq_fixed_order(np.ones((1, 5)), np.eye(5), np.zeros((5, 5)), 0.01, 0.0, np.array([4, 3, 2, 1, 0]))
    assert [(half.tolist(), rest.tolist()) for half, rest in halves] == [
        ([4, 3, 2], [1, 0]),
        ([1], [0]),
        ([0], []),
    ]


def test_handing_on_by_hand():
    # One column errs by -0.5 and the other is correlated by 0.9 with it: it takes over 0.45.
    G = np.array([[1.0, 0.9], [0.9, 1.0]])
    moved = hand_on(np.array([0.5, 0.5]), np.array([-0.5]), np.array([0]), np.array([1]), G, 0.0)
    assert moved.tolist() == [0.5, pytest.approx(0.95)]
