import pytest
import torch

from bitmend.errors import CheckpointError
from bitmend.formats.read_gptq import GptqConfig, GptqLayer, gptq_config, gptq_layers
from bitmend.formats.safetensors_file import TensorRecord


def words(values, bits):
    """Pack unsigned numbers as one long number, lowest first: the layout of this format written as arithmetic."""
    total = sum(value << (bits * place) for place, value in enumerate(values))
    found = [(total >> (32 * place)) & 0xFFFFFFFF for place in range(len(values) * bits // 32)]
    return torch.tensor([word - (1 << 32) if word >> 31 else word for word in found], dtype=torch.int32)


def tensors_of(codes, zeros, scales, bits, group=None):
    """`codes` (out, in), `zeros` as stored (groups, out), `scales` (groups, out)."""
    tensors = {
        "m.qweight": torch.stack([words(row, bits) for row in codes], dim=1),
        "m.qzeros": torch.stack([words(row, bits) for row in zeros]),
        "m.scales": torch.tensor(scales, dtype=torch.float16),
    }
    return tensors if group is None else tensors | {"m.g_idx": torch.tensor(group, dtype=torch.int32)}


def records_of(tensors):
    return {name: TensorRecord(tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes) for name, tensor in tensors.items()}


def config(**changes):
    return gptq_config({"bits": 4, "group_size": 4, "sym": True, "checkpoint_format": "gptq", **changes})


def test_four_bits_by_hand():
    """One word of codes for each output; two groups of four input channels; the stored zero point is one too small."""
    codes = [list(range(8))] * 8
    zeros = [[7] * 8, [3] * 8]
    tensors = tensors_of(codes, zeros, [[1.0] * 8, [0.5] * 8], 4)
    assert tensors["m.qweight"].tolist() == [[0x76543210] * 8]
    assert tensors["m.qzeros"].tolist() == [[0x77777777], [0x33333333]]
    layer = gptq_layers(records_of(tensors), config())["m"]
    assert (layer.bits, layer.shape, layer.groups, layer.parts) == (4, (8, 8), 2, ("qweight", "qzeros", "scales"))
    expected = torch.tensor([-8.0, -7.0, -6.0, -5.0, 0.0, 0.5, 1.0, 1.5])
    assert torch.equal(layer.read(tensors).dense(), expected.expand(8, 8))
    second = GptqLayer("m", 4, (8, 8), 2, False, version=2)
    expected = torch.tensor([-7.0, -6.0, -5.0, -4.0, 0.5, 1.0, 1.5, 2.0])
    assert torch.equal(second.read(tensors).dense(), expected.expand(8, 8))


@pytest.mark.parametrize("version", [1, 2])
def test_three_bits_cross_the_borders_of_words(version):
    """32 codes in 3 words: code 10 has bits 30 and 31 of word 0 and bit 0 of word 1, code 21 one and two of the next."""
    row = [0] * 32
    row[10], row[21] = 0b110, 0b101
    codes = [row] * 32
    zeros = [[4 if place % 2 else 1 for place in range(32)]]
    tensors = tensors_of(codes, zeros, [[1.0] * 32], 3)
    assert [word & 0xFFFFFFFF for word in tensors["m.qweight"][:, 0].tolist()] == [2 << 30, (1 << 0) | (1 << 31), 2]
    layer = GptqLayer("m", 3, (32, 32), 1, False, version)
    assert gptq_layers(records_of(tensors), config(bits=3, group_size=-1)) == {
        "m": GptqLayer("m", 3, (32, 32), 1, False)
    }
    weight = layer.read(tensors).dense()
    zero = torch.tensor([float(value) for value in zeros[0]]) + (2 - version)
    assert torch.equal(weight, torch.tensor(row).float() - zero[:, None])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_zero_point_that_version_one_can_store(bits):
    top, out = 2**bits - 1, 32
    stored = [[place % top for place in range(out)]]  # 0 .. top - 1
    tensors = tensors_of([[0] * 32] * out, stored, [[1.0] * out], bits)
    layer = GptqLayer("m", bits, (out, 32), 1, False, version=1)
    assert layer.stored_zero_point(tensors)[:, 0].tolist() == stored[0]
    assert torch.equal(-layer.read(tensors).dense()[:, 0], torch.tensor(stored[0]).float() + 1)


def test_a_zero_point_of_zero_has_borrowed_from_its_neighbour():
    """GPTQModel subtracts 0x11111111 from the whole word, so 0x..50 becomes 0x..3F: not 4 and 15, but 3 and 15."""
    true = [0, 5, 8, 8, 8, 8, 8, 8]
    tensors = tensors_of([[0] * 8] * 8, [true], [[1.0] * 8], 4)
    tensors["m.qzeros"] = tensors["m.qzeros"] - 0x11111111
    layer = GptqLayer("m", 4, (8, 8), 1, False, version=1)
    assert layer.stored_zero_point(tensors)[:2, 0].tolist() == [15, 3]
    assert (-layer.read(tensors).dense()[:, 0]).tolist() == true


def test_three_bit_zero_points_wrap_each_by_itself():
    tensors = tensors_of([[0] * 32] * 32, [[7] + [3] * 31], [[1.0] * 32], 3)
    layer = GptqLayer("m", 3, (32, 32), 1, False, version=1)
    assert (-layer.read(tensors).dense()[:2, 0]).tolist() == [0, 4]


def test_activation_order_is_honoured():
    group = [1, 0, 1, 0, 1, 0, 1, 0]
    tensors = tensors_of([[8] * 8] * 8, [[6] * 8, [7] * 8], [[1.0] * 8, [0.5] * 8], 4, group)
    layer = gptq_layers(records_of(tensors), config(desc_act=True))["m"]
    assert layer.parts[-1] == "g_idx"
    assert layer.read(tensors).dense()[0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_negative_scales_are_scales():
    tensors = tensors_of([[9] * 8] * 8, [[7] * 8], [[-0.5] * 8], 4)
    assert GptqLayer("m", 4, (8, 8), 1, False).read(tensors).dense()[0, 0] == -0.5


def test_shapes_decide_where_layers_have_settings_of_their_own():
    tensors = tensors_of([[8] * 8] * 8, [[7] * 8] * 2, [[1.0] * 8] * 2, 4)
    found = gptq_layers(records_of(tensors), config(bits=2, group_size=64, dynamic={"+:m": {"bits": 4}}))
    assert (found["m"].bits, found["m"].groups) == (4, 2)


# ---------------------------------------------------------------------------------------------- config
def test_config_keys():
    assert config() == GptqConfig(4, 4, True, False, False, 1)
    assert config(checkpoint_format="gptq_v2").version == 2
    assert gptq_config({"bits": 3}) == GptqConfig(3, -1, None, False, False, None)
    assert gptq_config({"bits": 3, "format": "gptq_v2"}).version == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"checkpoint_format": "marlin"}, "checkpoint_format must be gptq or gptq_v2 .*; got 'marlin'"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format must be gptq or gptq_v2"),
        ({"is_marlin_format": True}, "checkpoint_format must be gptq or gptq_v2 .*; got .*marlin"),
        ({"bits": 5}, "bits must be 2, 3, 4 or 8 .*; got 5"),
        ({"bits": "4"}, "bits must be 2, 3, 4 or 8 .*; got '4'"),
        ({"bits": True}, "bits must be 2, 3, 4 or 8 .*; got True"),
        ({"group_size": 0}, "group_size must be a positive number of columns, or -1; got 0"),
        ({"group_size": -7}, "group_size must be a positive number of columns, or -1; got -7"),
        ({"group_size": 1.5}, "group_size must be a positive number"),
        ({"sym": "yes"}, "sym and desc_act must be true or false; got 'yes' and False"),
        ({"desc_act": None}, "sym and desc_act must be true or false; got True and None"),
    ],
)
def test_impossible_configs(changes, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        config(**changes)


# ---------------------------------------------------------------------------------------------- hostile headers
I32, F16 = torch.int32, torch.float16
GOOD = {"m.qweight": (I32, (4, 16)), "m.qzeros": (I32, (2, 2)), "m.scales": (F16, (2, 16)), "m.g_idx": (I32, (32,))}


def layers_of(shapes, **changes):
    records = {name: TensorRecord(dtype, shape, 0, 0) for name, (dtype, shape) in shapes.items() if shape is not None}
    return gptq_layers(records, config(group_size=16, **changes))


def test_good_headers():
    assert layers_of(GOOD) == {"m": GptqLayer("m", 4, (16, 32), 2, True)}


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "sentence"),
    [
        ("qweight", I32, None, r"the checkpoint lacks the tensor m\.qweight"),
        ("qzeros", I32, None, r"the checkpoint lacks the tensor m\.qzeros"),
        ("scales", F16, None, r"the checkpoint lacks the tensor m\.scales"),
        ("qweight", torch.int64, (4, 16), r"m\.qweight must be int32 of shape \(any, any\); got int64"),
        (
            "qweight",
            I32,
            (4, 16, 1),
            r"m\.qweight must be int32 of shape \(any, any\); got int32 of shape \(4, 16, 1\)",
        ),
        ("qweight", I32, (0, 16), r"m\.qweight must be int32 of shape \(any, any\); got int32 of shape \(0, 16\)"),
        ("qweight", I32, (4, 24), r"m\.scales must be .* of shape \(2, 24\)"),
        (
            "qzeros",
            I32,
            (2, 3),
            r"the shapes of m\.qweight \(4, 16\) and m\.qzeros \(groups, 3\) do not belong to codes",
        ),
        ("qzeros", I32, (2, 1), "do not belong to codes of 4 bits"),  # would be 2 bits
        ("qzeros", torch.uint8, (2, 2), r"m\.qzeros must be int32"),
        ("scales", I32, (2, 16), r"m\.scales must be float16 or bfloat16 or float32 of shape \(2, 16\); got int32"),
        ("scales", F16, (3, 16), r"m\.scales must be .* got float16 of shape \(3, 16\)"),
        ("g_idx", torch.int64, (32,), r"m\.g_idx must be int32 of shape \(32\); got int64"),
        ("g_idx", I32, (31,), r"m\.g_idx must be int32 of shape \(32\); got int32 of shape \(31,\)"),
        ("weight", F16, (16, 32), r"holds both m\.qweight and m\.weight; only one can be the weight"),
    ],
)
def test_impossible_headers(name, dtype, shape, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        layers_of(GOOD | {f"m.{name}": (dtype, shape)})


def test_groups_that_do_not_fit():
    with pytest.raises(CheckpointError, match=r"m has 32 input channels and scales for 3 groups, .* group_size 16"):
        layers_of(GOOD | {"m.qzeros": (I32, (3, 2)), "m.scales": (F16, (3, 16))})
    irregular = {"m.qzeros": (I32, (3, 2)), "m.scales": (F16, (3, 16)), "m.g_idx": (I32, None)}
    with pytest.raises(CheckpointError, match="scales for 3 groups"):
        layers_of(GOOD | irregular, dynamic={"+:m": {}})
    too_many = {"m.qzeros": (I32, (64, 2)), "m.scales": (F16, (64, 16))}
    with pytest.raises(CheckpointError, match="scales for 64 groups"):
        layers_of(GOOD | too_many, dynamic={"+:m": {}})


def test_activation_order_needs_its_groups():
    with pytest.raises(CheckpointError, match=r"lacks the tensor m\.g_idx, which desc_act = true needs"):
        layers_of(GOOD | {"m.g_idx": (I32, None)}, desc_act=True)


def test_nothing_quantised():
    with pytest.raises(CheckpointError, match="announces GPTQ, but no tensor is called qweight"):
        layers_of({"m.weight": (F16, (16, 32))})
