"""Which modules of an image model hand one tensor on from the pictures towards the head: its blocks, found by watching.

A model of pictures has no single list of equal blocks: a convolution or an embedding comes first, stages have modules
between them that change the shape, and a stage is a list inside a list. What it has is a chain: modules each of which reads
the very tensor that the one before it has returned. The chain is looked for from the outside in. A module is taken apart as
long as a chain of modules inside it leads from its input to its output and none of them is a bare layer; a block with a
residual connection is no such chain, because its output is a sum.

Nothing is computed: the model runs on torch's meta device, where tensors have a shape and no values. That nothing but the
next block reads what a block returns is for the caller to prove, with values (`hf_image.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from bitmend.errors import ModelError
from bitmend.models.detour import HIDDEN
from bitmend.models.tracing import Identity, identity
from bitmend.sites import layer_kind

HIDDEN_NAMES = (HIDDEN, "pixel_values")  # of the first argument, where it is given by name
ROWS = (2, 3)  # of the two passes that tell which size of a tensor is the number of pictures


@dataclass(frozen=True)
class ChainLink:
    """One block of the chain.

    Attributes:
        name: path of the module in the model.
        input_shape: of its hidden states for one picture, the pictures left out.
        output_shape: the same of what it returns.
        arguments: positional ones after the hidden states, and keyword ones.
        output_spec: the nesting of what it returns.
        output_leaves: what stands in it; None in place of the hidden states and of other tensors.
        place: which of the leaves are the hidden states.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    output_spec: Any = field(repr=False)
    output_leaves: tuple[Any, ...] = field(repr=False)
    place: int = 0

    def wrap(self, hidden: Tensor) -> Any:
        """Return `hidden` as the block would; further tensors are None."""
        leaves = list(self.output_leaves)
        leaves[self.place] = hidden
        return tree_unflatten(leaves, self.output_spec)

    def unwrap(self, output: Any) -> Tensor:
        """Return the hidden states from what the block returns."""
        hidden: Tensor = tree_leaves(output)[self.place]
        return hidden


@dataclass(frozen=True)
class Chain:
    """What a pass has shown.

    Attributes:
        links: in the order in which they run; the last one holds layers.
        first_layer: path of the layer that runs first.
        heads: paths of linear layers behind the chain, in the order in which they run.
        elsewhere: paths of layers that run beside the chain, so that nothing can quantise them.
        idle: paths of layers that never ran.
    """

    links: tuple[ChainLink, ...]
    first_layer: str
    heads: tuple[str, ...]
    elsewhere: tuple[str, ...]
    idle: tuple[str, ...]


@dataclass(eq=False)
class _Call:
    path: str
    given: Identity
    began: int
    ended: int = 0
    returned: Identity | None = None
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    hidden: Tensor | None = None
    output: Any = None


def find_chain(model: nn.Module, shape: tuple[int, ...], run: Callable[[Tensor], Any], dtype: torch.dtype) -> Chain:
    """Return the chain of a model.

    Args:
        model: on meta, in evaluation mode.
        shape: (channels, height, width) of a picture.
        run: runs the model on pixels (picture, channels, height, width).
        dtype: of the pixels.

    Raises:
        ModelError: the model cannot run on meta, or there is no chain that holds layers.
    """
    passes = [_watch(model, torch.empty(rows, *shape, dtype=dtype, device="meta"), run) for rows in ROWS]
    calls, start, counts = passes[0]
    taken = [path for call in _follow(calls, "", start) for path in _inside(model, calls, call)]
    while len(taken) > 1 and _is_behind_the_blocks(model.get_submodule(taken[-1])):
        taken.pop()
    if not taken:
        raise ModelError(
            f"{type(model).__name__} has no row of modules that hand one tensor on from the pictures; this architecture "
            "needs an adapter of its own"
        )
    again = {call.path: call for call in passes[1][0]}
    by_path = {call.path: call for call in calls}
    links = tuple(_link(by_path[path], again[path]) for path in taken)
    order = [call.path for call in calls]
    last = order.index(taken[-1])
    inside = tuple(f"{path}." for path in taken)
    layers = [path for path, part in model.named_modules() if layer_kind(part) is not None]
    outside = [path for path in layers if path not in taken and not path.startswith(inside)]
    ran = [path for path in outside if path in counts]
    behind = sorted((path for path in ran if path in by_path and order.index(path) > last), key=order.index)
    heads = tuple(path for path in behind if isinstance(model.get_submodule(path), nn.Linear))
    first = next(path for path in order if path in layers)  # they stand in the order in which they end
    idle = tuple(path for path in outside if path not in counts)
    return Chain(links, first, heads, tuple(path for path in ran if path not in heads), idle)


def _watch(
    model: nn.Module, pixels: Tensor, run: Callable[[Tensor], Any]
) -> tuple[list[_Call], Identity, dict[str, int]]:
    """Return the calls of all modules that are called once with a tensor, in the order in which they end.

    Also the identity of the pictures, and how often each module was called.
    """
    calls: list[_Call] = []
    counts: dict[str, int] = {}
    alive: list[Any] = [pixels]  # so that no memory is used twice
    with torch.no_grad(), _hooked(model, calls, counts, alive):
        try:
            run(pixels)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            KeyError,
            IndexError,
            AssertionError,
            NotImplementedError,
        ) as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"{type(model).__name__} could not be followed on pictures of {tuple(pixels.shape[1:])} "
                f"({type(error).__name__}: {reason}); give pictures of the size that it was made for, or an adapter of its "
                "own"
            ) from error
    once = [call for call in calls if counts[call.path] == 1 and call.returned is not None]
    return once, identity(pixels), counts


