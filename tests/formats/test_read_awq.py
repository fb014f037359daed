import pytest
import torch

from bitmend.errors import CheckpointError
from bitmend.formats.read_awq import AwqLayer, awq_layers
from bitmend.formats.safetensors_file import TensorRecord

I32, F16 = torch.int32, torch.float16
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
GOOD = {"m.qweight": (I32, (32, 2)), "m.qzeros": (I32, (2, 2)), "m.scales": (F16, (2, 16))}


def layers_of(shapes=GOOD, **changes):
    records = {name: TensorRecord(dtype, shape, 0, 0) for name, (dtype, shape) in shapes.items() if shape is not None}
    return awq_layers(records, {key: value for key, value in {**CONFIG, **changes}.items() if value is not None})


def signed(word):
    return word - (1 << 32) if word >> 31 else word


def test_one_word_a_row_by_hand():
    """Input channel 0 has the codes 1..8 for outputs 0..7, channel 1 has 8s; zero points 0..7 are stored as they are."""
    tensors = {
        "m.qweight": torch.tensor([[signed(0x86427531)], [signed(0x88888888)]], dtype=I32),
        "m.qzeros": torch.tensor([[signed(0x75316420)]], dtype=I32),
        "m.scales": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0.5]], dtype=F16),
    }
    weight = AwqLayer("m", (8, 2)).read(tensors).dense()
    assert weight[:, 0].tolist() == [1, 1, 1, 1, 1, 1, 1, 0.5]
    assert weight[:, 1].tolist() == [8, 7, 6, 5, 4, 3, 2, 0.5]


def test_groups_run_along_the_input():
    tensors = {
        "m.qweight": torch.zeros(4, 1, dtype=I32),
        "m.qzeros": torch.tensor([[0x11111111], [0x22222222]], dtype=I32),
        "m.scales": torch.tensor([[1.0] * 8, [0.25] * 8], dtype=F16),
    }
    assert AwqLayer("m", (8, 4)).read(tensors).dense()[0].tolist() == [-1, -1, -0.5, -0.5]


def test_headers_and_config():
    assert layers_of() == {"m": AwqLayer("m", (16, 32))}
    assert layers_of()["m"].bits == 4
    assert layers_of()["m"].parts == ("qweight", "qzeros", "scales")
    assert layers_of(bits=None, w_bit=4, group_size=None, q_group_size=16, version="GEMM") == layers_of()
    whole = GOOD | {"m.qzeros": (I32, (1, 2)), "m.scales": (F16, (1, 16))}
    assert layers_of(whole, group_size=-1, version=None) == layers_of()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": "gemv"}, "version must be gemm .*; got 'gemv'"),
        ({"version": 3}, "version must be gemm .*; got 3"),
        ({"bits": 8}, "bits must be 4 .*; got 8"),
        ({"bits": None}, "bits must be 4 .*; got None"),
        ({"group_size": 0}, "group_size must be a positive number of columns, or -1; got 0"),
        ({"group_size": None}, "group_size must be a positive number of columns, or -1; got None"),
        ({"group_size": 5}, "m has 32 input channels, which group_size 5 does not divide"),
        ({"group_size": 1 << 70}, "m has 32 input channels, which group_size .* does not divide"),
        ({"group_size": 8}, r"m\.qzeros must be int32 of shape \(4, 2\); got int32 of shape \(2, 2\)"),
    ],
)
def test_impossible_configs(changes, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        layers_of(**changes)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "sentence"),
    [
        ("qweight", I32, None, r"lacks the tensor m\.qweight"),
        ("qzeros", I32, None, r"lacks the tensor m\.qzeros"),
        ("scales", F16, None, r"lacks the tensor m\.scales"),
        ("qweight", torch.uint8, (32, 2), r"m\.qweight must be int32"),
        ("qweight", I32, (32,), r"m\.qweight must be int32 of shape \(any, any\)"),
        ("scales", F16, (2, 8), r"m\.scales must be .* of shape \(2, 16\)"),
        ("weight", F16, (16, 32), r"holds both m\.qweight and m\.weight"),
    ],
)
def test_impossible_headers(name, dtype, shape, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        layers_of(GOOD | {f"m.{name}": (dtype, shape)})


def test_nothing_quantised():
    with pytest.raises(CheckpointError, match="announces AWQ, but no tensor is called qweight"):
        layers_of({"m.weight": (F16, (16, 32))})
