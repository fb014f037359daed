"""A convolution of pictures whose weight stays packed in memory."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from bitmend.errors import RequestError
from bitmend.numerics.qtensor import QTensor, QuantSpec
from bitmend.runtime.linear import QuantLayer, model_dtype


class QuantConv2d(QuantLayer):
    """What `nn.Conv2d` computes, in one group or several, with a packed weight.

    The weight is packed as a matrix (out, in / groups * kernel height * kernel width). The constructor makes uninitialised
    buffers, to be filled by a loader; `from_qtensor` makes a finished layer.

    Attributes:
        in_channels: and the others below, as of `nn.Conv2d`.
        out_channels: rows of the weight.
        kernel_size: (height, width).
        stride: (down, across).
        padding: zeros on both sides (above and below, left and right), or "same" or "valid".
        dilation: (down, across).
        groups: of input channels, each read by as many output channels.
    """

    def __init__(
        self,
        like: nn.Conv2d,
        spec: QuantSpec,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make room for the weight of `like`.

        Args:
            like: the convolution that is replaced.
            spec: how its weight is quantised.
            dtype: of the bias and of the model; None for that of `like`.
            device: None for that of `like`.

        Raises:
            RequestError: it pads with something else than zeros.
            RecipeError: a group size that does not divide the width of the weight.
        """
        if like.padding_mode != "zeros":
            raise RequestError(
                f"a packed convolution pads with zeros; got padding_mode {like.padding_mode!r}; leave that layer as it is"
            )
        weight = like.weight
        shape = (weight.shape[0], weight.shape[1:].numel())
        dtype, device = dtype or weight.dtype, weight.device if device is None else device
        super().__init__(shape, spec, bias=like.bias is not None, dtype=dtype, device=device)
        self.in_channels, self.out_channels, self.kernel_size = like.in_channels, like.out_channels, like.kernel_size
        self.stride, self.padding, self.dilation, self.groups = like.stride, like.padding, like.dilation, like.groups

    @classmethod
    def from_qtensor(cls, qtensor: QTensor, like: nn.Conv2d) -> "QuantConv2d":
        """Return a layer that holds `qtensor`, packed, with the bias, geometry and dtype of `like`.

        Raises:
            RequestError: `qtensor` has another shape than the weight of `like` as a matrix.
        """
        layer = cls(like, qtensor.spec, device="meta")
        if tuple(qtensor.codes.shape) != layer.shape:
            raise RequestError(
                f"the weight of this convolution is a matrix of {layer.shape}; got {tuple(qtensor.codes.shape)}; quantise "
                "its weight.flatten(1)"
            )
        layer.hold_(qtensor, like.bias, like.weight.dtype)
        return layer

    @property
    def weight(self) -> Float[Tensor, "out channels kernel_height kernel_width"]:
        """The whole weight in the model's dtype, made anew each time; for model code that asks for it by this name."""
        return self._kernels(model_dtype(self))

    def forward(
        self, inputs: Float[Tensor, "*picture channels height width"]
    ) -> Float[Tensor, "*picture out height_out width_out"]:
        """Return the layer's output in the dtype of `inputs`.

        The weight is computed in float32 and rounded once to the dtype of `inputs`. Cost: one dequantisation of the whole
        weight a call, and memory for it.
        """
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        weight = self._kernels(inputs.dtype)
        return functional.conv2d(inputs, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        geometry = ("kernel_size", "stride", "padding", "dilation", "groups")
        shape = ", ".join(f"{name}={getattr(self, name)!r}" for name in geometry)
        return f"{self.in_channels}, {self.out_channels}, {shape}, {self.spec}, bias={self.bias is not None}"

    def _kernels(self, dtype: torch.dtype) -> Tensor:
        return self.dequantize(dtype).view(self.out_channels, self.in_channels // self.groups, *self.kernel_size)
