"""The slow reference by hand, and the fast method against it."""

import numpy as np
import pytest
import torch

from bitmend.compensation import CompensationShape
from bitmend.compensators.qwt import QwT
from bitmend.linalg.least_squares import RegressionSums
from bitmend.protocols import CompensationProblem
from bitmend.testing.reference.qwt import linear_map, r_squared, scale_and_shift


def drawn(n=300, d=7, m=5):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(n, d)) * np.logspace(-1, 1, d) + 3
    y = draw.normal(size=(n, m)) + 1
    return x, y, x @ draw.normal(size=(d, m)) + 0.4 * y + draw.normal(size=(n, m))


def test_three_rows_by_hand():
    x = np.array([[-1.0], [0.0], [1.0]])
    W, b = linear_map(x, 2 * x + 0.5)
    assert W[0, 0] == pytest.approx(2)
    assert b[0] == pytest.approx(0.5)
    assert r_squared(x, 2 * x + 0.5, W, b) == pytest.approx(1)
    assert r_squared(x, 2 * x + 0.5, 0 * W, b) == pytest.approx(0)
    a, b = scale_and_shift(x, 3 * x - 1)
    assert (a[0], b[0]) == (pytest.approx(3), pytest.approx(-1))


@pytest.mark.parametrize("solve", ["ridge", "float32_inverse"])
def test_the_papers_map(solve, monkeypatch):
    x, y, e = drawn()
    monkeypatch.setattr("bitmend.compensators.qwt.RIDGES", (1e-9,))
    monkeypatch.setattr(QwT, "_steady", lambda self, choice, folds: 1.0)
    W, b = linear_map(x, e)
    found = QwT(structure="full", gate="in_sample", solve=solve, dtype="float32").fit(problem_of(x, y, e))
    scale = np.abs(W).max()
    np.testing.assert_allclose(found.tensors["weight"].numpy().T, W, atol=2e-4 * scale)
    np.testing.assert_allclose(found.tensors["bias"].numpy(), b, atol=2e-3 * scale)
    assert found.diagnostics["in_sample_r2"] == pytest.approx(r_squared(x, e, W, b), abs=1e-4)


def test_the_second_versions_scale_and_shift(monkeypatch):
    x, y, e = drawn()
    monkeypatch.setattr("bitmend.compensators.qwt.RIDGES", (1e-9,))
    monkeypatch.setattr(QwT, "_steady", lambda self, choice, folds: 1.0)
    a, b = scale_and_shift(y, e)
    found = QwT(structure="affine", gate="in_sample", dtype="float32").fit(problem_of(x, y, e))
    np.testing.assert_allclose(found.tensors["scale"].numpy(), a, rtol=1e-3)
    np.testing.assert_allclose(found.tensors["bias"].numpy(), b, rtol=1e-3)


def problem_of(x, y, e):
    parts = []
    for fold in range(4):
        sums = RegressionSums(x.shape[1], y.shape[1], 1, torch.full((x.shape[1],), 3.0))
        sums.add_(*(torch.tensor(one[fold::4]) for one in (x, y)), [torch.tensor(e[fold::4])])
        parts.append(sums)
    return CompensationProblem("block", CompensationShape("bias", x.shape[1], y.shape[1]), parts)
