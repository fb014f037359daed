import numpy as np
import pytest
import torch

from bitmend.linalg import moments as module
from bitmend.linalg.moments import MomentSums, merge, relative_errors
from bitmend.testing.reference.brute_force import direct_objective
from bitmend.testing.reference.brute_force import moments as reference_moments

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(23, 5, generator=GENERATOR)
X_FP = X + 0.3 * torch.randn(23, 5, generator=GENERATOR)


def sums(cross=True, residual=True):
    return MomentSums(5, cross=cross, residual=residual, device=torch.device("cpu"))


def test_moments_equal_the_slow_reference_however_the_tokens_come(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", 4)
    total = sums()
    total.add_(X[:10], X_FP[:10])
    total.add_(X[10:], X_FP[10:])
    means = total.means()
    G, C, D = reference_moments(X.numpy(), X_FP.numpy())
    assert means.num_tokens == 23
    for ours, theirs in ((means.G, G), (means.C, C), (means.D, D)):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-6)


def test_one_token_by_hand():
    total = sums()
    total.add_(torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.5, 2.0, 1.0, 0.0, 0.0]]))
    means = total.means()
    assert means.G[:2, :2].tolist() == [[1.0, 2.0], [2.0, 4.0]]
    assert means.C[0, :2].tolist() == [0.5, 1.0]
    assert means.C[2, :2].tolist() == [1.0, 2.0]
    assert means.D[0, 2] == 0.5


def test_output_error_equals_the_error_on_tokens():
    total = sums()
    total.add_(X, X_FP)
    W = torch.randn(4, 5, generator=GENERATOR)
    Q = W + 0.2 * torch.randn(4, 5, generator=GENERATOR)
    expected = direct_objective(W.numpy(), Q.numpy(), X.numpy(), X_FP.numpy())
    assert total.means().output_error(W, Q) == pytest.approx(expected, rel=1e-6)
    assert total.means().output_energy(W) == pytest.approx(float((X.double() @ W.double().T).square().sum(1).mean()))


def test_without_the_full_precision_stream_the_error_is_that_of_one_stream():
    total = sums(cross=False, residual=False)
    total.add_(X, None)
    means = total.means()
    assert means.C is None
    assert means.D is None
    W, Q = torch.ones(1, 5), torch.zeros(1, 5)
    assert means.output_error(W, Q) == pytest.approx(float(X.double().sum(1).square().mean()), rel=1e-6)


@pytest.mark.parametrize("two_streams", [True, False])
def test_relative_errors_are_those_on_tokens(two_streams):
    total = sums(cross=two_streams, residual=two_streams)
    total.add_(X, X_FP if two_streams else None)
    W = torch.randn(4, 5, generator=GENERATOR)
    energy = float((X.double() @ W.double().T).square().sum(1).mean())
    forms = [W + step * torch.randn(4, 5, generator=GENERATOR) for step in (1.0, 1e-2, 1e-4)]
    found = relative_errors(W, forms, total.means())
    for error, Q in zip(found, forms, strict=True):
        expected = direct_objective(W.numpy(), Q.numpy(), X.numpy(), X_FP.numpy() if two_streams else X.numpy())
        assert error == pytest.approx(expected / energy, rel=1e-5)


def test_panels_do_not_change_the_errors(monkeypatch):
    total = sums()
    total.add_(X, X_FP)
    W, means = torch.randn(4, 5, generator=GENERATOR), total.means()
    forms = [W + 1, W - 0.3 * torch.randn(4, 5, generator=GENERATOR)]
    expected = relative_errors(W, forms, means)
    monkeypatch.setattr(module, "QUADRATIC_PANEL", 2)
    assert relative_errors(W, forms, means) == pytest.approx(expected, rel=1e-5)


def test_relative_errors_are_in_float64_what_float32_would_blur():
    # One direction has all the energy but for a millionth, and the error lies across it.
    inputs = torch.randn(500, 1, generator=GENERATOR) * torch.ones(1, 8) + 1e-3 * torch.randn(
        500, 8, generator=GENERATOR
    )
    total = MomentSums(8, cross=False, residual=False, device=torch.device("cpu"))
    total.add_(inputs, None)
    W, across = torch.ones(1, 8), torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]])
    means = total.means()
    exact = means.output_error(W, W + across) / means.output_energy(W)
    assert relative_errors(W, [W + across], means) == [pytest.approx(exact, rel=1e-9)]


def test_relative_error_of_a_silent_layer():
    total = sums(cross=False, residual=False)
    total.add_(torch.zeros(3, 5), None)
    assert relative_errors(torch.ones(1, 5), [torch.zeros(1, 5)], total.means()) == [0.0]


def test_merging_two_parts_gives_the_moments_of_all_tokens():
    one, other, whole = sums(), sums(), sums()
    one.add_(X[:7], X_FP[:7])
    other.add_(X[7:], X_FP[7:])
    whole.add_(X, X_FP)
    both = merge(one.means(), other.means())
    assert both.num_tokens == 23
    torch.testing.assert_close(both.G, whole.means().G, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(both.C, whole.means().C, rtol=1e-6, atol=1e-7)


def test_a_factor_is_computed_once_for_each_setting():
    total = sums(cross=False, residual=False)
    total.add_(X, None)
    means = total.means()
    assert means.inverse_factor(0.01, "natural") is means.inverse_factor(0.01, "natural")
    assert means.inverse_factor(0.02, "natural") is not means.inverse_factor(0.01, "natural")
    assert len(means.factors) == 2


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200, 511, 513, 700])
def test_symmetric_moments_equal_the_whole_product_and_are_symmetric_to_the_bit(width):
    x = torch.randn(40, width, generator=GENERATOR)
    x_fp = x + 0.1 * torch.randn(40, width, generator=GENERATOR)
    total = MomentSums(width, cross=True, residual=True, device=x.device)
    total.add_(x[:30], x_fp[:30])
    total.add_(x[30:], x_fp[30:])
    means = total.means()
    dx = (x_fp - x).double()
    for ours, exact in ((means.G, x.double().T @ x.double()), (means.D, dx.T @ dx)):
        assert torch.equal(ours, ours.T)
        torch.testing.assert_close(ours, exact / 40, rtol=1e-5, atol=1e-6)


def test_means_take_the_memory_of_the_sums():
    sums = MomentSums(3, cross=True, residual=False, device=torch.device("cpu"))
    sums.add_(torch.ones(4, 3), torch.zeros(4, 3))
    addresses = sums.G.data_ptr(), sums.C.data_ptr()
    means = sums.means()
    assert (means.G.data_ptr(), means.C.data_ptr()) == addresses
    assert sums.means() is means
    with pytest.raises(ValueError, match="the sums have become means; start new sums"):
        sums.add_(torch.ones(4, 3), torch.zeros(4, 3))
