import pytest
import torch

from bitmend.errors import CheckpointError
from bitmend.formats.read_compressed_tensors import (
    CompressedTensorsLayer,
    bits_of,
    compressed_tensors_layers,
    scheme_of,
)
from bitmend.formats.safetensors_file import TensorRecord

I32, F16 = torch.int32, torch.float16


def config(targets=("Linear",), stored="pack-quantized", **weights):
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 4, **weights}
    return {"format": stored, "config_groups": {"group_0": {"targets": list(targets), "weights": scheme}}}


def signed(word):
    return word - (1 << 32) if word >> 31 else word


def good():
    """Row 0 holds the levels -8 .. -1, row 1 the levels 0 .. 7."""
    return {
        "m.weight_packed": torch.tensor([[signed(0x76543210)], [signed(0xFEDCBA98)]], dtype=I32),
        "m.weight_scale": torch.tensor([[1.0, 0.5], [1.0, 2.0]], dtype=F16),
        "m.weight_shape": torch.tensor([2, 8]),
    }


def layers_of(tensors, described=None):
    records = {name: TensorRecord(tensor.dtype, tuple(tensor.shape), 0, 0) for name, tensor in tensors.items()}
    return compressed_tensors_layers(records, described or config(), tensors)


def test_four_bits_by_hand():
    layer = layers_of(good())["m"]
    assert layer == CompressedTensorsLayer("m", 4, (2, 8), 2, True, False)
    assert layer.parts == ("weight_packed", "weight_scale", "weight_shape")
    assert layer.read(good()).dense().tolist() == [[-8, -7, -6, -5, -2, -1.5, -1, -0.5], [0, 1, 2, 3, 8, 10, 12, 14]]


def test_zero_points_by_hand():
    """Signed zero points -2 and 3, packed along the output: unsigned 6 and 11 in the lowest fields."""
    tensors = good() | {"m.weight_zero_point": torch.tensor([[0xB6, 0xB6]], dtype=I32)}
    layer = layers_of(tensors, config(symmetric=False))["m"]
    assert layer.parts == ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    assert layer.read(tensors).dense()[:, 0].tolist() == [-6, -3]


def test_three_bits_cross_the_border_of_a_word():
    """Code 10 of the row has bits 30 and 31 of word 0 and bit 0 of word 1; the row ends in padding."""
    words = [signed(0b10 << 30), 0b1]
    tensors = {
        "m.weight_packed": torch.tensor([words], dtype=I32),
        "m.weight_scale": torch.ones(1, 1, dtype=F16),
        "m.weight_shape": torch.tensor([1, 11]),
    }
    weight = layers_of(tensors, config(num_bits=3, strategy="channel"))["m"].read(tensors).dense()
    assert weight.tolist() == [[-4.0] * 10 + [0b110 - 4.0]]


def test_activation_order_is_honoured():
    tensors = good() | {"m.weight_g_idx": torch.tensor([1, 0] * 4, dtype=I32)}
    layer = layers_of(tensors)["m"]
    assert layer.has_groups
    assert layer.read(tensors).dense()[0].tolist() == [-4, -7, -3, -5, -2, -3, -1, -1]


def test_exact_names_go_before_patterns_before_classes():
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 2}},
        "b": {"targets": ["re:.*down"], "weights": {"num_bits": 3}},
        "c": {"targets": ["x.down"], "weights": {"num_bits": 4}},
    }
    found = [bits_of(name, {"config_groups": groups}) for name in ("x.up", "y.down", "x.down")]
    assert found == [2, 3, 4]
    assert scheme_of("x.up", {"config_groups": groups, "format": "F"})["format"] == "F"


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("described", "sentence"),
    [
        ({"config_groups": []}, r"config_groups must be a table; got \[\]"),
        ({"config_groups": {"a": 3}}, "each of config_groups must be a table with a list of targets; got 3"),
        ({"config_groups": {"a": {"targets": [3]}}}, "each of config_groups must be a table with a list of targets"),
        (config(["other"]), "no group of quantization_config.config_groups targets the quantised module m"),
        (config(["re:("]), r"the target 're:\(' of config_groups is no valid pattern"),
        (config(num_bits=9), "num_bits of m must be a whole number from 1 to 8; got 9"),
        (config(num_bits="4"), "num_bits of m must be a whole number from 1 to 8; got '4'"),
        (config(type="float"), "m must hold whole numbers in the format pack-quantized; got type 'float'"),
        (config(stored="int-quantized"), "m must hold whole numbers in the format pack-quantized; .* 'int-quantized'"),
        (config(strategy="block"), "symmetric true or false and strategy group or channel; got True and 'block'"),
        (config(symmetric=None), "symmetric true or false and strategy group or channel; got None"),
        (config(group_size=0), "group_size of m must be a positive number of columns; got 0"),
        (config(group_size=3), "m has 8 input channels, which group_size 3 does not divide"),
        (config(group_size=8), r"m\.weight_scale must be .* of shape \(2, 1\); got float16 of shape \(2, 2\)"),
        (config(num_bits=5), r"m\.weight_shape says \(2, 8\), which at 5 bits does not fit m\.weight_packed of shape"),
        (config(symmetric=False), r"lacks the tensor m\.weight_zero_point"),
        ({**config(), "transform_config": {"a": 1}}, "transform_config and sparsity_config must be empty"),
    ],
)
def test_impossible_configs(described, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        layers_of(good(), described)


@pytest.mark.parametrize("pattern", ["re:((a|b|.)*)*!$", "re:(x+x+)+y", "re:(.*)*x", "re:(a){9}", "re:.*a.*b.*c.*d.*"])
def test_patterns_that_could_take_for_ever(pattern):
    with pytest.raises(
        CheckpointError, match="could take for ever to match 'm': at most 4 repeats, none of them of a group"
    ):
        layers_of(good(), config([pattern]))


def test_patterns_meet_no_name_of_any_length():
    with pytest.raises(CheckpointError, match="names of at most 200 letters are read; write the names out"):
        scheme_of("m" * 201, config([r"re:.*down"]))
    for pattern in (r"re:.*self_attn\.(q|k|v)_proj$", r"re:model\.layers\.\d+\..*", "re:m"):
        scheme_of("m", config([pattern, "m"]))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("weight_packed", torch.zeros(2, 1), r"m\.weight_packed must be int32 of shape \(any, any\); got float32"),
        ("weight_shape", torch.tensor([2, 8, 1]), r"m\.weight_shape must be int64 of shape \(2\); got int64"),
        ("weight_shape", torch.tensor([2, -8]), r"m\.weight_shape says \(2, -8\), which at 4 bits does not fit"),
        ("weight_shape", torch.tensor([2, 1 << 60]), r"says \(2, \d+\), which at 4 bits does not fit"),
        ("weight_shape", torch.tensor([1 << 60, 8]), r"says \(\d+, 8\), which at 4 bits does not fit"),
        ("weight_scale", torch.ones(2, 3), r"m\.weight_scale must be .* of shape \(2, 2\); got float32"),
        ("weight_g_idx", torch.zeros(7, dtype=I32), r"m\.weight_g_idx must be int32 of shape \(8\)"),
        ("weight", torch.zeros(2, 8), r"holds both m\.weight_packed and m\.weight"),
    ],
)
def test_impossible_tensors(name, value, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        layers_of(good() | {f"m.{name}": value})


def test_missing_tensors():
    for name in good():
        tensors = good()
        del tensors[name]
        sentence = "no tensor is called weight_packed" if "packed" in name else f"lacks the tensor {name}"
        with pytest.raises(CheckpointError, match=sentence):
            layers_of(tensors)
