import pytest
import torch

from bitmend.errors import FactorizationError
from bitmend.linalg.cholesky import factor_inverse


def second_moment(width=6, tokens=40, seed=0):
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / tokens


def test_two_by_two_by_hand():
    # H = ((2, 1), (1, 1)) has the inverse ((1, -1), (-1, 2)); U = ((1/sqrt 2, -1/sqrt 2 ...)) is checked by its product.
    H = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    U = factor_inverse(H, 0.0, "natural").U
    torch.testing.assert_close(U.T @ U, torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64))
    assert U[1, 0] == 0
    assert U[0, 0] == pytest.approx(1.0)
    assert U[1, 1] == pytest.approx(1.0)  # after column 0 is fixed, an error at column 1 costs H_11 = 1


@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_the_product_is_the_damped_inverse_in_rounding_order(order):
    G = second_moment()
    factor = factor_inverse(G, 0.01, order)
    H = G + 0.01 * G.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(factor.U.T @ factor.U, torch.linalg.inv(H)[factor.order][:, factor.order])
    assert torch.equal(factor.U, factor.U.triu())
    assert factor.damping == factor.requested_damping == 0.01
    if order == "diagonal":
        assert bool((G.diagonal()[factor.order].diff() <= 0).all())


def test_dead_inputs_are_counted_and_do_no_harm():
    G = second_moment()
    G[2], G[:, 2] = 0, 0
    factor = factor_inverse(G, 0.01, "natural")
    assert factor.dead_columns == 1
    row = factor.U[2].clone()
    row[2] = 0
    assert not row.any()  # an error there is handed to nobody


def test_all_zero_inputs_give_the_identity_up_to_scale():
    factor = factor_inverse(torch.zeros(3, 3, dtype=torch.float64), 0.01, "natural")
    assert factor.dead_columns == 3
    torch.testing.assert_close(factor.U, 10 * torch.eye(3, dtype=torch.float64))


def test_the_damping_climbs_the_ladder():
    G = torch.diag(torch.tensor([1.0, 1.0, -0.03], dtype=torch.float64))  # needs more than 0.03 / mean
    factor = factor_inverse(G, 0.01, "natural")
    assert factor.requested_damping == 0.01
    assert factor.damping == 0.05


def test_an_indefinite_matrix_is_refused_with_the_numbers():
    G = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    with pytest.raises(
        FactorizationError, match=r"stays indefinite with damping up to 0.5 \(smallest eigenvalue -3.00e\+00"
    ):
        factor_inverse(G, 0.01, "natural")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(bad):
    G = second_moment()
    G[0, 1] = bad
    with pytest.raises(FactorizationError, match="must be finite, but it holds NaN or Inf"):
        factor_inverse(G, 0.01, "natural")
