import numpy as np
import pytest
import torch

from bitmend.linalg import residual
from bitmend.linalg.cholesky import factor_inverse
from bitmend.linalg.moments import Moments
from bitmend.linalg.residual import causal_rows, target_shift
from bitmend.testing.reference.gptaq import residual_rows, shifted_target

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 9, generator=GENERATOR, dtype=torch.float64)
G = X.T @ X / 60
C = 0.3 * torch.randn(9, 9, generator=GENERATOR, dtype=torch.float64)
H = (G + 0.01 * G.diagonal().mean() * torch.eye(9, dtype=torch.float64)).numpy()


@pytest.fixture(autouse=True, params=[256, 4, 1])
def panel(request, monkeypatch):
    """All in one panel, in panels with a shorter last one, and one by one."""
    monkeypatch.setattr(residual, "PANEL", request.param)


def test_rows_equal_one_linear_solve_each():
    for order in ("natural", "diagonal"):
        factor = factor_inverse(G, 0.01, order)
        expected = residual_rows(H, C.numpy(), factor.order.numpy())
        np.testing.assert_allclose(causal_rows(C, factor).numpy(), expected, atol=1e-12)


def test_two_columns_by_hand():
    # H = ((2, 0), (0, 4)) and C_01 = 0.8: column 1 takes over 0.8 / 4 = 0.2 per unit of column 0, and nothing else moves.
    factor = factor_inverse(torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64), 0.0, "natural")
    P = causal_rows(torch.tensor([[5.0, 0.8], [7.0, 9.0]], dtype=torch.float64), factor)
    np.testing.assert_allclose(P.numpy(), [[0.0, 0.2], [0.0, 0.0]], atol=1e-15)


@pytest.mark.parametrize("rows", [4, 20])
def test_the_shift_depends_neither_on_the_order_of_columns_nor_on_who_asked_before(rows):
    weight = torch.randn(rows, 9, generator=GENERATOR, dtype=torch.float64)
    expected = shifted_target(weight.numpy(), H, C.numpy(), 1.0) - weight.numpy()
    moments = Moments(G, C, None, 60)
    for order in ("natural", "diagonal"):
        factor = factor_inverse(G, 0.01, order)
        for _ in range(2):  # the second answer may come from what is remembered
            np.testing.assert_allclose(target_shift(weight, moments, factor).numpy(), expected, atol=1e-12)
    stronger = factor_inverse(G, 0.5, "natural")
    other = target_shift(weight, moments, stronger).numpy()
    assert np.abs(other - expected).max() > 1e-2
    with pytest.raises(ValueError, match="a target shift needs the cross moment C"):
        target_shift(weight, Moments(G, None, None, 60), stronger)
