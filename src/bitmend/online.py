"""What is done to activations at the door of a layer, or of the attention, while the model runs: a rotation, then rounding.

The same two steps run while a model is calibrated and in the model that is loaded from the output, attached to a module in
the same way (`attach_input`, `attach_output`), so that what was solved for is what runs. They are hooks of torch, which
leaves the modules of a model as they are. What happens inside the attention is described here and attached in
`models/attention.py`, which knows how models of transformers attend.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitmend.linalg.hadamard import Rotation
from bitmend.linalg.learned_rotation import AnyRotation, StreamRotation
from bitmend.numerics.activation_ranges import AnyRounding
from bitmend.numerics.activations import ActivationSpec

_PUT_OFF = "_bitmend_rounding_put_off"  # on a module
PREFIX_KEY, PREFIX_VALUE = "prefix_key", "prefix_value"  # tensors of a module that attends
ROTATION_CODES = "rotation_codes"  # tensor of a module that holds a learned rotation


@dataclass(frozen=True)
class InputScheme:
    """What happens to the input of a layer.

    Attributes:
        rotation: applied first; the layer's weight is rotated likewise, so that the product stays the same.
        activations: how each token is rounded after it.
    """

    rotation: AnyRotation | None = None
    activations: AnyRounding | None = None

    def apply(self, values: Tensor) -> Tensor:
        """Return what the layer reads instead of `values`."""
        if self.rotation is not None:
            values = self.rotation.apply(values)
        return values if self.activations is None else self.activations.round(values)


@dataclass(frozen=True)
class PrefixShape:
    """Keys and values that stand before those of all tokens, as if some tokens had come first.

    Attributes:
        tokens: how many.
        heads: of keys and values.
        key_width: features of a head's key.
        value_width: features of a head's value.
    """

    tokens: int
    heads: int
    key_width: int
    value_width: int

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Name of a tensor -> (heads, tokens, width)."""
        return {
            PREFIX_KEY: (self.heads, self.tokens, self.key_width),
            PREFIX_VALUE: (self.heads, self.tokens, self.value_width),
        }


@dataclass(frozen=True)
class AttentionScheme:
    """What happens to queries, keys and values behind the position embedding, and to the weights that attention gives them.

    Each head of each token is rounded by itself. Keys and values are what a cache keeps; those of the prefix are never
    rounded, and no cache holds them.

    Attributes:
        rotation: of queries and keys, head by head; their products stay the same, and no feature of a key stands out (R3 of
            SpinQuant, arXiv 2405.16406).
        queries: how they are rounded, after the rotation.
        keys: how they are rounded, after the rotation.
        values: how they are rounded.
        probabilities: how the weights of each query are rounded, from 0 on.
        prefix: of the keys and values before all others, which lie beside the weights of the module; None: there are none.
    """

    rotation: Rotation | None = None
    queries: ActivationSpec | None = None
    keys: ActivationSpec | None = None
    values: ActivationSpec | None = None
    probabilities: AnyRounding | None = None
    prefix: PrefixShape | None = None

    def of_queries(self, queries: Tensor) -> Tensor:
        """Return what attention reads in place of the queries (..., head width)."""
        return InputScheme(self.rotation, self.queries).apply(queries)

    def of_keys(self, keys: Tensor) -> Tensor:
        """Return what attention reads in place of the keys (..., head width)."""
        return InputScheme(self.rotation, self.keys).apply(keys)

    def of_values(self, values: Tensor) -> Tensor:
        """Return what attention reads in place of the values (..., head width)."""
        return InputScheme(activations=self.values).apply(values)

    def of_prefix_keys(self, keys: Tensor) -> Tensor:
        """Return what attention reads in place of the keys of the prefix (..., head width)."""
        return InputScheme(self.rotation).apply(keys)

    def steps(self) -> list[str]:
        """Return each step in words."""
        named = {name: getattr(self, name) for name in ("queries", "keys", "values", "probabilities")}
        words = [] if self.rotation is None else [f"{self.rotation} of queries and keys"]
        if self.prefix is not None:
            words.append(f"keys and values of {self.prefix.tokens} tokens before all others")
        for name, spec in named.items():
            if spec is not None:
                words.append(str(spec).replace("activations", name, 1).replace("a token", "a head of a token", 1))
        return words


def attach_input(module: nn.Module, scheme: InputScheme) -> RemovableHandle:
    """Apply `scheme` to the first argument of each call of `module`, until the handle is removed."""

    def prepare(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        spec, put_off = scheme.activations, module.__dict__.get(_PUT_OFF)
        if spec is None or put_off is None:
            return (scheme.apply(arguments[0]), *arguments[1:])
        put_off.append(spec)
        return (replace(scheme, activations=None).apply(arguments[0]), *arguments[1:])

    return module.register_forward_pre_hook(prepare)


@contextmanager
def rounding_put_off(module: nn.Module) -> Iterator[list[AnyRounding]]:
    """Let `module` be called with what it would round; how it would have rounded is noted in the list, call by call."""
    found: list[AnyRounding] = []
    module.__dict__[_PUT_OFF] = found
    try:
        yield found
    finally:
        del module.__dict__[_PUT_OFF]


def attach_output(module: nn.Module, rotation: StreamRotation) -> RemovableHandle:
    """Rotate what `module` returns, until the handle is removed."""

    def rotate(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        del module, arguments
        return rotation.apply(output)

    return module.register_forward_hook(rotate)
