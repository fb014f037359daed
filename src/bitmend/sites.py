"""Typed facts about a model: which matrices can be quantised, which share an input, in which order they run.

Whatever a layer looks like in its model (a linear, GPT-2's transposed `Conv1D`), a site presents it as a weight
`(out, in)` and inputs `(token, in)`. That translation exists here and nowhere else; a new kind of layer is one more
`LayerView`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitmend.routing import Expert


@runtime_checkable
class LayerView(Protocol):
    """How one class of layers holds its weight and takes its input."""

    def matches(self, module: nn.Module) -> bool:
        """Return whether this view can read `module`."""
        ...

    def read(self, module: nn.Module) -> Float[Tensor, "out in"]:
        """Return the weight as (out, in); a view of the module's own memory where possible."""
        ...

    def write_(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
        """Overwrite the module's weight with `weight`, cast to the module's dtype."""
        ...

    def tokens(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "token in"]:
        """Return the layer's input as one row per token."""
        ...


@dataclass(frozen=True)
class LinearView:
    """`nn.Linear`: the weight is (out, in) already."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def read(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return module.get_parameter("weight").detach()

    def write_(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
        with torch.no_grad():
            module.get_parameter("weight").copy_(weight)

    def tokens(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "token in"]:
        return inputs.detach().reshape(-1, inputs.shape[-1])


@dataclass(frozen=True)
class Conv1dView:
    """GPT-2's `Conv1D` of transformers: a linear whose weight is stored as (in, out)."""

    def matches(self, module: nn.Module) -> bool:
        # By name: this layer must not import transformers, and the class has no other mark than `nf`, its output width.
        return type(module).__name__ == "Conv1D" and hasattr(module, "nf")

    def read(self, module: nn.Module) -> Float[Tensor, "out in"]:
        return module.get_parameter("weight").detach().T

    def write_(self, module: nn.Module, weight: Float[Tensor, "out in"]) -> None:
        with torch.no_grad():
            module.get_parameter("weight").copy_(weight.T)

    def tokens(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "token in"]:
        return inputs.detach().reshape(-1, inputs.shape[-1])


LAYER_VIEWS: dict[str, LayerView] = {"linear": LinearView(), "conv1d": Conv1dView()}


def layer_kind(module: nn.Module) -> str | None:
    """Return the name of the view that reads `module`, or None when it cannot be a site."""
    return next((kind for kind, view in LAYER_VIEWS.items() if view.matches(module)), None)


@dataclass(frozen=True)
class LinearSite:
    """One matrix that can be quantised.

    Attributes:
        name: the module's full path in the model, for example `model.layers.0.mlp.down_proj`.
        path: the same inside its block, for example `mlp.down_proj`.
        kind: a key of `LAYER_VIEWS`.
        shape: (out, in).
    """

    name: str
    path: str
    kind: str
    shape: tuple[int, int]

    @property
    def view(self) -> LayerView:
        """How to read the layer."""
        return LAYER_VIEWS[self.kind]

    def weight(self, block: nn.Module) -> Float[Tensor, "out in"]:
        """Return the weight in its model dtype."""
        return self.view.read(block.get_submodule(self.path))

    def store_(self, block: nn.Module, weight: Float[Tensor, "out in"]) -> None:
        """Overwrite the weight inside `block`."""
        self.view.write_(block.get_submodule(self.path), weight)


@dataclass(frozen=True)
class SiteGroup:
    """Sites that read the same input, hence share its moments.

    Attributes:
        name: the paths of the sites joined by `+`, with their common part once: `self_attn.{q_proj,k_proj,v_proj}`.
        sites: in execution order.
        norm: path in the block of the module whose output is this input, or None when it is not a norm.
        expert: where the sites stand in a mixture of experts; None for sites that every token reaches.
    """

    name: str
    sites: tuple[LinearSite, ...]
    norm: str | None
    expert: Expert | None = None


@dataclass(frozen=True)
class Block:
    """One repeated piece of the network, with its sites in execution order.

    Attributes:
        name: full path in the model, for example `model.layers.0`.
        index: position in execution order, from 0.
        module: the module itself, weights loaded.
        groups: in execution order; together they hold every site once.
        unread: paths of layers with weights of two dimensions that never ran, so that nothing is known of their input.
        routers: paths of layers that choose experts or weigh a shared one; by rule they are no sites.
    """

    name: str
    index: int
    module: nn.Module
    groups: tuple[SiteGroup, ...]
    unread: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[LinearSite, ...]:
        """All sites in execution order."""
        return tuple(site for group in self.groups for site in group.sites)
