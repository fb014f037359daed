import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.linalg.hadamard import Rotation, factors, hartley, is_prime, mean_to_first, paley, random_signs, sylvester


def test_by_hand():
    # (1, 2, 3, 4) times the matrix of Sylvester, over 2: sums with the signs ++++, +-+-, ++--, +--+.
    assert Rotation(4).apply(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [5.0, -1.0, -2.0, 0.0]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12, 20, 28, 43, 52, 60, 64, 96, 100, 128, 172, 256, 320, 768])
def test_orthogonal_and_spreading_at_any_size(size):
    matrix = Rotation(size, seed=3).matrix()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    # A Hadamard matrix spreads one feature evenly over all; with an odd rest it is at most sqrt(2) times that.
    limit = math.sqrt(1 if size & (size - 1) == 0 or size in (12, 20, 28, 60, 96, 768) else 2)
    assert float(matrix.abs().max()) * math.sqrt(size) <= limit + 1e-9


def test_keeping_the_mean_by_hand():
    # Of two features one direction is left beside (1, 1): either nothing changes, or they change places.
    found = [Rotation(2, seed, keeps_mean=True).apply(torch.tensor([3.0, 5.0])).tolist() for seed in range(8)]
    assert sorted({tuple(map(round, one)) for one in found}) == [(3, 5), (5, 3)]
    # Of three: (1, -1, 0) lies across the mean and stays so; the reflection sends (1, 1, 1) / sqrt(3) to the first axis.
    assert mean_to_first(torch.ones(3, dtype=torch.float64)).tolist() == pytest.approx([3**0.5, 0, 0], abs=1e-12)


@pytest.mark.parametrize("size", [2, 3, 16, 24, 257])
def test_rotations_that_keep_the_mean(size):
    rotation = Rotation(size, seed=1, keeps_mean=True)
    matrix, ones = rotation.matrix(), torch.ones(size, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(ones @ matrix, ones)
    assert torch.allclose(rotation.inverse.matrix(), matrix.T, atol=1e-12)
    if size > 16:  # and spread all the same: no worse than a random rotation
        assert float(matrix.abs().max()) * math.sqrt(size) < 4
    values = torch.randn(5, size, dtype=torch.float64)
    norm = torch.nn.LayerNorm(size, elementwise_affine=False, eps=0.0)
    assert torch.allclose(norm(values @ matrix), norm(values) @ matrix, atol=1e-9)


@pytest.mark.parametrize(("size", "inner"), [(1, 1), (4, 2)])
def test_what_cannot_keep_its_mean(size, inner):
    with pytest.raises(ValueError, match="needs at least 2 features, rotated one by one"):
        Rotation(size, inner=inner, keeps_mean=True)


@pytest.mark.parametrize("size", [4, 8, 12, 20, 24, 28, 32, 36, 44, 60, 68, 76, 84, 108, 124, 140, 148])
def test_paley_gives_hadamard_matrices(size):
    matrix = paley(size)
    assert matrix is not None
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


def test_paley_says_where_it_has_none():
    assert paley(92) is None  # 91 = 7 * 13, and 45 is no prime
    assert paley(52) is None  # 51 = 3 * 17, and 25 is a power of a prime only
    assert paley(6) is None


def test_the_small_matrices():
    assert sylvester(2).tolist() == [[1, 1], [1, -1]]
    third = hartley(3)
    assert torch.allclose(third @ third, torch.eye(3, dtype=torch.float64), atol=1e-15)
    assert [number for number in range(20) if is_prime(number)] == [2, 3, 5, 7, 11, 13, 17, 19]


@given(
    st.sampled_from([1, 4, 6, 12, 43, 48, 64]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([1, 3]),
    st.one_of(st.none(), st.integers(0, 2**40)),
    st.booleans(),
)
def test_blocks_are_products_with_the_matrix(size, inner, outer, seed, transposed):
    rotation = Rotation(size, seed, inner, transposed)
    values = torch.randn(2, 3, outer * size * inner, dtype=torch.float64)
    blocks = values.reshape(2, 3, outer, size, inner)
    by_matrix = torch.einsum("abosi,st->aboti", blocks, rotation.matrix()).reshape(values.shape)
    assert torch.allclose(rotation.apply(values), by_matrix, atol=1e-12)
    assert torch.allclose(rotation.inverse.apply(rotation.apply(values)), values, atol=1e-12)
    assert torch.allclose(rotation.inverse.matrix(), rotation.matrix().T, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_short_types_are_computed_in_float32_and_rounded_once(dtype):
    values = torch.randn(5, 96).to(dtype)
    rotated = Rotation(96, 1).apply(values)
    assert rotated.dtype == dtype
    assert torch.equal(rotated, Rotation(96, 1).apply(values.float()).to(dtype))


def test_the_factors_are_small_and_balanced():
    assert [len(matrix) for matrix in factors(4096)] == [64, 64]
    assert [len(matrix) for matrix in factors(14336)] == [28, 32, 16]
    assert [len(matrix) for matrix in factors(11008)] == [43, 16, 16]


def test_signs_are_the_same_for_ever():
    # The first outputs of SplitMix64 from the state 0 are e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f,
    # f88bb8a8724c81ec, 1b39896a51a8749b: their highest bits are 1, 0, 0, 1, 0.
    assert random_signs(5, 0).tolist() == [1, -1, -1, 1, -1]
    assert random_signs(1000, 7).tolist() != random_signs(1000, 8).tolist()
    assert abs(float(random_signs(10_000, 1).sum())) < 400


def test_a_size_from_a_hostile_file_costs_nothing_before_it_is_applied(monkeypatch):
    monkeypatch.setattr("bitmend.linalg.hadamard.factors", lambda size: pytest.fail("computed"))
    Rotation(2**20 - 1, 5).inverse  # noqa: B018  # its Hartley matrix would take 8 TB


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"a rotation of 4 x 2 must divide the width; got 12"):
        Rotation(4, inner=2).apply(torch.zeros(12))
    with pytest.raises(ValueError, match="at least 1"):
        Rotation(0)
