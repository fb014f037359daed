import numpy as np
import torch

from bitmend.linalg.cholesky import factor_inverse
from bitmend.linalg.residual import causal_rows, target_shift
from bitmend.testing.reference.gptaq import residual_rows, shifted_target

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 9, generator=GENERATOR, dtype=torch.float64)
G = X.T @ X / 60
C = 0.3 * torch.randn(9, 9, generator=GENERATOR, dtype=torch.float64)
H = (G + 0.01 * G.diagonal().mean() * torch.eye(9, dtype=torch.float64)).numpy()


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


def test_the_shift_does_not_depend_on_the_order_of_columns():
    weight = torch.randn(4, 9, generator=GENERATOR, dtype=torch.float64)
    expected = shifted_target(weight.numpy(), H, C.numpy(), 1.0) - weight.numpy()
    for order in ("natural", "diagonal"):
        shift = target_shift(weight, C, factor_inverse(G, 0.01, order))
        np.testing.assert_allclose(shift.numpy(), expected, atol=1e-12)
