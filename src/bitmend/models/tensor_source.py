"""Which stored tensor belongs to which place of a model, and how it gets there and away again."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming

from bitmend.errors import CheckpointError, ModelError
from bitmend.models.experts import PackedForm, experts_of
from bitmend.models.shards import ShardedWeights

SHOWN = 4


@dataclass(frozen=True)
class _Cut:
    """Which part of a packed tensor fills a place."""

    form: PackedForm
    packed: str
    expert: int
    role: str
    leaf: str


class TensorSource:
    """Fills the places of one model from its files.

    Names are those of the model's own `state_dict`. Files may lack the prefix of the base model (`transformer.` of
    GPT-2), have it where the model does not, use names from before a renaming in transformers, or leave out tied
    tensors. The places of experts that were taken apart (`models/experts.py`) are filled from single tensors where the files
    have them, else from their part of a packed one.

    Attributes:
        names: all places to fill, in the order of the model; tied ones that follow another place are left out.
        ties: tied place -> the place that it follows.
    """

    def __init__(self, model: nn.Module, weights: ShardedWeights, *, dtype: torch.dtype, device: torch.device) -> None:
        """Match the names.

        Raises:
            ModelError: tensors are missing from the files.
            CheckpointError: a stored tensor has another shape than its place.
        """
        self.model = model
        self.weights = weights
        self.dtype = dtype
        self.device = device
        self._wide = _kept_in_float32(model, dtype)
        places = {name: place for name, place in model.state_dict().items() if isinstance(place, Tensor)}
        self._floating = {name for name, place in places.items() if place.is_floating_point()}
        self._cuts: dict[str, _Cut] = {}
        self._stored = self._match(places)
        self._match_packed(places)
        self.ties = self._find_ties(places)
        self.names = tuple(name for name in places if name not in self.ties)
        self._refuse_missing()
        self._refuse_shapes(places)

    def stored_name(self, name: str) -> str:
        """Return the name under which the files hold the tensor of a place."""
        return self._stored[self.ties.get(name, name)]

    def fill(self, names: Iterable[str]) -> None:
        """Read tensors from the files and put them in their places."""
        for name in names:
            self._put(name, self._read(name))

    def tie(self) -> None:
        """Make each tied place hold the very parameter that it follows."""
        for target, source in self.ties.items():
            parent, _, leaf = target.rpartition(".")
            self.model.get_submodule(parent)._parameters[leaf] = self.model.get_parameter(source)

    def clear(self, module: nn.Module) -> None:
        """Send the parameters of `module` back to meta."""
        for part in module.modules():
            for leaf, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[leaf] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    def _read(self, name: str) -> Tensor:
        cut = self._cuts.get(name)
        tensor = self.weights.get(self._stored[name], None if cut is None else cut.expert)
        if cut is not None:
            tensor = cut.form.cut(tensor, cut.role, cut.leaf).contiguous()
        dtype = self._dtype_of(name) if tensor.is_floating_point() else tensor.dtype
        if not tensor.is_floating_point() and name in self._floating:
            raise CheckpointError(
                f"tensor {self._stored[name]} in {self.weights.folder} has type {tensor.dtype}, need a floating-point one; "
                "copy the model again"
            )
        # What lies in a mapped file is copied, because blocks are changed in place later.
        return tensor.to(device=self.device, dtype=dtype, copy=self.weights.shares_memory)

    def _put(self, name: str, tensor: Tensor) -> None:
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if any(pattern.search(name) for pattern in self._wide) else self.dtype

    def _match(self, places: Iterable[str]) -> dict[str, str]:
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        matched: dict[str, str] = {}
        self._match_under(prefix, places, matched, lambda key: key)
        if any(name not in matched for name in places):
            self._match_under(prefix, places, matched, _renaming(self.model))
        return matched

    def _match_under(
        self, prefix: str, places: Iterable[str], matched: dict[str, str], todays_name: Callable[[str], str]
    ) -> None:
        table = {todays_name(key): key for key in self.weights.names()}
        for name in places:
            alike = (name, name.removeprefix(prefix), prefix + name)
            found = next((table[key] for key in alike if key in table), None)
            if found is not None:
                matched.setdefault(name, found)

    def _match_packed(self, places: Iterable[str]) -> None:
        """Match places of single experts with the packed tensors that hold them."""
        left = [name for name in places if name not in self._stored]
        wanted: dict[str, tuple[str, _Cut]] = {}
        for path, experts in experts_of(self.model).items():
            for name in left:
                if name.startswith(f"{path}."):
                    packed, expert, role, leaf = experts.source_of(name.removeprefix(f"{path}."))
                    wanted[name] = (f"{path}.{packed}", _Cut(experts.form, packed, expert, role, leaf))
        if wanted:
            matched = self._match(dict.fromkeys(packed for packed, _ in wanted.values()))
            found = {name: (matched[packed], cut) for name, (packed, cut) in wanted.items() if packed in matched}
            self._stored |= {name: stored for name, (stored, _) in found.items()}
            self._cuts |= {name: cut for name, (_, cut) in found.items()}

    def _find_ties(self, places: dict[str, Tensor]) -> dict[str, str]:
        declared: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        ties = {}
        for target, source in declared.items():
            if target not in places or source not in places:
                continue
            if source not in self._stored and target in self._stored:
                self._stored[source] = self._stored[target]
            # A head that was trained apart although the config says tied: what the files hold wins, as in transformers.
            if target not in self._stored or self._same(target, source):
                ties[target] = source
        return ties

    def _same(self, target: str, source: str) -> bool:
        one, other = self._stored[target], self._stored[source]
        if one == other:
            return True
        return self.weights.shape(one) == self.weights.shape(other) and torch.equal(
            self.weights.get(one), self.weights.get(other)
        )

    def _refuse_missing(self) -> None:
        missing = [name for name in self.names if name not in self._stored]
        if not missing:
            return
        used = set(self._stored.values())
        spare = [name for name in self.weights.names() if name not in used]
        held = f"; tensors of unknown use: {_some(spare)}" if spare else ""
        advice = "give the complete model, saved by save_pretrained of a recent transformers"
        if _is_merged(self.model, spare):
            advice = (
                "they have to be merged from tensors stored one by one, which bitmend cannot do for this architecture"
            )
        raise ModelError(
            f"{self.weights.folder} lacks {len(missing)} of the {len(self.names)} tensors that "
            f"{type(self.model).__name__} needs: {_some(missing)}{held}; {advice}"
        )

    def _refuse_shapes(self, places: dict[str, Tensor]) -> None:
        for name in self.names:
            found, cut = self.weights.shape(self._stored[name]), self._cuts.get(name)
            needed = tuple(places[name].shape) if cut is None else cut.form.shapes()[cut.packed]
            if found != needed:
                raise CheckpointError(
                    f"tensor {self._stored[name]} in {self.weights.folder} has shape {found}, need {needed} by the "
                    "config; give the config.json that belongs to these weights"
                )


def _renaming(model: Any) -> Callable[[str], str]:
    """Return what gives a stored name as it is today, for models whose modules have been renamed since."""
    steps = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    return lambda key: reduce(lambda name, step: step.rename_source_key(name)[0], steps, key)


def checkpoint_names(model: Any) -> Callable[[str], str]:
    """Return what gives a tensor's name in the checkpoints of an architecture, where transformers renames on loading."""
    steps = [
        step.reverse_transform()
        for step in reversed(get_model_conversion_mapping(model, add_legacy=False))
        if isinstance(step, WeightRenaming) and not isinstance(step, PrefixChange)
    ]
    return lambda name: reduce(lambda key, step: step.rename_source_key(key)[0], steps, name)


