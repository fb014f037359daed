from dataclasses import replace

import numpy as np
import pytest
import torch

from bitmend.numerics.granularity import group_of_column
from bitmend.numerics.observers import choose_qparams
from bitmend.solvers.gptaq import Gptaq
from bitmend.solvers.rescomp import ResComp
from bitmend.testing.reference.gptaq import rescomp_fixed_order


@pytest.mark.parametrize("strengths", [(0.25, 0.25), (0.0, 0.5), (0.5, 0.1)])
@pytest.mark.parametrize(("bits", "symmetric", "group_size"), [(4, True, -1), (2, False, 8)])
def test_codes_equal_the_independent_slow_solver(make_layer, strengths, bits, symmetric, group_size):
    problem = make_layer(bits=bits, symmetric=symmetric, group_size=group_size).problem
    problem = replace(problem, weight=problem.weight.double())
    G, C = problem.fit.G.numpy(), problem.fit.C.numpy()
    H = G + 0.01 * np.mean(np.diag(G)) * np.eye(len(G))
    qparams, grid = choose_qparams(problem.weight, problem.spec), problem.spec.grid
    expected = rescomp_fixed_order(
        problem.weight.numpy(),
        H,
        G,
        C,
        *strengths,
        qparams.scale.numpy(),
        None if qparams.zero_point is None else qparams.zero_point.numpy(),
        group_of_column(problem.spec.granularity, len(G)).numpy(),
        grid.min_code,
        grid.max_code,
        np.argsort(-np.diag(G), kind="stable"),
    )
    solver = ResComp(residual_strength=strengths[0], drift_strength=strengths[1])
    np.testing.assert_array_equal(solver.solve(problem).qtensor.codes.numpy(), expected)


def test_without_drift_it_is_gptaq(make_layer):
    problem = make_layer().problem
    ours = ResComp(drift_strength=0.0).solve(problem).qtensor.codes
    assert torch.equal(ours, Gptaq().solve(problem).qtensor.codes)


def test_without_moments_it_cannot_work(make_layer):
    with pytest.raises(ValueError, match="rescomp needs the moments G and C"):
        ResComp().solve(replace(make_layer().problem, fit=None))
