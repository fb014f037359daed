"""Matrix products in float32, by the faster of the two libraries that torch carries on a CPU.

torch gives float32 products to MKL, which leaves half of an AMD core unused; oneDNN, which torch uses for other types, does
not (`benchmarks/bench_products.py`). Both compute in float32 throughout; only the order of the sums differs. On other
devices, other types, and where this build of torch has no oneDNN, the products are torch's own.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ONEDNN_LINEAR: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]
)


def linear(
    inputs: Float[Tensor, "*batch in"], weight: Float[Tensor, "... in"], bias: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """Return `inputs weight^T + bias`; as `torch.nn.functional.linear`, without gradients where it is faster."""
    plain = _plain_float32(inputs) and _plain_float32(weight) and (bias is None or _plain_float32(bias))
    usual = weight.ndim == 2 and inputs.numel() > 0 and (bias is None or bias.shape == weight.shape[:1])
    if _ONEDNN_LINEAR is None or not plain or not usual or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(inputs, weight, bias)
    # oneDNN takes parts of other tensors, too, but by a reference loop that is a thousand times slower than a copy.
    result: Tensor = _ONEDNN_LINEAR(inputs.contiguous(), weight.contiguous(), bias, "none", [], "")
    return result


class FastLinear(TorchFunctionMode):
    """While active, every `torch.nn.functional.linear` in reach goes through `linear`; for inference only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not torch.is_grad_enabled():
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _plain_float32(tensor: Tensor) -> bool:
    wants_gradient = tensor.requires_grad and torch.is_grad_enabled()
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not wants_gradient
