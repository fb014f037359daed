"""A small map beside a block that adds to its output what quantisation has lost, while the model runs.

    y + x W^T + b        y = block(x); W full, block-diagonal, or a product of two thin matrices; or
    y + a y + b          channel by channel; or
    y + b

x is what the block reads from the residual stream, in floating point, y what it gives. On maps of pictures W is a convolution
of 1 x 1, with the stride by which the block makes maps smaller. Where a block ends in a ReLU, so does the sum: what it stands
for is never negative, so that cutting off there can only bring it nearer.

The map is a module of its own, a child of the block called `compensation`, so that its tensors lie in the files under the
block's name; it runs as a hook of torch, which leaves the block itself as it is.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.utils._pytree import tree_flatten, tree_unflatten

from bitmend.errors import ModelError

CHILD = "compensation"
HIDDEN = "hidden_states"  # of a block's first argument, where it is given by name
Structure = Literal["bias", "affine", "low_rank", "block_diagonal", "full"]
STRUCTURES: tuple[Structure, ...] = ("bias", "affine", "low_rank", "block_diagonal", "full")
BIAS_DTYPE = torch.float32


@dataclass(frozen=True)
class CompensationShape:
    """What a compensation is, apart from its numbers.

    Attributes:
        structure: of the map.
        inputs: features, or channels, that the block reads.
        outputs: that it gives.
        rank: of `low_rank`; else 0.
        groups: blocks of `block_diagonal`; else 1.
        channels_first: the features are the second axis, as those of maps of pictures; else the last one.
        stride: each so many places of a map, in both directions.
        clamped: the sum is cut off at zero.
    """

    structure: Structure
    inputs: int
    outputs: int
    rank: int = 0
    groups: int = 1
    channels_first: bool = False
    stride: int = 1
    clamped: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each tensor -> its shape."""
        weights: dict[Structure, dict[str, tuple[int, ...]]] = {
            "bias": {},
            "affine": {"scale": (self.outputs,)},
            "low_rank": {"down": (self.rank, self.inputs), "up": (self.outputs, self.rank)},
            "block_diagonal": {"weight": (self.outputs, self.inputs // max(1, self.groups))},
            "full": {"weight": (self.outputs, self.inputs)},
        }
        return {**weights[self.structure], "bias": (self.outputs,)}

    def num_bytes(self, itemsize: int = 2) -> int:
        """Return what the tensors take in a file, all but the bias with `itemsize` bytes a number."""
        return sum(
            torch.Size(shape).numel() * (BIAS_DTYPE.itemsize if name == "bias" else itemsize)
            for name, shape in self.shapes.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


class Compensation(nn.Module):
    """The map; its tensors keep the type in which they are stored, whatever the model computes in."""

    def __init__(self, shape: CompensationShape, tensors: Mapping[str, Tensor]) -> None:
        """Hold `tensors`, which are those that `shape` names."""
        super().__init__()
        self.shape = shape
        for name, wanted in shape.shapes.items():
            assert tuple(tensors[name].shape) == wanted
            self.register_buffer(name, tensors[name])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y with what the map adds, in the type of y."""
        features = y.shape[1] if self.shape.channels_first else y.shape[-1]
        if features != self.shape.outputs:
            raise ModelError(
                f"a map beside a block is for {self.shape.outputs} features, but the block gives {features}; the checkpoint "
                "does not fit the model"
            )
        found = y + self.correction(x.to(y.device), y)
        return found.clamp(min=0) if self.shape.clamped else found

    def correction(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what is added."""
        shape = self.shape
        bias = self.get_buffer("bias").to(y)
        if shape.channels_first:
            x, bias = x[:, :, :: shape.stride, :: shape.stride], bias[:, None, None]
        if shape.structure == "bias":
            return bias
        if shape.structure == "affine":
            scale = self.get_buffer("scale").to(y)
            return y * (scale[:, None, None] if shape.channels_first else scale) + bias
        if shape.structure == "low_rank":
            return self._product(self._product(x, "down"), "up") + bias
        return self._product(x, "weight") + bias

    def _product(self, x: Tensor, name: str) -> Tensor:
        weight = self.get_buffer(name).to(x)
        if self.shape.channels_first:
            return conv2d(x, weight[:, :, None, None], groups=self.shape.groups)
        if self.shape.groups == 1:
            return linear(x, weight)
        groups = self.shape.groups
        parts = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
        blocks = weight.reshape(groups, len(weight) // groups, weight.shape[1])
        return torch.einsum("...gi,goi->...go", parts, blocks).flatten(-2)


def attach_compensation_(block: nn.Module, compensation: Compensation) -> None:
    """Make `compensation` a child of `block` and let it change what each call of the block gives.

    Raises:
        ModelError: when the module is called, without hidden states, or gives other features than the map is for.
    """
    block.register_module(CHILD, compensation)

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        found = module.get_submodule(CHILD)
        assert isinstance(found, Compensation)
        hidden = args[0] if args else kwargs.get(HIDDEN)
        if not isinstance(hidden, Tensor):
            raise ModelError(
                "a map stands beside a module that is not called with hidden states; no block is this module"
            )
        leaves, spec = tree_flatten(output)
        place = next(position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        leaves[place] = found(hidden, leaves[place])
        return tree_unflatten(leaves, spec)

    block.register_forward_hook(add, with_kwargs=True)
