import pytest
import torch

from bitmend.numerics import products
from bitmend.numerics.products import FastLinear, FastLinearWithGradient, linear, product


def assert_close(found, expected):
    # float32 with sums of up to 1,000 terms: a half-precision path would be off by 1e-3.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(params=["onednn", "without"])
def library(request, monkeypatch):
    if request.param == "onednn" and products._ONEDNN_LINEAR is None:
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_slower", lambda: request.param == "without")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(7,), (3, 5), (0,), (2, 0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_product_in_float32(shape, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 1000), torch.randn(1000, 33).T
    bias = torch.randn(33) if with_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = linear(x, weight, bias)
    assert found.shape == (*shape, 33)
    assert found.dtype == torch.float32
    if found.numel():
        assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_torch(dtype, monkeypatch):
    monkeypatch.setattr(products, "bfloat16_is_slower", lambda: False)
    x, weight = torch.randn(4, 8).to(dtype), torch.randn(3, 8).to(dtype)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 700), (1, 2, 3)])
def test_widened_products_are_the_exact_ones_rounded_once(shape, with_bias, monkeypatch):
    monkeypatch.setattr(products, "bfloat16_is_slower", lambda: True)
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, 300).bfloat16(), torch.randn(40, 300).bfloat16()
    bias = torch.randn(40).bfloat16() if with_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    # Half a unit in the last place of each value, and what float32 sums leave.
    slack = exact.abs() * 2**-8 + 1e-4
    assert torch.all((found.double() - exact).abs() <= slack)


@pytest.mark.parametrize(
    ("units", "slow"),
    [
        ({"architecture": "x86_64", "cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, False),
        ({"architecture": "x86_64", "cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "cpu_name": "AMD EPYC", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "cpu_name": "AMD EPYC"}, True),
        ({"architecture": "aarch64", "cpu_name": "Neoverse"}, False),
        ({}, False),
    ],
)
def test_where_bfloat16_is_widened(units, slow, monkeypatch):
    monkeypatch.setattr(products, "_capabilities", lambda: units)
    products.bfloat16_is_slower.cache_clear()
    try:
        assert products.bfloat16_is_slower() is slow
    finally:
        products.bfloat16_is_slower.cache_clear()


def test_the_kind_of_products_is_told(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_slower", lambda: False)
    monkeypatch.setattr(products, "bfloat16_is_slower", lambda: True)
    assert products.kind() == "float32 by oneDNN, bfloat16 widened"


def test_gradients_are_not_lost():
    weight = torch.randn(3, 8, requires_grad=True)
    x = torch.randn(4, 8)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 8))
    layer = torch.nn.Linear(8, 3)
    with FastLinear():
        layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(3, 8))


def test_layers_within_reach_use_it(monkeypatch):
    calls = []
    monkeypatch.setattr(products, "linear", lambda *arguments: calls.append(len(arguments)) or torch.zeros(1))
    layer = torch.nn.Linear(8, 3)
    with FastLinear(), torch.no_grad():
        assert layer(torch.randn(4, 8)).shape == (1,)
    with torch.no_grad():
        assert layer(torch.randn(4, 8)).shape == (4, 3)
    assert calls == [3]


def test_unusual_arguments_are_left_to_torch():
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    assert torch.equal(linear(x, weight[0]), torch.nn.functional.linear(x, weight[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@pytest.mark.skipif(products._ONEDNN_LINEAR is None, reason="this build of torch has no oneDNN")
def test_parts_of_other_tensors_are_copied_first(monkeypatch):
    """oneDNN multiplies them by a reference loop, a thousand times slower; the answer is right either way."""
    original, seen = products._ONEDNN_LINEAR, []
    monkeypatch.setattr(products, "onednn_is_slower", lambda: False)

    def spy(inputs, weight, *rest):
        seen.append(inputs.is_contiguous() and weight.is_contiguous())
        return original(inputs, weight, *rest)

    monkeypatch.setattr(products, "_ONEDNN_LINEAR", spy)
    x = torch.randn(12, 10)
    for inputs, weight in ((x[:, 2:6], x[3:7, 1:5]), (x.T[:4], x.T[4:]), (x.T, x.T)):
        assert_close(linear(inputs, weight), inputs.double() @ weight.double().T)
    assert seen == [True] * 3


@pytest.mark.parametrize("bias", [True, False])
def test_products_with_a_gradient_of_their_inputs(bias):
    layer = torch.nn.Linear(5, 3, bias=bias)
    inputs = torch.randn(2, 4, 5)
    found, wanted = (inputs.clone().requires_grad_() for _ in range(2))
    (layer(wanted).square().sum()).backward()
    layer.requires_grad_(False)
    with FastLinearWithGradient():
        result = layer(found)
        torch.testing.assert_close(result, layer(inputs))
        by_name = torch.nn.functional.linear(input=inputs, weight=layer.weight, bias=layer.bias)
        torch.testing.assert_close(by_name, layer(inputs))
    (result.square().sum()).backward()
    torch.testing.assert_close(found.grad, wanted.grad)


def test_products_with_gradients_of_both():
    draw = torch.Generator().manual_seed(0)
    left, right, weights = (torch.randn(*shape, generator=draw) for shape in ((4, 5), (5, 3), (4, 3)))
    pairs = [[one.clone().requires_grad_() for one in (left, right)] for _ in range(2)]
    (product(*pairs[0]) * weights).sum().backward()
    (pairs[1][0] @ pairs[1][1] * weights).sum().backward()
    torch.testing.assert_close(product(left, right), left @ right)
    for found, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
