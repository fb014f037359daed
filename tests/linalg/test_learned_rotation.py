import pytest
import torch

from bitmend.linalg.hadamard import Rotation
from bitmend.linalg.learned_rotation import (
    STEP,
    LearnedRotation,
    codes_of,
    generator_of,
    learned_size,
    num_codes,
    rotated_by,
)


def learned(base, seed=0, **more):
    draw = torch.Generator().manual_seed(seed)
    size = learned_size(base)
    codes = torch.randint(-3000, 3000, (num_codes(size),), generator=draw, dtype=torch.int16)
    return LearnedRotation(base, lambda: codes, **more)


def test_two_features_by_hand():
    # A = ((0, a), (-a, 0)): C = ((1 - a^2, -2 a), (2 a, 1 - a^2)) / (1 + a^2). With a = 1/2: ((3, -4), (4, 3)) / 5.
    codes = torch.tensor([round(0.5 / STEP)], dtype=torch.int16)
    turn = torch.tensor([[3.0, -4.0], [4.0, 3.0]], dtype=torch.float64) / 5
    torch.testing.assert_close(rotated_by(Rotation(1), torch.zeros(1, 1).double()), torch.ones(1, 1).double())
    base = Rotation(2)
    torch.testing.assert_close(LearnedRotation(base, lambda: codes).matrix(), base.matrix() @ turn)


@pytest.mark.parametrize("base", [Rotation(7, 1), Rotation(16), Rotation(24, 5, keeps_mean=True)], ids=str)
def test_orthogonal_whatever_was_learned(base):
    rotation = learned(base)
    matrix = rotation.matrix()
    eye = torch.eye(base.size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye)
    assert float((matrix - base.matrix()).norm()) > 0.5  # and not where it started
    values = torch.randn(3, base.size, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(values), values @ matrix)
    torch.testing.assert_close(rotation.inverse.apply(rotation.apply(values)), values)
    if base.keeps_mean:
        ones = torch.ones(base.size, dtype=torch.float64)
        torch.testing.assert_close(ones @ matrix, ones)


def test_nothing_learned_is_where_it_started():
    base = Rotation(12, 3)
    rotation = LearnedRotation(base, lambda: torch.zeros(num_codes(12), dtype=torch.int16))
    torch.testing.assert_close(rotation.matrix(), base.matrix())


def test_blocks_are_rotated_alike_and_dtypes_kept():
    rotation = learned(Rotation(4))
    values = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    expected = (values.float().reshape(-1, 4) @ rotation.matrix().float()).reshape(2, 3, 8).bfloat16()
    assert torch.equal(rotation.apply(values), expected)
    with pytest.raises(ValueError, match="a rotation of 4 features must divide the width; got 6"):
        rotation.apply(torch.zeros(1, 6))


def test_codes_there_and_back():
    upper = generator_of(torch.tensor([1, -2, 32767], dtype=torch.int16), 3)
    assert upper.tolist() == [[0, STEP, -2 * STEP], [0, 0, 32767 * STEP], [0, 0, 0]]
    assert codes_of(upper).tolist() == [1, -2, 32767]
    assert codes_of(torch.full((2, 2), 1e9)).tolist() == [32767]  # what lies beyond 2 goes to the end
    with pytest.raises(ValueError, match=r"needs 3 codes; got \(2,\)"):
        generator_of(torch.zeros(2, dtype=torch.int16), 3)


@pytest.mark.parametrize("base", [Rotation(4), Rotation(5, keeps_mean=True)], ids=str)
def test_gradients_of_the_matrix(base):
    size = learned_size(base)
    upper = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 3
    assert torch.autograd.gradcheck(lambda one: rotated_by(base, one), upper.requires_grad_())


@pytest.mark.parametrize("base", [Rotation(4, inner=2), Rotation(4, transposed=True)], ids=str)
def test_where_learning_cannot_start(base):
    with pytest.raises(ValueError, match="starts from one of single features that is not undone"):
        LearnedRotation(base, lambda: torch.zeros(6, dtype=torch.int16))


def test_other_codes_in_the_same_place_are_another_rotation():
    codes = torch.full((1,), 1000, dtype=torch.int16)
    rotation = LearnedRotation(Rotation(2), lambda: codes)
    values = torch.tensor([[1.0, 2.0]])
    before = rotation.apply(values)
    codes.fill_(-1000)
    assert not torch.allclose(rotation.apply(values), before)


def test_a_first_call_without_gradients_does_not_forbid_later_ones():
    rotation = learned(Rotation(4))
    with torch.inference_mode():
        rotation.apply(torch.ones(1, 4))
    values = torch.ones(1, 4, requires_grad=True)
    rotation.apply(values).sum().backward()
    torch.testing.assert_close(values.grad, rotation.matrix().float().sum(1).unsqueeze(0))
