"""Which layers of a block read the same input, in which order, and from which norm: found out by running it.

Two tensors are one input when they are the same values in the same memory. Looking at objects alone would tell
`x` from `x.view(...)`; looking at memory alone would miss that it was overwritten in between.

Experts are the exception: a few tokens do not reach all of them, so what each of them reads is known from their module alone
(`models/experts.py`), and the trace says only when that module ran.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitmend.models.experts import UnpackedExperts, experts_of, router_paths
from bitmend.routing import Expert
from bitmend.sites import LAYER_VIEWS, Block, LayerView, LinearSite, SiteGroup, layer_kind

Identity = tuple[int, ...]
# Operations that put a parameter beside activations or add it to them, as a class token, a table of positions or a bias of
# attention: what only they read is no weight of a product.
PLACED = {f"aten::{name}" for name in ("add", "sub", "mul", "cat", "index", "index_select", "gather")}


def identity(tensor: Tensor) -> Identity:
    """Return a key that is equal for two living tensors exactly when they hold the same values in the same memory."""
    width = tensor.shape[-1] if tensor.ndim else 1
    memory = tensor.untyped_storage()._cdata
    return (memory, int(tensor.storage_offset()), tensor.numel(), width, tensor._version)


@dataclass
class Trace:
    """What happened while a block ran.

    Attributes:
        inputs: path of a site, or of a module that holds experts -> the inputs of its calls; in the order of first calls.
        norms: what a norm returned -> its path and the time.
        reads: memory -> times at which something other than a site or a norm read it, or a convolution, to which the features
            of a norm are no columns.
        alive: every tensor seen, so that no memory is used twice.
        rows: path of a site -> rows of its products, all its calls together.
        operations: memory -> names of the operations by which something other than a site or a norm read it.
    """

    inputs: dict[str, list[Identity]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    operations: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    norms: dict[Identity, tuple[str, int]] = field(default_factory=dict)
    reads: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    alive: list[Tensor] = field(default_factory=list)
    clock: int = 0
    inside: int = 0

    def norm_of(self, source: Identity) -> str | None:
        """Return the norm that made this input for the traced sites and for nobody else."""
        path, made = self.norms.get(source, (None, 0))
        if path is None or any(when > made for when in self.reads[source[0]]):
            return None
        return path


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm over features, with at most one scale per feature."""
    if "Norm" not in type(module).__name__ or any(layer_kind(part) is not None for part in module.modules()):
        return False
    weight = getattr(module, "weight", None)
    return weight is None or weight.ndim == 1


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every tensor that is read outside sites and norms."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        trace = self.trace
        trace.clock += 1
        if not trace.inside and not func.is_view:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                    trace.alive.append(leaf)
                    memory = leaf.untyped_storage()._cdata
                    trace.reads[memory].append(trace.clock)
                    trace.operations[memory].add(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _hooked(block: nn.Module, trace: Trace) -> Iterator[None]:
    holders = experts_of(block)
    with ExitStack() as hooks:
        for path, module in block.named_modules():
            if _inside(path, holders):
                continue
            if path in holders:
                hooks.callback(module.register_forward_pre_hook(_experts_hook(trace, path), with_kwargs=True).remove)
                continue
            kind = layer_kind(module)
            if kind is None and not is_norm(module):
                continue
            enter, leave = _norm_hooks(trace, path) if kind is None else _site_hooks(trace, path, LAYER_VIEWS[kind])
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield


def _site_hooks(trace: Trace, path: str, view: LayerView) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        tensor = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        trace.alive.append(tensor)
        source = identity(tensor)
        if not view.features_last:
            trace.reads[source[0]].append(trace.clock + 1)
            source += (*tensor.shape, *tensor.stride())  # a picture and its transpose have other patches
        trace.inputs.setdefault(path, []).append(source)
        trace.inside += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        del args
        trace.inside -= 1
        trace.rows[path] += output.numel() // view.read(module).shape[0]

    return enter, leave


def _experts_hook(trace: Trace, path: str) -> Callable[..., None]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        tensor = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        trace.alive.append(tensor)
        trace.inputs.setdefault(path, []).append(identity(tensor))

    return enter


def _inside(path: str, holders: Iterable[str]) -> bool:
    return any(path.startswith(f"{holder}.") for holder in holders)


def _norm_hooks(trace: Trace, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        del module, args, kwargs
        trace.inside += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        trace.inside -= 1
        if isinstance(output, Tensor):
            trace.alive.append(output)
            trace.norms.setdefault(identity(output), (path, trace.clock))  # the innermost, which holds the scale

    return enter, leave


def trace_block(block: nn.Module, run: Callable[[], Any]) -> Trace:
    """Call `run`, which runs the block, and return what was seen."""
    trace = Trace()
    with torch.no_grad(), _hooked(block, trace), _Reads(trace):
        output = run()
    # What the block returns is read by the next one.
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            trace.reads[leaf.untyped_storage()._cdata].append(trace.clock + 1)
    return trace


def describe(name: str, index: int, block: nn.Module, trace: Trace, *, places: int) -> Block:
    """Turn a trace of `places` places (tokens, or pictures) into typed facts."""
    holders, routers = experts_of(block), router_paths(block)
    grouped: dict[Hashable, list[str]] = {}
    for path, sources in trace.inputs.items():
        if path not in routers:
            # A layer that runs twice has two inputs and shares its moments only with one that has the same two; two
            # convolutions may make different patches of one input; and what enters a module of experts is not what each of
            # them reads.
            key: Hashable = path if path in holders else (tuple(sources), _reading(block, path))
            grouped.setdefault(key, []).append(path)
    groups: list[SiteGroup] = []
    for paths in grouped.values():
        if paths[0] in holders:
            groups += _expert_groups(name, paths[0], block, holders[paths[0]])
            continue
        sites = tuple(_site(name, path, block) for path in paths)
        sources = trace.inputs[paths[0]]
        norm = trace.norm_of(sources[0]) if len(sources) == 1 else None
        rows = trace.rows[paths[0]] / places
        entries = sum(source[2] for source in sources) / places  # the third part of an identity is a count of entries
        groups.append(SiteGroup(group_name(paths), sites, norm, None, rows, entries))
    unread = tuple(path for path in _unread(block, trace, holders) if path not in routers)
    return Block(name, index, block, tuple(groups), unread, routers)


def _expert_groups(name: str, path: str, block: nn.Module, experts: UnpackedExperts) -> Iterator[SiteGroup]:
    """Yield the groups of all experts, the first step of all of them before the second."""
    for step, leaves in enumerate(experts.steps()):
        for number in range(experts.num_experts):
            paths = [f"{path}.{number}.{leaf}" for leaf in leaves]
            sites = tuple(_site(name, one, block) for one in paths)
            yield SiteGroup(group_name(paths), sites, None, Expert(path, number, step))


def _reading(block: nn.Module, path: str) -> Hashable:
    module = block.get_submodule(path)
    kind = layer_kind(module)
    assert kind is not None  # only sites are traced
    return LAYER_VIEWS[kind].reading(module)


def _site(name: str, path: str, block: nn.Module) -> LinearSite:
    module = block.get_submodule(path)
    kind = layer_kind(module)
    assert kind is not None
    rows, columns = LAYER_VIEWS[kind].read(module).shape
    return LinearSite(f"{name}.{path}" if path else name, path, kind, (rows, columns))


def group_name(paths: list[str]) -> str:
    """Return paths with their common parents once: `self_attn.{q_proj,k_proj,v_proj}`."""
    leaves: dict[str, list[str]] = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        leaves.setdefault(parent, []).append(leaf)
    return "+".join(
        (f"{parent}." if parent else "") + (names[0] if len(names) == 1 else "{" + ",".join(names) + "}")
        for parent, names in leaves.items()
    )


def _unread(block: nn.Module, trace: Trace, holders: Iterable[str]) -> Iterator[str]:
    """Yield layers with a matrix of weights that no traced site accounts for, such as packed experts."""
    ran = [holder for holder in holders if holder in trace.inputs]
    for path, module in block.named_modules():
        if path in trace.inputs or _inside(path, ran) or isinstance(module, nn.Embedding):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            read_by = trace.operations.get(parameter.untyped_storage()._cdata, set())
            if parameter.ndim >= 2 and not (read_by and read_by <= PLACED):
                yield path if leaf == "weight" else f"{path}.{leaf}".removeprefix(".")
