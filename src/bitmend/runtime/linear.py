"""A linear layer whose weight stays packed in memory, and what it shares with other packed layers.

`QuantLinear` also stands for GPT-2's transposed `Conv1D`.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitmend.numerics.qtensor import QTensor, QuantSpec
from bitmend.runtime.dispatch import linear_kernel
from bitmend.runtime.packed import SCALE, PackedWeight, fill_packed_, pack, packed_of, register_packed


class QuantLayer(nn.Module):
    """A layer with a packed weight and a bias; what it computes is for the subclass to say.

    Attributes:
        weight_packed: the codes, int32 (out, ceil(in * bits / 32)).
        weight_scale: the scales in the type in which they are stored, (out or 1, groups).
        weight_zero_point: packed zero points, int32 (ceil(rows * bits / 32), groups); asymmetric grids only.
        bias: (out,) or None.
        spec: how to read the weight.
        shape: (out, in), of the weight as a matrix.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        spec: QuantSpec,
        *,
        bias: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.shape, self.spec = shape, spec
        device = None if device is None else torch.device(device)
        register_packed(self, shape, spec, device)
        register_model_dtype(self, dtype, device)
        # The bias is a parameter, not a buffer, so that a model without norms still has one that tells its dtype.
        self.bias = (
            nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device), requires_grad=False) if bias else None
        )

    def hold_(self, qtensor: QTensor, bias: Float[Tensor, " out"] | None, dtype: torch.dtype | None) -> None:
        """Put a weight, packed, and a bias in place of what the constructor made.

        Args:
            qtensor: the weight.
            bias: used as it is, not copied.
            dtype: of the model.

        Raises:
            RequestError: scales that their storage type cannot hold exactly, or zero points outside the grid.
        """
        fill_packed_(self, pack(qtensor))
        register_model_dtype(self, dtype, None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def packed(self) -> PackedWeight:
        """The weight, as a view of the buffers."""
        return packed_of(self, self.shape, self.spec)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Return the weight as a plain matrix."""
        return self.packed.dequantize(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return apply_keeping_scale(self, super()._apply, fn, recurse)


class QuantLinear(QuantLayer):
    """`y = x W^T + b` with a packed W of shape (out, in).

    The constructor makes uninitialised buffers, to be filled by a loader; `from_qtensor` makes a finished layer.

    Attributes:
        in_features: columns of the weight.
        out_features: rows of the weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__((out_features, in_features), spec, bias=bias, dtype=dtype, device=device)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_qtensor(cls, qtensor: QTensor, bias: Float[Tensor, " out"] | None = None) -> "QuantLinear":
        """Return a layer that holds `qtensor`, packed."""
        out_features, in_features = qtensor.codes.shape
        layer = cls(in_features, out_features, qtensor.spec, device="meta")
        layer.hold_(qtensor, bias, None if bias is None else bias.dtype)
        return layer

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The whole weight in the model's dtype, made anew each time; for model code that asks for it by this name."""
        return self.dequantize(model_dtype(self))

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the layer's output in the dtype of `inputs`."""
        packed = self.packed
        return linear_kernel(packed.words.device, self.spec)(inputs, packed, self.bias)

    def extra_repr(self) -> str:
        sides = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sides}, {self.spec}, bias={self.bias is not None}"


def register_model_dtype(module: nn.Module, dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Give `module` an empty tensor that holds but a dtype, and follows `model.to(dtype)`, as packed ones do not."""
    module.register_buffer("like_model", torch.empty(0, dtype=dtype, device=device), persistent=False)


def model_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype that `register_model_dtype` keeps."""
    return module.get_buffer("like_model").dtype


def apply_keeping_scale(
    module: nn.Module, apply: Callable[..., Any], fn: Callable[[Tensor], Tensor], recurse: bool
) -> Any:
    """Run `nn.Module._apply` so that scales follow to another device but never to another dtype.

    `model.to(torch.bfloat16)` would otherwise round them, and the weights with them, for good.
    """
    scale = module.get_buffer(SCALE)
    result = apply(fn, recurse)
    moved = module.get_buffer(SCALE)
    if moved.dtype != scale.dtype:
        module.register_buffer(SCALE, scale.to(moved.device))
    return result
