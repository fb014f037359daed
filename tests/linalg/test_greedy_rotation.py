"""Rotations made for some numbers: by hand, by matrices, and against doing nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.linalg.greedy_rotation import (
    PATIENCE,
    BlockRotation,
    fit_block_rotation,
    greedy_steps,
    product_of_steps,
    small_matrix,
    zigzag,
)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 16, 128])
def test_the_small_matrix_is_orthogonal_with_an_even_first_row(block):
    matrix = small_matrix(block, 5)
    assert torch.allclose(matrix @ matrix.T, torch.eye(block, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix[0], torch.full((block,), 1 / math.sqrt(block), dtype=torch.float64))


def step_matrix(block, seed, feature):
    """The small matrix with its first row and column in the place of a feature."""
    swapped = torch.arange(block)
    swapped[0], swapped[feature] = feature, 0
    return small_matrix(block, seed)[swapped][:, swapped]


def test_the_product_is_that_of_the_steps_in_order():
    wanted = step_matrix(8, 3, 5) @ step_matrix(8, 3, 0) @ step_matrix(8, 3, 2)
    assert torch.allclose(product_of_steps(8, 3, (5, 0, 2)), wanted)


def test_one_step_spreads_the_feature_where_it_is_put():
    row = torch.zeros(8, dtype=torch.float64)
    row[5] = 4.0
    assert torch.allclose(row @ step_matrix(8, 0, 5), torch.full((8,), 4 / math.sqrt(8), dtype=torch.float64))


def test_zigzag_by_hand():
    # Sizes 8 > 7 > ... > 1 into two blocks of four: 8 left, 7 right; back: 6 right, 5 left; and so on.
    sizes = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert (sizes[zigzag(sizes, 4)]).tolist() == [8.0, 5.0, 4.0, 1.0, 7.0, 6.0, 3.0, 2.0]
    blocks = sizes[zigzag(sizes, 4)].view(2, 4)
    assert blocks.sum(1).tolist() == [18.0, 18.0]


def by_matrices(rotation):
    """The map as one matrix, from the definition."""
    width, blocks = rotation.size, rotation.size // rotation.block
    first, second = (
        torch.block_diag(*[product_of_steps(rotation.block, rotation.seed, steps)] * blocks)
        for steps in (rotation.first, rotation.second)
    )
    order = torch.zeros(width, width, dtype=torch.float64)
    for place, feature in enumerate(rotation.order):
        order[feature, place] = 1
    matrix = first @ order @ second
    return matrix.T if rotation.transposed else matrix


@given(st.integers(0, 30), st.sampled_from([(1, 4), (3, 2), (4, 3), (8, 2)]))
def test_by_matrices_and_undone(seed, sizes):
    block, blocks = sizes
    draw = torch.Generator().manual_seed(seed)
    order = tuple(torch.randperm(block * blocks, generator=draw).tolist())
    steps = tuple(torch.randint(block, (3,), generator=draw).tolist())
    rotation = BlockRotation(block, seed, steps, order, steps[: seed % 3])
    values = torch.randn(2, 3, block * blocks, generator=draw, dtype=torch.float64)
    for one in (rotation, rotation.inverse):
        assert torch.allclose(one.apply(values), values @ by_matrices(one))
    assert torch.allclose(rotation.inverse.apply(rotation.apply(values)), values)
    assert rotation.inverse.inverse == rotation
    half = values.bfloat16()
    assert torch.equal(rotation.apply(half), rotation.apply(half.float()).bfloat16())


def test_greedy_steps_lower_the_peak_and_stop_at_the_lowest():
    values = torch.randn(20, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:, 9] *= 50
    steps = greedy_steps(values, 16, 0, 40)
    assert steps[0] == 9

    def peak(count):
        return float((values.view(-1, 16) @ product_of_steps(16, 0, steps[:count])).abs().max())

    assert peak(len(steps)) < 0.5 * peak(0)
    assert peak(len(steps)) == min(peak(count) for count in range(len(steps) + 1))
    assert steps == greedy_steps(values, 16, 0, 40 + PATIENCE)[: len(steps)]
    assert greedy_steps(torch.ones(1, 2, dtype=torch.float64) / 7, 1, 0, 5) == ()  # nothing to win


def test_two_rotations_around_a_permutation_beat_one():
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values[:, :6] *= 30  # all large features in the first of four blocks
    plain, one, two = (
        float(rotated.abs().max())
        for rotated in (
            values,
            fit_block_rotation(values, 16, 0, 64, permute=False).apply(values),
            fit_block_rotation(values, 16, 0, 64, permute=True).apply(values),
        )
    )
    assert two < one < plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 3}, "must divide the width"),
        ({"block": 0}, "must divide the width"),
        ({"order": (0, 1, 1, 3)}, "must name each feature once"),
        ({"first": (2,)}, "must be features of a block of 2"),
        ({"second": (-1,)}, "must be features of a block of 2"),
    ],
)
def test_impossible_rotations_are_refused(change, message):
    keys = {"block": 2, "seed": 0, "first": (1,), "order": (0, 2, 1, 3), "second": (0,)}
    with pytest.raises(ValueError, match=message):
        BlockRotation(**{**keys, **change})
    with pytest.raises(ValueError, match="must have the width; got 3"):
        BlockRotation(**keys).apply(torch.zeros(3))
