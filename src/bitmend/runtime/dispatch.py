"""Which kernel runs: the first row of a table whose condition holds. The last row always holds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmend.numerics.qtensor import QuantSpec
from bitmend.runtime.kernels import reference
from bitmend.runtime.packed import PackedWeight

LinearKernel = Callable[[Tensor, PackedWeight, Tensor | None], Tensor]


@dataclass(frozen=True)
class KernelRow:
    """One row of the table.

    Attributes:
        name: for messages and tests.
        accepts: whether the kernel can run on this device with this kind of weight.
        kernel: computes `inputs @ weight.T + bias`.
    """

    name: str
    accepts: Callable[[torch.device, QuantSpec], bool]
    kernel: LinearKernel


LINEAR_KERNELS: list[KernelRow] = [
    KernelRow("reference", lambda device, spec: True, reference.linear),
]


def linear_kernel(device: torch.device, spec: QuantSpec) -> LinearKernel:
    """Return the kernel for packed weights of kind `spec` on `device`."""
    return next(row.kernel for row in LINEAR_KERNELS if row.accepts(device, spec))
