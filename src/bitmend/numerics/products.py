"""Matrix products by the fastest way that torch has for them on this CPU.

- float32: torch gives products to MKL, which leaves half of an AMD core unused; oneDNN, which torch uses for other types,
  does not. On Intel's cores it has nothing to win. Both compute in float32 throughout; only the order of the sums differs.
- bfloat16: a core without units for it (AMX, or AMD's) takes longer for a product in bfloat16 than in float32. There the
  factors are widened, multiplied in float32 and the result is rounded once, which is what a product in bfloat16 means.

`benchmarks/bench_products.py` measures both. On other devices, for other types, and where this build of torch has no oneDNN,
the products are torch's own. What is chosen depends on the kind of CPU alone, never on a measurement, so that a run can be
resumed bit for bit.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ONEDNN_LINEAR: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]
)
WIDENED_ROWS = 1024  # tokens widened to float32 at a time


def linear(
    inputs: Float[Tensor, "*batch in"], weight: Float[Tensor, "... in"], bias: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """Return `inputs weight^T + bias`; as `torch.nn.functional.linear`, without gradients where it is faster."""
    usual = weight.ndim == 2 and inputs.numel() > 0 and (bias is None or bias.shape == weight.shape[:1])
    if usual and not torch.is_autocast_enabled("cpu"):
        if not onednn_is_slower() and _all_plain(torch.float32, inputs, weight, bias):
            return _float32(inputs, weight, bias)
        if bfloat16_is_slower() and _all_plain(torch.bfloat16, inputs, weight, bias):
            return _widened(inputs, weight, bias)
    return torch.nn.functional.linear(inputs, weight, bias)


def _float32(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # oneDNN takes parts of other tensors, too, but by a reference loop that is a thousand times slower than a copy.
    result: Tensor = _ONEDNN_LINEAR(inputs.contiguous(), weight.contiguous(), bias, "none", [], "")
    return result


def _widened(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in float32 and round the result, some rows at a time so that the wide copies stay small."""
    wide, shift = weight.float(), None if bias is None else bias.float()
    rows = inputs.reshape(-1, inputs.shape[-1])
    result = torch.empty(len(rows), len(weight), dtype=inputs.dtype)
    for some, into in zip(torch.split(rows, WIDENED_ROWS), torch.split(result, WIDENED_ROWS), strict=True):
        into.copy_(linear(some.float(), wide, shift))
    return result.view(*inputs.shape[:-1], len(weight))


class FastLinear(TorchFunctionMode):
    """While active, every `torch.nn.functional.linear` in reach goes through `linear`; for inference only."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and not torch.is_grad_enabled():
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class FastLinearWithGradient(TorchFunctionMode):
    """While active, every `torch.nn.functional.linear` in reach goes through `linear`, gradients of its input likewise.

    Weights and biases are taken as fixed: they get no gradients.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return _with_gradient_of_inputs(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _with_gradient_of_inputs(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # torch's names
    if weight.ndim != 2 or weight.requires_grad:
        return torch.nn.functional.linear(input, weight, bias)
    if not torch.is_grad_enabled():
        return linear(input, weight, bias)
    result: Tensor = _LinearInInputs.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return result


class _LinearInInputs(torch.autograd.Function):
    """`linear` as a function of its inputs alone."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        context.save_for_backward(weight)
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        return linear(gradients[0], weight.T), None, None


def product(left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """Return `left right` by the same way, with gradients of both."""
    result: Tensor = _Product.apply(left, right)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, left: Tensor, right: Tensor) -> Tensor:
        context.save_for_backward(left, right)
        return linear(left, right.T)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (left, right), (of_left, of_right) = context.saved_tensors, context.needs_input_grad
        (gradient,) = gradients
        return (
            linear(gradient, right) if of_left else None,
            linear(left.T, gradient.T) if of_right else None,
        )


@cache
def onednn_is_slower() -> bool:
    """Return whether float32 products are better left to torch's own library (which they are where there is no oneDNN)."""
    return _ONEDNN_LINEAR is None or "intel" in _cpu_name()


@cache
def bfloat16_is_slower() -> bool:
    """Return whether this CPU multiplies bfloat16 more slowly than float32; false where nothing is known of it."""
    units = _capabilities()
    if units.get("architecture") != "x86_64":
        return False
    return not (units.get("amx_bf16") or (units.get("avx512_bf16") and "intel" not in _cpu_name()))


def kind() -> str:
    """Return, in words, how products are taken here: a part of what a result depends on."""
    ways = ["float32 by torch" if onednn_is_slower() else "float32 by oneDNN"]
    return ", ".join([*ways, "bfloat16 widened" if bfloat16_is_slower() else "bfloat16 by torch"])


def _capabilities() -> dict[str, Any]:
    # Younger than the oldest torch that bitmend runs with.
    ask: Any = getattr(torch.cpu, "get_capabilities", dict)
    return dict(ask())


def _cpu_name() -> str:
    return str(_capabilities().get("cpu_name", "")).lower()


def _all_plain(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    return all(tensor is None or _plain(tensor, dtype) for tensor in tensors)


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    wants_gradient = tensor.requires_grad and torch.is_grad_enabled()
    return tensor.dtype == dtype and tensor.device.type == "cpu" and not wants_gradient
