import numpy as np
import pytest

from bitmend.testing.reference import (
    best_codes,
    best_codes_asymmetric,
    direct_objective,
    moments,
    moments_objective,
    shifted_target,
)


@pytest.fixture
def streams():
    rng = np.random.default_rng(0)
    x_q = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5))
    x_fp = x_q + 0.3 * rng.normal(size=(40, 5)) + 0.1 * x_q @ rng.normal(size=(5, 5))
    return rng.normal(size=(3, 5)), x_q, x_fp


def test_the_objective_from_moments_is_the_one_from_tokens(streams):
    W, x_q, x_fp = streams
    Q = np.round(W)
    np.testing.assert_allclose(
        moments_objective(W, Q, *moments(x_q, x_fp)), direct_objective(W, Q, x_q, x_fp), rtol=1e-12
    )


def test_the_objective_by_hand():
    # one token, x_q = (1, 2), x_fp = (3, 2): Q x_q = 1 + 0, W x_fp = 4.5 + 1 and the error is -4.5
    W, Q = np.array([[1.5, 0.5]]), np.array([[1.0, 0.0]])
    assert direct_objective(W, Q, np.array([[1.0, 2.0]]), np.array([[3.0, 2.0]])) == pytest.approx(20.25)


def test_unquantised_the_least_squares_weight_is_the_undamped_shift(streams):
    W, x_q, x_fp = streams
    G, C, D = moments(x_q, x_fp)
    least_squares = np.linalg.lstsq(x_q, x_fp @ W.T, rcond=None)[0].T
    np.testing.assert_allclose(shifted_target(W, G, C, 1.0), least_squares, rtol=1e-9)
    best = moments_objective(W, least_squares, G, C, D)
    for direction in np.eye(15).reshape(15, 3, 5):
        assert moments_objective(W, least_squares + 0.01 * direction, G, C, D) > best


def test_independent_columns_round_to_their_nearest_level():
    w = np.array([0.4, 1.6, -0.7])
    levels, objective = best_codes(w, np.diag([1.0, 2.0, 3.0]), [np.arange(-2.0, 3.0)] * 3)
    np.testing.assert_array_equal(levels, [0.0, 2.0, -1.0])
    assert objective == pytest.approx(0.16 + 2 * 0.16 + 3 * 0.09)


def test_correlated_columns_by_hand():
    # see the docstring of obq: (1, 1) and (2, 0) both have 0.56, the first one tried wins
    levels, objective = best_codes(
        np.array([1.4, 0.4]), np.array([[2.0, 1.0], [1.0, 2.0]]), [[0.0, 1.0, 2.0], [0.0, 1.0]]
    )
    assert objective == pytest.approx(0.56)
    assert levels.tolist() in ([1.0, 1.0], [2.0, 0.0])


def test_no_combination_beats_the_best_one(streams):
    W, x_q, x_fp = streams
    G, C, D = moments(x_q, x_fp)
    grid = [np.array([-1.0, 0.0, 1.0])] * 5
    levels, objective = best_codes_asymmetric(W[0], G, C, D, grid)
    assert objective == pytest.approx(direct_objective(W[:1], levels[None], x_q, x_fp))
    rng = np.random.default_rng(1)
    for trial in rng.integers(-1, 2, size=(200, 5)).astype(np.float64):
        assert direct_objective(W[:1], trial[None], x_q, x_fp) >= objective - 1e-12


def test_a_missing_column_of_levels_is_refused():
    with pytest.raises(ValueError, match="one entry a column"):
        best_codes(np.zeros(2), np.eye(2), [[0.0]])
