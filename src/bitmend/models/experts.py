"""Packed experts taken apart: one plain linear for each expert and projection, under the names of checkpoints.

transformers holds the experts of a layer in parameters of three dimensions, `gate_up_proj` (experts, 2 inner, in) and
`down_proj` (experts, out, inner), sometimes with the last two exchanged, gate and up interleaved, or biases. Its decorator
`use_experts_implementation` leaves on the module what form they have, and that is all that is looked at: no model is known
by name. `unpack_experts_` puts an `UnpackedExperts` in the place of each such module, which computes the same function with
`experts.3.gate_proj`, `experts.3.up_proj` and `experts.3.down_proj` (or what the checkpoints of the architecture call them,
such as w1, w3 and w2). Then an expert's matrix is a site like any other.

Source of the computation: y_t = sum over the chosen experts e of p_te * down_e(act(gate_e x_t) * up_e x_t), p the routing
weights (Shazeer et al. 2017, arXiv:1701.06538, equation 2, with gated experts).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights

from bitmend.errors import ModelError
from bitmend.routing import entries_by_expert
from bitmend.sites import layer_kind

MARKS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
PACKED_SOURCE = re.compile(r"experts\.\*\.(\w+)\.weight$")


@dataclass(frozen=True)
class ExpertNames:
    """What the projections of one expert are called; `gate` is unused where experts have none."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class PackedForm:
    """How a module of transformers holds its experts.

    Attributes:
        num_experts: how many.
        hidden: width of what enters and leaves an expert.
        inner: width between its projections.
        gated: whether there is a gate beside the projection up.
        biased: whether each projection has a bias.
        transposed: whether a projection is held as (in, out).
        concatenated: whether all of the gate comes before all of up; else they alternate.
    """

    num_experts: int
    hidden: int
    inner: int
    gated: bool
    biased: bool
    transposed: bool
    concatenated: bool

    @classmethod
    def of(cls, module: nn.Module) -> "PackedForm | None":
        """Return the form of a module, or None when it holds no experts in a form that can be taken apart."""
        if not all(isinstance(getattr(module, mark, None), bool) for mark in MARKS):
            return None
        gated, biased, transposed, concatenated = (getattr(module, mark) for mark in MARKS)
        held = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        down = held.get("down_proj", ())
        if len(down) != 3 or getattr(module, "has_post_expert_norm", False) or any(True for _ in module.buffers()):
            return None
        count, hidden, inner = (down[0], down[2], down[1]) if transposed else down
        form = cls(count, hidden, inner, gated, biased, transposed, concatenated)
        return form if held == form.shapes() else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the packed parameters with their shapes."""
        wide = self.inner * (2 if self.gated else 1)
        first = "gate_up_proj" if self.gated else "up_proj"
        sides = {first: (wide, self.hidden), "down_proj": (self.hidden, self.inner)}
        found: dict[str, tuple[int, ...]] = {}
        for name, (out, columns) in sides.items():
            found[name] = (self.num_experts, *((columns, out) if self.transposed else (out, columns)))
            if self.biased:
                found[f"{name}_bias"] = (self.num_experts, out)
        return found

    def packed_name(self, role: str, leaf: str) -> str:
        """Return which packed parameter holds the weight or bias (`leaf`) of the projection `role` (gate, up, down)."""
        name = "down_proj" if role == "down" else "gate_up_proj" if self.gated else "up_proj"
        return name if leaf == "weight" else f"{name}_bias"

    def cut(self, one: Tensor, role: str, leaf: str) -> Tensor:
        """Return the (out, in) weight or the bias of a projection, given one expert's part of the packed parameter."""
        rows = one.T if leaf == "weight" and self.transposed else one
        if role == "down" or not self.gated:
            return rows
        if self.concatenated:
            return rows[: self.inner] if role == "gate" else rows[self.inner :]
        return rows[0::2] if role == "gate" else rows[1::2]

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the outputs of gate and up as the packed projection would give them."""
        return torch.cat((gate, up), -1) if self.concatenated else torch.stack((gate, up), -1).flatten(-2)


class Activation:
    """What an expert does between its projections, by the emptied module that it was taken from.

    No torch module, so that what transformers does to all modules of a class does not meet one without its parameters.
    """

    def __init__(self, form: PackedForm, emptied: Any) -> None:
        self.form, self._emptied = form, emptied

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        emptied = self._emptied
        made: Tensor = emptied.act_fn(up) if gate is None else emptied._apply_gate(self.form.joined(gate, up))
        return made

    def __deepcopy__(self, memo: Any) -> "Activation":
        return self  # holds no weights


class UnpackedExpert(nn.Module):
    """One expert with a plain linear for each projection."""

    def __init__(
        self, form: PackedForm, names: ExpertNames, activation: Activation, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.names, self.activation = names, activation
        sides = {names.up: (form.hidden, form.inner), names.down: (form.inner, form.hidden)}
        if form.gated:
            sides = {names.gate: (form.hidden, form.inner), **sides}
        for name, (columns, out) in sides.items():
            linear = nn.Linear(columns, out, bias=form.biased, dtype=dtype, device="meta")
            self.add_module(name, linear if device.type == "meta" else linear.to_empty(device=device))

    def forward(self, x: Float[Tensor, "token in"]) -> Float[Tensor, "token in"]:
        """Return the expert's output, not yet weighted."""
        gate = self.get_submodule(self.names.gate)(x) if self.activation.form.gated else None
        inner = self.activation(gate, self.get_submodule(self.names.up)(x))
        made: Tensor = self.get_submodule(self.names.down)(inner)
        return made


