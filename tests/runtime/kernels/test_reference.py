import pytest
import torch
from torch.nn import functional

from bitmend.runtime.kernels.reference import linear
from bitmend.runtime.packed import PackedWeight, pack


@pytest.fixture
def heights(monkeypatch):
    """Collect how many rows are dequantised at once, with tiles as small as they get."""
    monkeypatch.setattr("bitmend.runtime.packed._TILE_BYTES", 1)
    found = []
    rows = PackedWeight.rows

    def counted(self, start, stop, dtype):
        found.append(stop - start)
        return rows(self, start, stop, dtype)

    monkeypatch.setattr(PackedWeight, "rows", counted)
    return found


def test_never_holds_the_whole_matrix(random_qtensor, heights):
    linear(torch.randn(1, 12), pack(random_qtensor(100, 12)), None)
    assert heights == [32, 32, 32, 4]


def test_tiles_are_joined_in_order(random_qtensor, heights):
    qtensor, bias, inputs = random_qtensor(100, 12), torch.randn(100), torch.randn(2, 3, 12)
    outputs = linear(inputs, pack(qtensor), bias)
    torch.testing.assert_close(outputs, functional.linear(inputs, qtensor.dequantize(), bias))


def test_a_bias_of_another_dtype_is_cast(random_qtensor):
    outputs = linear(torch.randn(2, 12).bfloat16(), pack(random_qtensor(5, 12)), torch.randn(5))
    assert outputs.dtype == torch.bfloat16
