from dataclasses import replace

import numpy as np
import pytest
import torch

from bitmend.linalg.moments import Moments
from bitmend.numerics.granularity import group_of_column
from bitmend.numerics.observers import choose_qparams
from bitmend.solvers.gptaq import Gptaq
from bitmend.solvers.gptq import Gptq
from bitmend.testing.reference.gptaq import gptaq_fixed_order


def reference_inputs(problem, damping, order):
    G, C = problem.fit.G.numpy(), problem.fit.C.numpy()
    H = G + damping * np.mean(np.diag(G)) * np.eye(len(G))
    columns = np.arange(len(G)) if order == "natural" else np.argsort(-np.diag(G), kind="stable")
    qparams, grid = choose_qparams(problem.weight, problem.spec), problem.spec.grid
    zero_point = None if qparams.zero_point is None else qparams.zero_point.numpy()
    groups = group_of_column(problem.spec.granularity, len(G)).numpy()
    return H, G, C, (qparams.scale.numpy(), zero_point, groups, grid.min_code, grid.max_code, columns)


@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize(("bits", "symmetric", "group_size"), [(4, True, -1), (3, False, 8), (2, True, 4)])
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_codes_equal_the_independent_slow_solver(make_layer, order, bits, symmetric, group_size, strength):
    problem = make_layer(bits=bits, symmetric=symmetric, group_size=group_size, observer="mse").problem
    problem = replace(problem, weight=problem.weight.double())
    H, _, C, rest = reference_inputs(problem, 0.02, order)
    ours = Gptaq(damping=0.02, order=order, residual_strength=strength).solve(problem).qtensor.codes.numpy()
    np.testing.assert_array_equal(ours, gptaq_fixed_order(problem.weight.numpy(), H, C, strength, *rest))


def test_strength_zero_is_gptq(make_layer):
    problem = make_layer().problem
    assert torch.equal(Gptaq(residual_strength=0.0).solve(problem).qtensor.codes, Gptq().solve(problem).qtensor.codes)


def test_equal_streams_are_gptq(make_layer):
    problem = make_layer().problem
    none = torch.zeros_like(problem.fit.G)
    problem = replace(problem, fit=Moments(problem.fit.G, none, none, 10))
    assert torch.equal(Gptaq().solve(problem).qtensor.codes, Gptq().solve(problem).qtensor.codes)


def test_the_residual_is_repaired_on_rows_never_seen(make_layer):
    # Many tokens for few inputs and a strong residual: here believing more of it pays, by the error on other rows.
    problem = make_layer(out=32, width=24, bits=4, tokens=4000, noise=0.4).problem
    errors = [
        problem.held_out.output_error(problem.weight, Gptaq(residual_strength=a).solve(problem).qtensor.dequantize())
        for a in (0.0, 0.25, 1.0)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_reference_blocks_differ_only_beyond_128_columns(make_layer):
    narrow = make_layer(width=64, tokens=500).problem
    wide = make_layer(width=160, out=32, bits=2, tokens=800, noise=0.5).problem
    for problem, same in ((narrow, True), (wide, False)):
        exact, lazy = (
            Gptaq(residual_strength=1.0, compat=compat).solve(problem).qtensor.codes
            for compat in ("exact", "reference")
        )
        assert torch.equal(exact, lazy) is same


def test_without_cross_moments_it_cannot_work(make_layer):
    problem = make_layer().problem
    with pytest.raises(ValueError, match="gptaq needs the moments G and C"):
        Gptaq().solve(replace(problem, fit=replace(problem.fit, C=None, _known={})))