def _is_merged(model: Any, keys: Iterable[str]) -> bool:
    """Return whether transformers would merge stored tensors, such as single experts, into a place of the model."""
    todays_name = _renaming(model)
    steps = [step for step in get_model_conversion_mapping(model) if not isinstance(step, WeightRenaming)]
    return any(step.rename_source_key(todays_name(key))[1] is not None for key in keys for step in steps)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _kept_in_float32(model: Any, dtype: torch.dtype) -> tuple[re.Pattern[str], ...]:
    # The model classes say which modules must not be narrowed; what they say is a part of a name, with * for anything.
    parts: list[str] = []
    if dtype == torch.float16:
        parts += getattr(model, "_keep_in_fp32_modules", None) or []
    if dtype in (torch.float16, torch.bfloat16):
        parts += getattr(model, "_keep_in_fp32_modules_strict", None) or []
    return tuple(re.compile(part.replace("*", ".*")) for part in parts)


def buffers_to(model: nn.Module, device: torch.device) -> None:
    """Move every buffer of the model, which is all that is real in a skeleton."""
    for part in model.modules():
        for leaf, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[leaf] = buffer.to(device)


def outside(names: Iterable[str], modules: Iterable[str]) -> Iterator[str]:
    """Yield the names that lie in none of the modules."""
    prefixes = tuple(f"{module}." for module in modules)
    return (name for name in names if not name.startswith(prefixes))
