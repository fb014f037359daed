import pytest
import torch

from bitmend.errors import CheckpointError
from bitmend.formats.affine import AffineWeight, finite_scale, group_tensor_or_none, valid_groups

CODES = torch.tensor([[0, 1, 2, 3], [-4, -3, -2, -1]], dtype=torch.int8)
SCALE = torch.tensor([[1.0, 10.0], [0.5, -2.0]])


def test_neighbours_share_a_group_by_hand():
    zero_point = torch.tensor([[1, 2], [-4, 0]], dtype=torch.int16)
    expected = torch.tensor([[-1.0, 0.0, 0.0, 10.0], [0.0, 0.5, 4.0, 2.0]])
    assert torch.equal(AffineWeight(CODES, zero_point, SCALE).dense(), expected)


def test_columns_in_another_order_by_hand():
    group = torch.tensor([1, 0, 1, 0])
    expected = torch.tensor([[0.0, 1.0, 20.0, 3.0], [8.0, -1.5, 4.0, -0.5]])
    assert torch.equal(AffineWeight(CODES, None, SCALE, group).dense(), expected)


def test_half_precision_scales_are_multiplied_in_float32():
    scale = torch.tensor([[0.1], [0.1]], dtype=torch.float16)
    weight = AffineWeight(CODES, None, scale).dense()
    assert weight.dtype == torch.float32
    assert torch.equal(weight, CODES.float() * scale.float())


def test_regular_groups_need_no_tensor():
    assert group_tensor_or_none(torch.tensor([0, 0, 1, 1], dtype=torch.int32), 2) is None
    for irregular in ([0, 1, 0, 1], [0, 0, 0, 1]):
        group = torch.tensor(irregular, dtype=torch.int32)
        assert group_tensor_or_none(group, 2) is group
    assert group_tensor_or_none(torch.tensor([0, 0, 1]), 2) is not None  # a shorter last group


@pytest.mark.parametrize("bad", [-1, 2])
def test_groups_that_do_not_exist(bad):
    tensors = {"m.g_idx": torch.tensor([0, bad, 1], dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"m\.g_idx must hold numbers from 0 to 1, .*; got "):
        valid_groups(tensors, "m.g_idx", 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers(bad):
    with pytest.raises(CheckpointError, match=r"m\.scales must hold finite scales; some are infinite or NaN"):
        finite_scale({"m.scales": torch.tensor([[1.0, bad]])}, "m.scales")