class UnpackedExperts(nn.Module):
    """All experts of a layer, called `0`, `1` and so on; computes what the packed module did.

    Attributes:
        form: of the packed module.
        names: of the projections.
        num_experts: how many, for model code that asks.
    """

    def __init__(self, packed: nn.Module, form: PackedForm, names: ExpertNames) -> None:
        """Empty `packed` of its parameters and make room for the same in single linears, uninitialised."""
        super().__init__()
        self.form, self.names, self.num_experts = form, names, form.num_experts
        one = next(packed.parameters())
        for name in list(packed._parameters):
            del packed._parameters[name]
        activation = Activation(form, packed)
        with no_init_weights():  # the numbers will be overwritten
            for number in range(form.num_experts):
                self.add_module(str(number), UnpackedExpert(form, names, activation, one.dtype, one.device))

    def forward(
        self,
        hidden_states: Float[Tensor, "token features"],
        top_k_index: Int[Tensor, "token choice"],
        top_k_weights: Float[Tensor, "token choice"],
    ) -> Float[Tensor, "token features"]:
        """Return the sum of the outputs of each token's experts, weighted. An expert without tokens is not run."""
        summed = torch.zeros_like(hidden_states)
        entries = entries_by_expert(top_k_index, self.num_experts)
        for expert, (tokens, slots) in zip(self.children(), entries, strict=True):
            if len(tokens):
                weighted = expert(hidden_states[tokens]) * top_k_weights[tokens, slots, None]
                summed.index_add_(0, tokens, weighted.to(summed.dtype))
        return summed

    def steps(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the projections that read the expert's input, and of those that read what these made."""
        first = (self.names.gate, self.names.up) if self.form.gated else (self.names.up,)
        return first, (self.names.down,)

    def source_of(self, place: str) -> tuple[str, int, str, str]:
        """Return packed parameter, expert, role and leaf of a place such as `3.gate_proj.weight`."""
        number, projection, leaf = place.split(".")
        role = {self.names.up: "up", self.names.down: "down"}.get(projection, "gate")
        return self.form.packed_name(role, leaf), int(number), role, leaf


def unpack_experts_(model: nn.Module) -> tuple[str, ...]:
    """Take all packed experts of a model apart; their places are left uninitialised, on the device of the packed ones.

    Returns:
        The paths of the modules that hold the experts.
    """
    found = [(path, module, PackedForm.of(module)) for path, module in model.named_modules()]
    packed = [(path, module, form) for path, module, form in found if form is not None]
    if packed:
        names = stored_names(model) or ExpertNames()
        for path, module, form in packed:
            parent, _, leaf = path.rpartition(".")
            model.get_submodule(parent).register_module(leaf, UnpackedExperts(module, form, names))
    return tuple(path for path, _, _ in packed)


def experts_of(model: nn.Module) -> dict[str, UnpackedExperts]:
    """Return the modules that hold experts, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, UnpackedExperts)}


def stored_names(model: Any) -> ExpertNames | None:
    """Return what checkpoints with single experts call the projections, or None when there are none for this model."""
    merged: dict[str, list[str]] = {}
    for step in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(step, WeightConverter):
            sources = [PACKED_SOURCE.search(source) for source in step.source_patterns]
            target = step.target_patterns[0].rpartition(".")[2]
            if all(sources) and target in ("gate_up_proj", "up_proj", "down_proj"):
                merged.setdefault(target, [match[1] for match in sources if match])
    first = merged.get("gate_up_proj") or ["", *merged.get("up_proj", [])]
    if len(first) != 2 or len(merged.get("down_proj", ())) != 1:
        return None
    return ExpertNames(*first, *merged["down_proj"])


def router_paths(block: nn.Module) -> tuple[str, ...]:
    """Return the layers of a block that decide where tokens go, or how much of a shared expert counts.

    The rule: a layer beside the experts, with "router" or "gate" in its path, that has one output for each expert or one
    output in all. Such layers are small, a wrong decision of theirs is dear, and no engine reads them quantised; they stay
    as they are.
    """
    routers: dict[str, None] = {}
    for path, experts in experts_of(block).items():
        parent = path.rpartition(".")[0]
        start = f"{parent}." if parent else ""
        for name, module in block.get_submodule(parent).named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim != 2 or f"{start}{name}.".startswith(f"{path}."):
                continue
            out = weight.shape[1] if layer_kind(module) == "conv1d" else weight.shape[0]
            if out in (1, experts.num_experts) and re.search(r"router|gate(?!_proj)", name):
                routers[start + name] = None
    return tuple(routers)


def refuse_packed(model: nn.Module) -> None:
    """Refuse experts that could not be taken apart, which hold most of the weights of their model.

    Raises:
        ModelError: there are some; names them.
    """
    for path, module in _packed_left(model):
        shapes = {name: tuple(value.shape) for name, value in module.named_parameters(recurse=False) if value.ndim == 3}
        raise ModelError(
            f"{path} ({type(module).__name__}) packs its experts as {shapes}, in a form that bitmend cannot take apart; "
            "give a model whose experts transformers holds as gate_up_proj and down_proj, without norms of their own"
        )


def _packed_left(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if "Expert" in type(module).__name__ and any(one.ndim == 3 for one in module.parameters(recurse=False)):
            yield path, module
