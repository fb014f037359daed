import pytest
import torch

from bitmend.linalg import lapack
from bitmend.linalg.lapack import inverse_cholesky_, reverse_


def moment(width, seed=0):
    x = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


@pytest.fixture(params=[True, False], ids=["torch", "scipy"])
def library(request, monkeypatch):
    monkeypatch.setattr(lapack, "onednn_is_slower", lambda: request.param)
    return request.param


def test_two_by_two_by_hand(library):
    # H = ((4, 2), (2, 2)) = L L^T with L = ((2, 0), (1, 1)); L^-1 = ((1/2, 0), (-1/2, 1)).
    found = inverse_cholesky_(torch.tensor([[4.0, 2.0], [2.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.0], [-0.5, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 63, 64, 65, 700])
def test_it_is_the_inverse_of_the_factor(library, width):
    H = moment(width)
    found = inverse_cholesky_(H.clone())
    expected = torch.linalg.inv(torch.linalg.cholesky(H))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    assert torch.equal(found, found.tril())


def test_what_is_not_positive_definite_gives_none(library):
    assert inverse_cholesky_(torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))) is None


def test_scipys_takes_no_memory_but_the_matrix_and_torchs_threads(monkeypatch):
    monkeypatch.setattr(lapack, "onednn_is_slower", lambda: False)
    seen, plain = [], lapack.lapack.dpotrf
    monkeypatch.setattr(lapack.lapack, "dpotrf", lambda *a, **k: (seen.append(threads()), plain(*a, **k))[1])
    H, before = moment(65), threads()
    assert inverse_cholesky_(H).data_ptr() == H.data_ptr()
    monkeypatch.setattr(lapack, "WIDE", 65)
    inverse_cholesky_(moment(65))
    assert seen == [{1}, {torch.get_num_threads()}]
    assert threads() == before


def threads():
    """Return the thread counts that scipy's and numpy's BLAS have now."""
    return {pool["num_threads"] for pool in lapack._blas().info()}


@pytest.mark.parametrize("size", [1, 2, 7, 1024, 1500, 1501])
def test_reversing_in_place(size):
    matrix = torch.arange(size * size, dtype=torch.float64).reshape(size, size)
    expected = matrix.flip(0, 1)
    found = reverse_(matrix)
    assert torch.equal(found, expected)
    assert found.data_ptr() == matrix.data_ptr()
