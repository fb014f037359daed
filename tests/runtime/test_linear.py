import copy

import pytest
import torch
from torch.nn import functional

from bitmend.runtime.linear import QuantLinear

SHAPES = [(1, 1), (5, 3), (33, 32), (64, 31), (97, 130), (128, 64)]


@pytest.mark.parametrize(("out", "columns"), SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_a_plain_linear_with_the_dequantised_weight(random_qtensor, monkeypatch, out, columns, bits, symmetric):
    monkeypatch.setattr("bitmend.runtime.packed._TILE_BYTES", 1)  # tiles of 32 rows, so that most shapes have several
    qtensor = random_qtensor(out, columns, bits, symmetric, 16)
    bias = torch.randn(out)
    layer = QuantLinear.from_qtensor(qtensor, bias)
    inputs = torch.randn(2, 3, columns)
    weight = qtensor.dequantize()
    # Both add the same products in another order: at most `columns` roundings of the largest partial sum.
    bound = columns * torch.finfo(torch.float32).eps * (inputs.abs() @ weight.abs().T + bias.abs()).max()
    assert (layer(inputs) - functional.linear(inputs, weight, bias)).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_uses_the_weight_rounded_once(random_qtensor, dtype):
    qtensor = random_qtensor(40, 64, 4, False, 16)
    layer = QuantLinear.from_qtensor(qtensor)
    inputs = torch.randn(5, 64).to(dtype)
    assert layer(inputs).dtype == dtype
    assert torch.equal(layer(inputs), functional.linear(inputs, qtensor.dequantize(dtype)))


def test_one_bit_symmetric_is_plus_and_minus_the_scale(random_qtensor):
    qtensor = random_qtensor(8, 16, 1, True)
    weight = QuantLinear.from_qtensor(qtensor).dequantize()
    assert torch.equal(weight.abs(), qtensor.qparams.scale.expand(8, 16))
    assert torch.equal(weight < 0, qtensor.codes == -1)


def test_an_empty_layer_has_the_tensors_of_a_finished_one(random_qtensor):
    qtensor = random_qtensor(10, 20, 3, False, 8, torch.bfloat16)
    finished = QuantLinear.from_qtensor(qtensor, torch.zeros(10))
    empty = QuantLinear(20, 10, qtensor.spec, bias=True, device="meta")
    kinds = {name: (value.dtype, value.shape) for name, value in empty.state_dict().items()}
    assert kinds == {name: (value.dtype, value.shape) for name, value in finished.state_dict().items()}
    assert set(kinds) == {"weight_packed", "weight_scale", "weight_zero_point", "bias"}
    assert "in_features=20, out_features=10, 3 bit asymmetric g8, bias=True" in repr(empty)


def test_loads_its_own_state(random_qtensor):
    qtensor = random_qtensor(10, 20, 3, False, 8)
    layer = QuantLinear(20, 10, qtensor.spec)
    layer.load_state_dict(QuantLinear.from_qtensor(qtensor).state_dict())
    assert torch.equal(layer.dequantize(), qtensor.dequantize())
    assert torch.equal(layer.packed.unpack().codes, qtensor.codes)


def test_changing_the_dtype_of_a_model_leaves_the_scales(random_qtensor):
    qtensor = random_qtensor(10, 20)
    layer = QuantLinear.from_qtensor(qtensor, torch.zeros(10)).to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.float32
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, qtensor.dequantize(torch.bfloat16))
    assert torch.equal(copy.deepcopy(layer).dequantize(), qtensor.dequantize())


def test_gradients_reach_the_input(random_qtensor, monkeypatch):
    monkeypatch.setattr("bitmend.runtime.packed._TILE_BYTES", 1)
    qtensor = random_qtensor(70, 12)
    inputs = torch.randn(3, 12, requires_grad=True)
    QuantLinear.from_qtensor(qtensor)(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, qtensor.dequantize().sum(0).expand(3, 12))
