import torch

from bitmend.runtime import dispatch
from bitmend.runtime.kernels import reference
from bitmend.runtime.linear import QuantLinear


def test_the_last_row_takes_everything(random_qtensor):
    row = dispatch.LINEAR_KERNELS[-1]
    assert (row.name, row.kernel) == ("reference", reference.linear)
    assert row.accepts(torch.device("meta"), random_qtensor(4, 8).spec)


def test_the_first_kernel_that_accepts_is_used(random_qtensor, monkeypatch):
    layer = QuantLinear.from_qtensor(random_qtensor(4, 8))
    calls = []

    def kernel(inputs, weight, bias):
        calls.append(weight.shape)
        return inputs.new_zeros(*inputs.shape[:-1], weight.shape[0])

    row = dispatch.KernelRow("mine", lambda device, spec: spec.grid.bits == 4 and device.type == "cpu", kernel)
    monkeypatch.setattr(dispatch, "LINEAR_KERNELS", [row, *dispatch.LINEAR_KERNELS])
    assert layer(torch.ones(2, 8)).abs().sum() == 0
    assert calls == [(4, 8)]
    other = QuantLinear.from_qtensor(random_qtensor(4, 8, 3))
    assert other(torch.ones(2, 8)).abs().sum() > 0
