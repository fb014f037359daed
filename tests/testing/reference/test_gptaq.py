import numpy as np
import pytest

from bitmend.testing.reference import (
    best_codes_asymmetric,
    direct_objective,
    gptaq_fixed_order,
    levels_of,
    moments,
    obq_fixed_order,
    rescomp_fixed_order,
    residual_rows,
    shifted_target,
    target_shift_fixed_order,
)

FINE = 1e-9  # a grid so fine that nothing is rounded


def problem(seed, rows=3, columns=6, groups=2):
    rng = np.random.default_rng(seed)
    x_q = rng.normal(size=(4 * columns, columns)) @ rng.normal(size=(columns, columns))
    x_fp = x_q + 0.2 * x_q @ rng.normal(size=(columns, columns)) + 0.1 * rng.normal(size=x_q.shape)
    G, C, D = moments(x_q, x_fp)
    H = G + 0.01 * np.mean(np.diag(G)) * np.eye(columns)
    W = rng.normal(size=(rows, columns))
    scale = rng.uniform(0.3, 0.6, size=(rows, groups))
    zero = rng.integers(-1, 1, size=(rows, groups)).astype(np.float64)
    group = np.repeat(np.arange(groups), columns // groups)
    grid = (scale, zero, group, -4, 3, rng.permutation(columns))
    return W, G, C, D, H, grid, (x_q, x_fp)


def test_the_worked_example_of_the_docstring():
    W, H, C = np.array([[1.4, 0.4]]), np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[0.0, -0.4], [0.0, 0.0]])
    grid, forth, back = (np.ones((1, 1)), None, np.array([0, 0]), -8, 7), np.array([0, 1]), np.array([1, 0])
    np.testing.assert_allclose(residual_rows(H, C, forth), [[0, -0.2], [0, 0]])
    np.testing.assert_array_equal(residual_rows(H, C, back), np.zeros((2, 2)))
    assert gptaq_fixed_order(W, H, C, 1.0, *grid, forth).tolist() == [[1, 0]]
    assert gptaq_fixed_order(W, H, C, 0.25, *grid, forth).tolist() == [[1, 1]]
    assert gptaq_fixed_order(W, H, C, 1.0, *grid, back).tolist() == [[2, 0]]
    np.testing.assert_allclose(shifted_target(W, H, C, 1.0), [[1.4 + 1.4 * 2 / 15, 0.4 - 1.4 * 4 / 15]])
    assert target_shift_fixed_order(W, H, C, 1.0, *grid, forth).tolist() == [[2, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_without_a_residual_all_are_optimal_brain_quantisation(seed):
    W, G, C, _, H, grid, _ = problem(seed)
    plain = obq_fixed_order(W, H, *grid)
    none = np.zeros_like(C)
    np.testing.assert_array_equal(gptaq_fixed_order(W, H, none, 1.0, *grid), plain)
    np.testing.assert_array_equal(gptaq_fixed_order(W, H, C, 0.0, *grid), plain)
    np.testing.assert_array_equal(rescomp_fixed_order(W, H, G, C, 0.0, 0.0, *grid), plain)
    np.testing.assert_array_equal(target_shift_fixed_order(W, H, none, 1.0, *grid), plain)


@pytest.mark.parametrize("seed", range(5))
def test_the_residual_map_has_the_closed_form_of_the_paper(seed):
    _, G, C, _, H, (*_, order), _ = problem(seed)
    # H^-1 = U^T U, U upper: from the lower factor of H with both axes reversed
    flipped = np.linalg.cholesky(H[np.ix_(order, order)][::-1, ::-1])[::-1, ::-1]
    U = np.linalg.inv(flipped)
    np.testing.assert_allclose(U.T @ U, np.linalg.inv(H[np.ix_(order, order)]), rtol=1e-9)
    for cross in (C, G + C):
        P = residual_rows(H, cross, order)
        np.testing.assert_allclose(P, np.triu(cross[np.ix_(order, order)] @ U.T, 1) @ U, atol=1e-9)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_unrounded_gptaq_is_the_resolvent_of_its_map(strength):
    W, _, C, _, H, grid, _ = problem(3)
    order = grid[-1]
    fine = (np.full((3, 1), FINE), None, np.zeros(6, dtype=np.int64), -(2**62), 2**62, order)
    reached = gptaq_fixed_order(W, H, C, strength, *fine)[:, order] * FINE
    expected = W[:, order] @ np.linalg.inv(np.eye(6) - strength * residual_rows(H, C, order))
    np.testing.assert_allclose(reached, expected, atol=1e-6)


def test_unrounded_rescomp_solves_its_linear_recursion():
    W, G, C, _, H, grid, _ = problem(4)
    order = grid[-1]
    fine = (np.full((3, 1), FINE), None, np.zeros(6, dtype=np.int64), -(2**62), 2**62, order)
    a, b = 0.5, 0.25
    reached = rescomp_fixed_order(W, H, G, C, a, b, *fine)[:, order] * FINE
    P, P2, one = residual_rows(H, C, order), residual_rows(H, G + C, order), np.eye(6)
    expected = W[:, order] @ (one + b * P2) @ np.linalg.inv(one - a * P + b * P2)
    np.testing.assert_allclose(reached, expected, atol=1e-6)


def test_rescomp_without_its_second_term_is_gptaq():
    W, G, C, _, H, grid, _ = problem(5)
    np.testing.assert_array_equal(
        rescomp_fixed_order(W, H, G, C, 0.7, 0.0, *grid), gptaq_fixed_order(W, H, C, 0.7, *grid)
    )


def test_a_strength_for_each_row_is_that_row_alone():
    W, G, C, _, H, grid, _ = problem(6)
    strengths = np.array([0.0, 0.5, 1.0])
    for solve in (
        lambda a: gptaq_fixed_order(W, H, C, a, *grid),
        lambda a: target_shift_fixed_order(W, H, C, a, *grid),
        lambda a: rescomp_fixed_order(W, H, G, C, a, a, *grid),
    ):
        together = solve(strengths)
        for i, a in enumerate(strengths):
            np.testing.assert_array_equal(together[i], solve(float(a))[i])


@pytest.mark.parametrize("seed", range(3))
def test_nothing_beats_the_exhaustive_minimum(seed):
    W, G, C, D, H, grid, (x_q, x_fp) = problem(seed, rows=2, columns=4)
    scale, zero, group, _, _, order = grid
    grid = (scale, zero, group, -2, 1, order)
    results = [
        gptaq_fixed_order(W, H, C, 0.5, *grid),
        target_shift_fixed_order(W, H, C, 0.5, *grid),
        rescomp_fixed_order(W, H, G, C, 0.25, 0.25, *grid),
    ]
    for i in range(2):
        levels = [(np.arange(-2, 2) - zero[i, g]) * scale[i, g] for g in group]
        _, least = best_codes_asymmetric(W[i], G, C, D, levels)
        for codes in results:
            Q = levels_of(codes, scale, zero, group)
            assert least <= direct_objective(W[i : i + 1], Q[i : i + 1], x_q, x_fp) + 1e-12


def test_the_residual_term_helps_against_the_objective_it_is_for():
    gains = {"gptaq": [], "shift": []}
    for seed in range(20):
        W, _, C, _, H, grid, (x_q, x_fp) = problem(seed, rows=4)
        scale, _, group, _, _, order = grid
        fine = (scale / 16, None, group, -1000, 1000, order)

        def error(codes, W=W, scale=scale, group=group, x_q=x_q, x_fp=x_fp):
            return direct_objective(W, levels_of(codes, scale / 16, None, group), x_q, x_fp)

        plain = error(obq_fixed_order(W, H, *fine))
        gains["gptaq"].append(error(gptaq_fixed_order(W, H, C, 1.0, *fine)) / plain)
        gains["shift"].append(error(target_shift_fixed_order(W, H, C, 1.0, *fine)) / plain)
    assert np.mean(gains["shift"]) < np.mean(gains["gptaq"]) < 1
    assert np.max(gains["shift"]) < 1


def test_renaming_the_columns_renames_the_codes():
    W, G, C, _, H, (scale, zero, group, low, high, order), _ = problem(9)
    both = np.ix_(order, order)
    natural = (scale, zero, group[order], low, high, np.arange(len(order)))
    grid = (scale, zero, group, low, high, order)
    np.testing.assert_array_equal(
        rescomp_fixed_order(W[:, order], H[both], G[both], C[both], 0.4, 0.2, *natural),
        rescomp_fixed_order(W, H, G, C, 0.4, 0.2, *grid)[:, order],
    )
