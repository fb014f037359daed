from dataclasses import replace

import numpy as np
import pytest
import torch

from bitmend.linalg.moments import Moments
from bitmend.solvers.coreq import CoreQ
from bitmend.solvers.qep import Qep


def test_the_strength_is_the_share_of_the_residual_that_is_linear_in_the_inputs(make_layer):
    layer = make_layer(tokens=500)
    W = layer.problem.weight.double().numpy()
    x, residual = layer.x.double().numpy(), (layer.x_fp - layer.x).double().numpy() @ W.T
    G, C = x.T @ x / len(x), (layer.x_fp - layer.x).double().numpy().T @ x / len(x)
    H = G + 0.01 * np.mean(np.diag(G)) * np.eye(len(G))
    explained = np.trace(W @ C @ np.linalg.inv(H) @ C.T @ W.T)
    expected = explained / np.mean(np.sum(residual**2, 1))
    solution = CoreQ().solve(layer.problem)
    assert solution.diagnostics["residual_strength"] == pytest.approx(expected, rel=1e-4)
    assert 0.1 < expected < 1
    fixed = Qep(residual_strength=solution.diagnostics["residual_strength"]).solve(layer.problem)
    assert torch.equal(solution.qtensor.codes, fixed.qtensor.codes)


def test_equal_streams_need_no_strength(make_layer):
    problem = make_layer().problem
    none = torch.zeros_like(problem.fit.G)
    problem = replace(problem, fit=Moments(problem.fit.G, none, none, 10))
    assert CoreQ().solve(problem).diagnostics["residual_strength"] == 0


def test_without_moments_it_cannot_work(make_layer):
    with pytest.raises(ValueError, match="coreq needs the moments"):
        CoreQ().solve(replace(make_layer().problem, fit=None))
