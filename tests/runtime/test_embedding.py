import pytest
import torch
from torch import nn
from torch.nn import functional

from bitmend.runtime.embedding import QuantEmbedding, TiedQuantHead


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_a_plain_embedding(random_qtensor, bits, symmetric, group_size, dtype):
    qtensor = random_qtensor(50, 24, bits, symmetric, group_size)
    layer = QuantEmbedding.from_qtensor(qtensor, dtype)
    ids = torch.tensor([[0, 49, 7], [7, 31, 32]])
    assert torch.equal(layer(ids), functional.embedding(ids, qtensor.dequantize(dtype)))
    assert torch.equal(layer.dequantize(), qtensor.dequantize())


def test_an_id_outside_the_table_is_an_error(random_qtensor):
    with pytest.raises(IndexError):
        QuantEmbedding.from_qtensor(random_qtensor(50, 24))(torch.tensor([50]))


def test_the_output_follows_the_dtype_of_the_model_and_the_scales_do_not(random_qtensor):
    layer = QuantEmbedding.from_qtensor(random_qtensor(50, 24)).to(torch.bfloat16)
    assert layer(torch.tensor([1])).dtype == layer.weight.dtype == torch.bfloat16
    assert layer.weight_scale.dtype == torch.float32
    assert set(layer.state_dict()) == {"weight_packed", "weight_scale"}
    assert "50, 24, 4 bit symmetric PerChannel" in repr(layer)


def test_a_tied_head_multiplies_by_the_table_and_owns_nothing(random_qtensor):
    qtensor = random_qtensor(50, 24, 8, False)
    embedding = QuantEmbedding.from_qtensor(qtensor)
    bias = nn.Parameter(torch.randn(50), requires_grad=False)
    hidden = torch.randn(2, 3, 24)
    head = TiedQuantHead(embedding)
    torch.testing.assert_close(head(hidden), hidden @ qtensor.dequantize().T)
    torch.testing.assert_close(TiedQuantHead(embedding, bias)(hidden), hidden @ qtensor.dequantize().T + bias)
    assert not head.state_dict()
    assert not list(head.children())
    assert (head.in_features, head.out_features) == (24, 50)
    assert torch.equal(head.weight, embedding.weight)
    assert torch.equal(head.dequantize(), embedding.dequantize())