@contextmanager
def _hooked(model: nn.Module, calls: list[_Call], counts: dict[str, int], alive: list[Any]) -> Iterator[None]:
    running: list[_Call | None] = []
    clock = count()

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            counts[path] = counts.get(path, 0) + 1
            alive.append((args, kwargs))
            name = next((one for one in HIDDEN_NAMES if one in kwargs), "")
            hidden = args[0] if args else kwargs.get(name)
            if not isinstance(hidden, Tensor):
                running.append(None)
                return
            rest = {key: value for key, value in kwargs.items() if args or key != name}
            running.append(_Call(path, identity(hidden), next(clock), arguments=(tuple(args[1:]), rest), hidden=hidden))

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        call = running.pop()
        found = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if call is not None and found is not None:
            alive.append(output)
            call.returned, call.output, call.ended = identity(found), output, next(clock)
            calls.append(call)

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if path:
                hooks.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        yield


# ---------------------------------------------------------------------------------------------- the chain
def _follow(calls: Sequence[_Call], parent: str, start: Identity) -> list[_Call]:
    """Return the outermost calls inside `parent` that hand one tensor on from `start`, as far as they go."""
    within = f"{parent}." if parent else ""
    chain: list[_Call] = []
    at, since = start, -1
    while True:
        # What returns its own input, as dropout does, would else be found inside the module that it ends.
        reading = [
            call
            for call in calls
            if call.path.startswith(within) and call.path != parent and call.given == at and call.began > since
        ]
        outermost = [call for call in reading if not any(call.path.startswith(f"{other.path}.") for other in reading)]
        # Two modules that read one tensor, such as a layer and a shortcut beside it, are a fork.
        if len(outermost) != 1 or _has_tensors(outermost[0].arguments):
            return chain
        chain.append(outermost[0])
        returned = outermost[0].returned
        assert returned is not None
        at, since = returned, outermost[0].ended


def _inside(model: nn.Module, calls: Sequence[_Call], call: _Call) -> list[str]:
    """Return the chain that a module consists of, or the module itself."""
    chain = _follow(calls, call.path, call.given)
    ends = [position for position, one in enumerate(chain) if one.returned == call.returned]
    if not ends:
        return [call.path]
    chain = chain[: ends[-1] + 1]
    if any(layer_kind(model.get_submodule(one.path)) is not None for one in chain):
        return [call.path]
    inside = [path for one in chain for path in _inside(model, calls, one)]
    holding = [path for path in inside if _holds_layers(model.get_submodule(path))]
    # One block, and modules without layers beside it, such as a norm, are one block.
    return inside if len(holding) > 1 or len(chain) == 1 else [call.path]


def _holds_layers(module: nn.Module) -> bool:
    return any(layer_kind(part) is not None for part in module.modules())


def _is_behind_the_blocks(module: nn.Module) -> bool:
    """Return whether the last link of a chain is no block: pooling, a norm, or a head that the chain reaches."""
    layers = [part for part in module.modules() if layer_kind(part) is not None]
    return not layers or (len(layers) == 1 and isinstance(layers[0], nn.Linear))


def _has_tensors(arguments: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(arguments))


# ---------------------------------------------------------------------------------------------- shapes
def _link(call: _Call, again: _Call) -> ChainLink:
    leaves, spec = tree_flatten(call.output)
    place = next(position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    kept = tree_map(lambda leaf: None if isinstance(leaf, Tensor) else leaf, leaves)
    other = tree_leaves(again.output)[place]
    for one, two in ((call.arguments, again.arguments), (call.output, again.output)):
        if _plain(one) != _plain(two):
            raise ModelError(
                f"{call.path} is called with, or returns, {_plain(one)} for {ROWS[0]} pictures and {_plain(two)} for "
                f"{ROWS[1]}, need the same for any number; this architecture needs an adapter of its own"
            )
    assert call.hidden is not None
    assert again.hidden is not None
    return ChainLink(
        call.path,
        _of_one(call.path, call.hidden, again.hidden),
        _of_one(call.path, leaves[place], other),
        call.arguments,
        spec,
        tuple(kept),
        place,
    )


def _plain(value: Any) -> list[str]:
    """Return what is no tensor in nested values, in words."""
    return [repr(leaf) for leaf in tree_leaves(value) if not isinstance(leaf, Tensor)]


def _of_one(path: str, first: Tensor, second: Tensor) -> tuple[int, ...]:
    """Return the shape of what belongs to one picture, which must be told by the first size alone."""
    if (first.shape[0], second.shape[0]) != ROWS or first.shape[1:] != second.shape[1:]:
        raise ModelError(
            f"{path} reads or returns {tuple(first.shape)} for {ROWS[0]} pictures and {tuple(second.shape)} for {ROWS[1]}, "
            "need one row a picture; this architecture needs an adapter of its own"
        )
    return tuple(first.shape[1:])
