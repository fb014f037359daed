"""Which module list holds the blocks of a model, and how to run what lies around them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitmend.errors import ModelError
from bitmend.sites import LAYER_VIEWS, layer_kind

HIDDEN = "hidden_states"


@dataclass(frozen=True)
class BlockList:
    """A module list that may be the stack of decoder layers."""

    name: str
    blocks: tuple[nn.Module, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Full paths of the blocks."""
        return tuple(f"{self.name}.{index}" for index in range(len(self.blocks)))


def candidate_lists(model: nn.Module) -> list[BlockList]:
    """Return the outermost module lists whose members are of one class and hold sites, the longest first."""
    found: list[BlockList] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer.name}.") for outer in found)  # experts are no blocks
        if isinstance(module, nn.ModuleList) and not nested and _holds_blocks(module):
            found.append(BlockList(name, tuple(module)))
    return sorted(found, key=lambda one: -len(one.blocks))


def _holds_blocks(modules: nn.ModuleList) -> bool:
    if len({type(module) for module in modules}) != 1:
        return False
    return all(
        layer_kind(module) is None and any(_reads_features(part) for part in module.modules()) for module in modules
    )


def _reads_features(module: nn.Module) -> bool:
    """Return whether a module is a layer of tokens; a list of convolutions alone is what comes before the decoder."""
    kind = layer_kind(module)
    return kind is not None and LAYER_VIEWS[kind].features_last


@contextmanager
def detour(blocks: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward(index, args, kwargs)` in place of each block's own, whatever else happens to the blocks.

    The blocks stay where they are, so that a model may still read their attributes.
    """
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.__dict__["forward"] = partial(_call, forward, index)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if own is not None:
                block.__dict__["forward"] = own


def _call(forward: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Any:
    return forward(index, args, kwargs)


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return the hidden states that a block is called with, and the further arguments."""
    if args:
        return args[0], args[1:], dict(kwargs)
    rest = dict(kwargs)
    return rest.pop(HIDDEN), (), rest


@dataclass(frozen=True)
class ReturnForm:
    """How the blocks hand on their hidden states: alone, or first in a tuple of `length`."""

    length: int | None = None

    @classmethod
    def of(cls, output: Any) -> "ReturnForm":
        """Return the form of one block's output.

        Raises:
            ModelError: it is neither a tensor nor a tuple that begins with one.
        """
        if isinstance(output, Tensor):
            return cls()
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return cls(len(output))
        raise ModelError(
            f"a block returned {type(output).__name__}, need a tensor or a tuple that begins with one; "
            "this architecture needs an adapter of its own"
        )

    def wrap(self, hidden: Tensor) -> Any:
        """Return `hidden` as a block would."""
        return hidden if self.length is None else (hidden, *[None] * (self.length - 1))

    @staticmethod
    def unwrap(output: Any) -> Tensor:
        """Return the hidden states from a block's output."""
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        return hidden


class _Reached(Exception):  # noqa: N818 (no error: it ends a forward that has said what it had to)
    def __init__(self, found: BlockList) -> None:
        self.found = found


def first_reached(candidates: Sequence[BlockList], run: Callable[[], Any]) -> BlockList | None:
    """Return the list whose member is the first to run in `run`, which is cut short there."""
    blocks = [block for one in candidates for block in one.blocks]
    owners = [one for one in candidates for _ in one.blocks]

    def reach(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del args, kwargs
        raise _Reached(owners[index])

    try:
        with detour(blocks, reach):
            run()
    except _Reached as reached:
        return reached.found
    return None


@dataclass(frozen=True)
class Probe:
    """What one forward of the whole model on a few tokens has shown.

    Attributes:
        form: how the blocks return.
        order: indices of the blocks in the order of their calls.
        first_output: what block 0 made of the tokens.
        changed: the first block that was given something else than the one before it returned; None when none was.
    """

    form: ReturnForm
    order: tuple[int, ...]
    first_output: Tensor
    changed: int | None = None


def probe(blocks: Sequence[nn.Module], run: Callable[[], Any]) -> Probe:
    """Run the model with block 0 at work and all others passing their input on."""
    order: list[int] = []
    outputs: list[Any] = []
    changed: list[int] = []

    def watch(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        order.append(index)
        if not outputs:
            outputs.append(type(blocks[index]).forward(blocks[index], *args, **kwargs))
            return outputs[0]
        given = split_hidden(args, kwargs)[0]
        if not changed and not _equal(given, ReturnForm.unwrap(outputs[0])):
            changed.append(index)
        return ReturnForm.of(outputs[0]).wrap(given)

    with torch.no_grad(), detour(blocks, watch):
        run()
    first = ReturnForm.unwrap(outputs[0])
    return Probe(ReturnForm.of(outputs[0]), tuple(order), first, changed[0] if changed else None)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same, not-a-numbers in the same places."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
