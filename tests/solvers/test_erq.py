from dataclasses import replace

import numpy as np
import pytest
import torch

from bitmend.linalg.moments import Moments
from bitmend.numerics.granularity import PerChannel
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import QuantSpec, quantize
from bitmend.numerics.uniform import UniformGrid
from bitmend.protocols import Problem
from bitmend.sites import LinearSite
from bitmend.solvers.erq import Erq
from bitmend.testing.reference.erq import erq_fixed_order, hand_on


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (2, False)])
def test_codes_equal_the_independent_slow_solver(make_layer, strength, bits, symmetric):
    problem = make_layer(bits=bits, symmetric=symmetric, group_size=-1).problem
    problem = replace(problem, weight=problem.weight.double())
    G, C = problem.fit.G.numpy(), problem.fit.C.numpy()
    regressed, halves = erq_fixed_order(
        problem.weight.numpy(), G, C, 0.01, strength, np.argsort(-np.diag(G), kind="stable")
    )
    qparams = choose_qparams(torch.tensor(regressed).float(), problem.spec)
    expected = np.zeros_like(regressed)
    rows = regressed.copy()
    for half, rest in halves:
        grid = quantize(torch.tensor(rows), qparams, problem.spec).dequantize().double().numpy()
        expected[:, half] = grid[:, half]
        if len(rest):
            errors = expected[:, half] - rows[:, half]
            rows = np.stack([hand_on(row, e, half, rest, G, 0.01) for row, e in zip(rows, errors, strict=True)])
    found = Erq(strength=strength).solve(problem).qtensor
    assert torch.equal(found.qparams.scale, qparams.scale)
    np.testing.assert_allclose(found.dequantize().double().numpy(), expected, rtol=0, atol=1e-6)


def by_hand(C):
    """W = (0.5, 0.5) on the levels {-2, -1, 0, 1} (a scale of 1: the largest weight of another row is -2)."""
    weight = torch.tensor([[0.5, 0.5], [-2.0, -2.0]], dtype=torch.float64)
    G = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    spec = QuantSpec(UniformGrid(2, symmetric=True), PerChannel(), "minmax", torch.float32)
    moments = Moments(G, C, torch.zeros_like(G), 1)
    return Problem(LinearSite("layer", "layer", "linear", (2, 2)), weight, spec, moments)


def test_two_columns_by_hand():
    # Scale of row 0 by minmax: 0.5 / 2 = 0.25 would hold 0.5 as code 2, which the grid lacks: -2..1. So 0.5 -> 0.25 (code 1),
    # error -0.25; the second takes over 0.25 * 0.9 / (1 + tiny) = 0.225, is 0.725 and is rounded to 0.25, too.
    problem = by_hand(torch.zeros(2, 2, dtype=torch.float64))
    found = Erq(damping=1e-9, order="natural").solve(problem).qtensor
    scale = found.qparams.scale[0, 0]
    assert torch.equal(found.dequantize()[0], scale * torch.tensor([1.0, 1.0]))


def test_the_regression_by_hand():
    # C = G / 2: the full-precision input is 1.5 times what the layer reads, so that the weight should be 1.5 times as large.
    G = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    problem = by_hand(G / 2)
    found = Erq(damping=1e-9, order="natural").solve(problem).qtensor
    plain = Erq(damping=1e-9, order="natural", strength=0.0).solve(problem).qtensor
    assert torch.allclose(found.qparams.scale, 1.5 * plain.qparams.scale, rtol=1e-6)
    assert torch.equal(found.codes, plain.codes)


def test_the_error_it_leaves_is_below_that_of_rounding(make_layer):
    from bitmend.solvers.rtn import Rtn

    problem = make_layer(bits=3, group_size=-1).problem
    G, C, D = (getattr(problem.fit, name) for name in "GCD")

    def error(solver):
        change = solver.solve(problem).qtensor.dequantize().double() - problem.weight.double()
        W = problem.weight.double()
        return float((change @ G * change).sum() - 2 * (change @ C.T * W).sum() + (W @ D * W).sum())

    assert error(Erq()) < error(Erq(strength=0.0)) < error(Rtn())


def test_without_moments_it_cannot_work(make_layer):
    with pytest.raises(ValueError, match="erq needs the moments G and C"):
        Erq().solve(replace(make_layer().problem, fit=None))
