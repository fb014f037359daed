from dataclasses import replace

import numpy as np
import pytest
import torch

from bitmend.linalg.cholesky import factor_inverse
from bitmend.linalg.residual import target_shift
from bitmend.numerics.granularity import group_of_column
from bitmend.numerics.observers import choose_qparams
from bitmend.solvers.gptq import Gptq
from bitmend.solvers.qep import Qep
from bitmend.testing.reference.gptaq import shifted_target, target_shift_fixed_order


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), [(4, True, -1), (2, False, 8)])
def test_codes_equal_the_independent_slow_solver(make_layer, bits, symmetric, group_size):
    problem = make_layer(bits=bits, symmetric=symmetric, group_size=group_size).problem
    problem = replace(problem, weight=problem.weight.double())
    G, C = problem.fit.G.numpy(), problem.fit.C.numpy()
    H = G + 0.01 * np.mean(np.diag(G)) * np.eye(len(G))
    moved = shifted_target(problem.weight.numpy(), H, C, 0.5)
    qparams, grid = choose_qparams(torch.from_numpy(moved), problem.spec), problem.spec.grid
    expected = target_shift_fixed_order(
        problem.weight.numpy(),
        H,
        C,
        0.5,
        qparams.scale.numpy(),
        None if qparams.zero_point is None else qparams.zero_point.numpy(),
        group_of_column(problem.spec.granularity, len(G)).numpy(),
        grid.min_code,
        grid.max_code,
        np.argsort(-np.diag(G), kind="stable"),
    )
    np.testing.assert_array_equal(Qep().solve(problem).qtensor.codes.numpy(), expected)


def test_the_whole_shift_is_least_squares_for_the_full_precision_output(make_layer):
    layer = make_layer(tokens=600)
    W = layer.problem.weight.double()
    factor = factor_inverse(layer.problem.fit.G, 1e-12, "diagonal")
    ours = W + target_shift(W, layer.problem.fit, factor)
    x, x_fp = layer.x.double().numpy(), layer.x_fp.double().numpy()
    expected = np.linalg.lstsq(x, x_fp @ W.T.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_strength_zero_is_gptq(make_layer):
    problem = make_layer().problem
    assert torch.equal(Qep(residual_strength=0.0).solve(problem).qtensor.codes, Gptq().solve(problem).qtensor.codes)


def test_without_moments_it_cannot_work(make_layer):
    with pytest.raises(ValueError, match="qep needs the moments"):
        Qep().solve(replace(make_layer().problem, fit=None))
