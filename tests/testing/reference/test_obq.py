import numpy as np
import pytest

from bitmend.testing.reference import best_codes, levels_of, nearest_codes, obq_fixed_order


def problem(seed, rows=3, columns=6, groups=2):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * columns, columns)) @ rng.normal(size=(columns, columns))
    G = x.T @ x / len(x)
    H = G + 0.01 * np.mean(np.diag(G)) * np.eye(columns)
    W = rng.normal(size=(rows, columns))
    scale = rng.uniform(0.4, 0.8, size=(rows, groups))
    zero = rng.integers(-1, 1, size=(rows, groups)).astype(np.float64)
    group = np.repeat(np.arange(groups), columns // groups)
    return W, H, scale, zero, group, rng.permutation(columns)


def test_the_worked_example_of_the_docstring():
    W, H, one = np.array([[1.4, 0.4]]), np.array([[2.0, 1.0], [1.0, 2.0]]), np.ones((1, 1))
    group = np.array([0, 0])
    assert obq_fixed_order(W, H, one, None, group, -8, 7, np.array([0, 1])).tolist() == [[1, 1]]
    assert obq_fixed_order(W, H, one, None, group, -8, 7, np.array([1, 0])).tolist() == [[2, 0]]
    for codes, objective in (([1, 1], 0.56), ([2, 0], 0.56), ([1, 0], 0.96)):
        E = np.array(codes) - W[0]
        np.testing.assert_allclose(E @ H @ E, objective)


def test_a_diagonal_moment_means_nearest_rounding():
    W, H, scale, zero, group, order = problem(0)
    codes = obq_fixed_order(W, np.diag(np.diag(H)), scale, zero, group, -2, 1, order)
    nearest = np.clip(np.rint(W / scale[:, group]) + zero[:, group], -2, 1)
    np.testing.assert_array_equal(codes, nearest)


def test_halves_go_to_the_even_step_and_the_zero_point_comes_after():
    values, ones = np.array([0.5, 1.5, -0.5, 2.5]), np.ones(4)
    assert nearest_codes(values, ones, 0 * ones, -8, 7).tolist() == [0, 2, 0, 2]
    assert nearest_codes(values, ones, 3 * ones, -8, 7).tolist() == [3, 5, 3, 5]
    assert nearest_codes(values, ones, 3 * ones, -8, 4).tolist() == [3, 4, 3, 4]
    assert nearest_codes(values, 0 * ones, 0 * ones, -8, 7).tolist() == [0, 2, 0, 2]


@pytest.mark.parametrize("seed", range(5))
def test_downdates_are_the_least_squares_answer_to_everything_rounded_so_far(seed):
    W, H, scale, zero, group, order = problem(seed)
    codes = obq_fixed_order(W, H, scale, zero, group, -2, 1, order)
    levels = levels_of(codes, scale, zero, group)
    for k, q in enumerate(order):
        done, rest = order[:k], order[k:]
        answer = W[:, rest]
        if k:
            answer = answer - (levels - W)[:, done] @ H[np.ix_(done, rest)] @ np.linalg.inv(H[np.ix_(rest, rest)])
        expected = nearest_codes(answer[:, 0].copy(), scale[:, group[q]], zero[:, group[q]], -2, 1)
        np.testing.assert_array_equal(codes[:, q], expected)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_beats_the_exhaustive_minimum(seed):
    W, H, scale, zero, group, order = problem(seed, rows=4, columns=4)
    codes = obq_fixed_order(W, H, scale, zero, group, -2, 1, order)
    E = levels_of(codes, scale, zero, group) - W
    for i in range(4):
        steps = np.arange(-2, 2)
        grid = [(steps - zero[i, g]) * scale[i, g] for g in group]
        assert best_codes(W[i], H, grid)[1] <= E[i] @ H @ E[i] + 1e-12


def test_better_than_nearest_rounding_on_average():
    ratios = []
    for seed in range(20):
        W, H, scale, zero, group, order = problem(seed, rows=8)
        codes = obq_fixed_order(W, H, scale, zero, group, -16, 15, order)
        nearest = np.clip(np.rint(W / scale[:, group]) + zero[:, group], -16, 15).astype(np.int64)
        E, E_nearest = (levels_of(c, scale, zero, group) - W for c in (codes, nearest))
        ratios.append(np.trace(E @ H @ E.T) / np.trace(E_nearest @ H @ E_nearest.T))
    assert np.mean(ratios) < 0.8


def test_rows_do_not_interact():
    W, H, scale, zero, group, order = problem(7)
    codes = obq_fixed_order(W, H, scale, zero, group, -4, 3, order)
    for i in range(len(W)):
        row = slice(i, i + 1)
        alone = obq_fixed_order(W[row], H, scale[row], zero[row], group, -4, 3, order)
        np.testing.assert_array_equal(alone, codes[row])


def test_renaming_the_columns_renames_the_codes():
    W, H, scale, zero, group, order = problem(8)
    codes = obq_fixed_order(W, H, scale, zero, group, -4, 3, order)
    natural = np.arange(len(order))
    renamed = obq_fixed_order(W[:, order], H[np.ix_(order, order)], scale, zero, group[order], -4, 3, natural)
    np.testing.assert_array_equal(renamed, codes[:, order])
