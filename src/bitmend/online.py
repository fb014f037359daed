"""What is done to activations at the door of a layer while the model runs: a rotation, then rounding.

The same two steps run while a model is calibrated and in the model that is loaded from the output, attached to a module in
the same way (`attach_input`, `attach_output`), so that what was solved for is what runs. They are hooks of torch, which
leaves the modules of a model as they are.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitmend.linalg.hadamard import Rotation
from bitmend.numerics.activations import ActivationSpec


@dataclass(frozen=True)
class InputScheme:
    """What happens to the input of a layer.

    Attributes:
        rotation: applied first; the layer's weight is rotated likewise, so that the product stays the same.
        activations: how each token is rounded after it.
    """

    rotation: Rotation | None = None
    activations: ActivationSpec | None = None

    def apply(self, values: Tensor) -> Tensor:
        """Return what the layer reads instead of `values`."""
        if self.rotation is not None:
            values = self.rotation.apply(values)
        return values if self.activations is None else self.activations.round(values)


def attach_input(module: nn.Module, scheme: InputScheme) -> RemovableHandle:
    """Apply `scheme` to the first argument of each call of `module`, until the handle is removed."""

    def prepare(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (scheme.apply(arguments[0]), *arguments[1:])

    return module.register_forward_pre_hook(prepare)


def attach_output(module: nn.Module, rotation: Rotation) -> RemovableHandle:
    """Rotate what `module` returns, until the handle is removed."""

    def rotate(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        del module, arguments
        return rotation.apply(output)

    return module.register_forward_hook(rotate)
