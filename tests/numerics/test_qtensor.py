import torch

from bitmend.numerics.granularity import PerGroup
from bitmend.numerics.qtensor import QParams, QuantSpec, quantize
from bitmend.numerics.uniform import UniformGrid

SPEC = QuantSpec(UniformGrid(2, symmetric=False), PerGroup(2), "minmax")
WEIGHT = torch.tensor([[0.0, 3.0, -1.0, 2.0], [-6.0, 0.0, 0.5, 1.0]])
QPARAMS = QParams(torch.tensor([[1.0, 1.0], [2.0, 0.5]]), torch.tensor([[-2.0, -1.0], [1.0, -2.0]]))


def test_a_matrix_in_groups_by_hand():
    quantised = quantize(WEIGHT, QPARAMS, SPEC)
    assert quantised.codes.tolist() == [[-2, 1, -2, 1], [-2, 1, -1, 0]]
    assert torch.equal(quantised.dequantize(), WEIGHT)
    assert quantised.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_rows_can_be_cut_out():
    quantised = quantize(WEIGHT, QPARAMS, SPEC)
    assert torch.equal(quantised.rows(1, 2).dequantize(), WEIGHT[1:2])


def test_a_spec_says_what_it_is():
    assert str(SPEC) == "2 bit asymmetric g2"
    assert str(QuantSpec(UniformGrid(3, symmetric=True))) == "3 bit symmetric PerChannel"
