import pytest
import torch

from bitmend.errors import RecipeError
from bitmend.numerics.granularity import (
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    divisors_text,
    group_of_column,
    num_groups,
)


@pytest.mark.parametrize(
    ("granularity", "groups"), [(PerTensor(), 1), (PerChannel(), 1), (PerToken(), 1), (PerGroup(3), 2)]
)
def test_the_table_of_the_docstring(granularity, groups):
    assert num_groups(granularity, 6) == groups


def test_columns_know_their_group():
    assert group_of_column(PerGroup(2), 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert group_of_column(PerGroup(4, ragged=True), 6).tolist() == [0, 0, 0, 0, 1, 1]
    assert group_of_column(PerChannel(), 3).tolist() == [0, 0, 0]


def test_a_width_that_the_group_does_not_divide_names_the_divisors():
    with pytest.raises(
        RecipeError, match="group_size 128 for 172 input channels, whose divisors are 1, 2, 4, 43, 86, 172"
    ):
        num_groups(PerGroup(128), 172)
    assert num_groups(PerGroup(128, ragged=True), 172) == 2


@pytest.mark.parametrize("size", [0, -2])
def test_a_group_has_at_least_one_column(size):
    with pytest.raises(RecipeError, match=f"group_size must be a positive number of columns.*got {size}"):
        PerGroup(size)


def test_divisors_of_a_prime():
    assert divisors_text(7) == "1, 7"
    assert torch.tensor([int(d) for d in divisors_text(1024).split(", ")]).numel() == 11
