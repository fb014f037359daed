import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitmend.errors import RecipeError, RequestError
from bitmend.runtime.conv import QuantConv2d

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (5, 3), "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
]


def matrix_of(random_qtensor, layer, *scheme):
    """A quantised matrix of the shape of the layer's weight."""
    return random_qtensor(layer.out_channels, layer.weight[0].numel(), *scheme)


def computed(layer, weight, pictures):
    bias = None if layer.bias is None else layer.bias.to(pictures.dtype)
    weight = weight.view(layer.weight.shape)
    return functional.conv2d(pictures, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda one: "-".join(map(str, one.values())))
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_a_convolution_with_the_dequantised_weight_bit_for_bit(random_qtensor, geometry, groups, dtype, bias):
    dense = nn.Conv2d(4, 8, groups=groups, bias=bias, **geometry).to(dtype)
    qtensor = matrix_of(random_qtensor, dense, 4, False, 5)
    layer = QuantConv2d.from_qtensor(qtensor, dense)
    pictures = torch.randn(2, 4, 9, 11).to(dtype)
    assert layer(pictures).dtype == dtype
    assert torch.equal(layer(pictures), computed(dense, qtensor.dequantize(dtype), pictures))
    assert torch.equal(layer(pictures[0]), computed(dense, qtensor.dequantize(dtype), pictures[0]))


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 16])
def test_every_kind_of_grid(random_qtensor, monkeypatch, bits, symmetric, group_size):
    monkeypatch.setattr("bitmend.runtime.packed._TILE_BYTES", 1)
    dense = nn.Conv2d(3, 40, 3)
    qtensor = matrix_of(random_qtensor, dense, bits, symmetric, group_size)
    layer = QuantConv2d.from_qtensor(qtensor, dense)
    pictures = torch.randn(1, 3, 5, 6)
    assert torch.equal(layer(pictures), computed(dense, qtensor.dequantize(), pictures))
    assert torch.equal(layer.dequantize(), qtensor.dequantize())
    assert torch.equal(layer.weight, qtensor.dequantize().view(40, 3, 3, 3))


def test_by_hand(random_qtensor):
    """A kernel of 1 x 2 over two channels: the codes of a row are channel 0 left, right, then channel 1."""
    dense = nn.Conv2d(2, 1, (1, 2))
    qtensor = random_qtensor(1, 4)
    qtensor.codes.copy_(torch.tensor([[1, 2, 3, 4]]))
    qtensor.qparams.scale.fill_(0.5)
    with torch.no_grad():
        dense.bias.fill_(-1)
    layer = QuantConv2d.from_qtensor(qtensor, dense)
    picture = torch.tensor([[[10.0, 20.0]], [[30.0, 40.0]]])
    assert layer(picture).tolist() == [[[0.5 * (10 + 40 + 90 + 160) - 1]]]


def test_an_empty_layer_has_the_tensors_of_a_finished_one(random_qtensor):
    dense = nn.Conv2d(4, 10, (3, 2), stride=2, padding=1, groups=2)
    qtensor = matrix_of(random_qtensor, dense, 3, False, 5, torch.bfloat16)
    finished = QuantConv2d.from_qtensor(qtensor, dense)
    empty = QuantConv2d(dense, qtensor.spec, device="meta")
    kinds = {name: (value.dtype, value.shape) for name, value in empty.state_dict().items()}
    assert kinds == {name: (value.dtype, value.shape) for name, value in finished.state_dict().items()}
    assert set(kinds) == {"weight_packed", "weight_scale", "weight_zero_point", "bias"}
    assert all(value.is_meta for value in empty.state_dict().values())
    shape = "4, 10, kernel_size=(3, 2), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=2"
    assert f"QuantConv2d({shape}, 3 bit asymmetric g5, bias=True)" in repr(empty)


def test_is_made_where_and_as_what_the_layer_is(random_qtensor):
    spec = random_qtensor(1, 1).spec
    dense = nn.Conv2d(2, 3, 1, device="meta", dtype=torch.bfloat16)
    assert QuantConv2d(dense, spec).bias.device.type == "meta"
    assert QuantConv2d(dense, spec).bias.dtype == QuantConv2d(dense, spec).weight.dtype == torch.bfloat16
    assert QuantConv2d(dense, spec, dtype=torch.float16, device="cpu").bias.dtype == torch.float16
    assert QuantConv2d(dense, spec, device="cpu").weight_packed.device.type == "cpu"


def test_loads_its_own_state(random_qtensor):
    dense = nn.Conv2d(4, 10, 3)
    qtensor = matrix_of(random_qtensor, dense, 3, False, 12)
    layer = QuantConv2d(dense, qtensor.spec)
    layer.load_state_dict(QuantConv2d.from_qtensor(qtensor, dense).state_dict())
    assert torch.equal(layer.dequantize(), qtensor.dequantize())
    assert torch.equal(layer.packed.unpack().codes, qtensor.codes)
    assert torch.equal(layer.bias, dense.bias)


def test_changing_the_dtype_of_a_model_leaves_the_scales(random_qtensor):
    dense = nn.Conv2d(4, 10, 3)
    qtensor = matrix_of(random_qtensor, dense)
    layer = QuantConv2d.from_qtensor(qtensor, dense).to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.float32
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.flatten(1), qtensor.dequantize(torch.bfloat16))
    assert torch.equal(copy.deepcopy(layer).dequantize(), qtensor.dequantize())
    half = torch.randn(1, 4, 5, 5).to(torch.bfloat16)
    assert torch.equal(layer(half), computed(dense, qtensor.dequantize(torch.bfloat16), half))


def test_gradients_reach_the_input(random_qtensor):
    dense = nn.Conv2d(4, 6, 3)
    qtensor = matrix_of(random_qtensor, dense)
    packed, plain = (torch.ones(1, 4, 5, 5, requires_grad=True) for _ in range(2))
    QuantConv2d.from_qtensor(qtensor, dense)(packed).sum().backward()
    computed(dense, qtensor.dequantize(), plain).sum().backward()
    assert torch.equal(packed.grad, plain.grad)
    assert bool(packed.grad.any())


def test_what_does_not_fit_is_refused(random_qtensor):
    dense = nn.Conv2d(4, 6, 3, groups=2)
    with pytest.raises(RequestError, match=r"is a matrix of \(6, 18\); got \(6, 36\); quantise its weight\.flatten"):
        QuantConv2d.from_qtensor(random_qtensor(6, 36), dense)
    with pytest.raises(RequestError, match="pads with zeros; got padding_mode 'circular'; leave that layer as it is"):
        QuantConv2d(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), random_qtensor(6, 36).spec)
    ragged = random_qtensor(6, 36, 4, True, 16).spec
    strict = type(ragged)(ragged.grid, type(ragged.granularity)(16))
    with pytest.raises(RecipeError, match="got group_size 16 for 18 input channels"):
        QuantConv2d(dense, strict)
