"""What the solved part of a block gives, kept from one run of the block to the next.

Before each group of sites is solved the block runs up to that group, and once more when all of them are. Everything before a
group is solved by then and gives the same results in every later run: attention, the layers, and whole modules of which all
layers are solved, such as a block's attention with its projections. Each is computed by the first run that reaches it.

A result is given again only for the same arguments, told by two sums over the bits of each tensor, and for the same
parameters, told by torch's count of their changes. So nothing has to be known of how the block is wired.

Memory: a stream of activations for each result, in memory or on disk as the others are. Results inside a module whose own
result is kept are let go. Of single layers whose result is wider than the block's input (those of an MLP) what they give
takes more memory than all the rest: it is kept where the caller says that there is room (`wide`), else computed once more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bitmend.calibrate.activation_store import ActivationStore
from bitmend.sites import Block

Arguments = tuple[object, ...]
ATTENTION = "attention "


@dataclass
class _Kept:
    """One result of every batch: its one tensor, its form, and what it was computed from."""

    results: ActivationStore
    computed_from: dict[int, Arguments] = field(default_factory=dict)
    place: int | None = None  # of the tensor in a tuple, with `length` places and None in all others
    length: int = 0
    inside: str = ""  # the module during whose run it was computed last


class KeptResults:
    """Results of one block in the quantised network."""

    def __init__(
        self, block: Block, new_store: Callable[[], ActivationStore], device: torch.device, *, wide: bool = False
    ) -> None:
        self._block, self._new_store, self._device, self._wide = block, new_store, device, wide
        self._kept: dict[str, _Kept] = {}
        self._modules: tuple[str, ...] = ()
        self._running: list[str] = []
        self._group, self._last = -1, False

    def solved_before_(self, group_index: int) -> None:
        """Say that all groups before this one are solved; what is no longer needed is let go.

        Behind the last group comes the last run: it is answered from what is kept, and keeps nothing more.
        """
        if group_index == self._group:
            return
        self._group, self._last = group_index, group_index == len(self._block.groups)
        whole = [path for path in self._modules if path in self._kept]
        for key in list(self._kept):
            inside = self._kept[key].inside
            if any(key.startswith(f"{path}.") or f"{inside}.".startswith(f"{path}.") for path in whole):
                self._kept.pop(key).results.close()
        self._modules = tuple(whole) if self._last else solved_modules(self._block, group_index, wide=self._wide)

    @contextmanager
    def of_batch(self, position: int) -> Iterator[None]:
        """Answer the calls of one run of one batch."""
        modules = [(path, self._block.module.get_submodule(path)) for path in self._modules]
        plain = [module.__dict__.get("forward") for _, module in modules]
        try:
            for path, module in modules:
                module.forward = self._answering(path, module, position)
            with _AttentionCalls(self, position):
                yield
        finally:
            self._running.clear()
            for (_, module), forward in zip(modules, plain, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def result(self, key: str, position: int, arguments: Arguments, compute: Callable[[], Any]) -> Any:
        """Return a result on one batch, kept or computed; the caller may write to it."""
        kept, inside = self._kept.get(key), self._running[-1] if self._running else ""
        if kept is not None:
            kept.inside = inside
        if kept is not None and kept.computed_from.get(position) == arguments:
            again = kept.results[position].to(self._device, copy=True)
            return again if kept.place is None else _tuple_with(again, kept.place, kept.length)
        computed = compute()
        place, length, values = _only_tensor(computed)
        if values is None or self._last:
            return computed
        kept = kept or self._kept.setdefault(key, _Kept(self._new_store(), inside=inside))
        kept.place, kept.length = place, length
        if position > len(kept.results):  # batches come in order; one that comes early is simply not kept
            return computed
        if position < len(kept.results):
            kept.results.replace_(position, values)
        else:
            kept.results.append(values)
        kept.computed_from[position] = arguments
        return computed

    def close(self) -> None:
        """Free the results."""
        for kept in self._kept.values():
            kept.results.close()
        self._kept.clear()
        self._modules = ()

    def _answering(self, path: str, module: nn.Module, position: int) -> Callable[..., Any]:
        forward: Callable[..., Any] = module.forward
        parameters = tuple((id(one), one._version) for one in module.parameters())

        def answer(*args: Any, **options: Any) -> Any:
            def compute() -> Any:
                self._running.append(path)
                result = forward(*args, **options)
                self._running.pop()
                return result

            return self.result(path, position, (fingerprint((args, options)), parameters), compute)

        return answer


class _AttentionCalls(TorchFunctionMode):
    """Counts the attention calls of one run and answers them from what is kept."""

    def __init__(self, kept: KeptResults, position: int) -> None:
        super().__init__()
        self.kept, self.position, self.calls = kept, position, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **options)
        call, self.calls = self.calls, self.calls + 1
        return self.kept.result(
            f"{ATTENTION}{call}", self.position, fingerprint((args, options)), lambda: func(*args, **options)
        )


def solved_modules(block: Block, group_index: int, *, wide: bool = False) -> tuple[str, ...]:
    """Return the largest modules of a block all of whose sites lie in the groups before `group_index`.

    Single layers among them only where their result is no wider than the block's input, or where `wide` ones are wanted.
    Experts are no part of it: they are run by rows of their own (`experts.py`).
    """
    if not block.groups:
        return ()
    leaves = _leaves(block)
    # All layers with a weight count, also those that are skipped or never ran: such a module is not finished with.
    solved = {site.path for group in block.groups[:group_index] if group.expert is None for site in group.sites}
    width = block.groups[0].sites[0].shape[1]
    kept = {path for path in solved if wide or leaves[path] <= width}
    found: list[str] = []
    for path, module in block.module.named_modules():
        if not path or any(path.startswith(f"{parent}.") for parent in found):
            continue
        inside = {f"{path}.{name}" if name else path for name, part in module.named_modules() if _holds_matrix(part)}
        if inside and inside <= solved and (path not in leaves or path in kept):
            found.append(path)
    return tuple(found)


def _leaves(block: Block) -> dict[str, int]:
    """Return the width of each site's result."""
    return {site.path: site.shape[0] for group in block.groups for site in group.sites}


def _holds_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


def _only_tensor(result: Any) -> tuple[int | None, int, Tensor | None]:
    """Return where the one tensor of a result is; no tensor for a result of any other form, which is not kept."""
    if isinstance(result, Tensor):
        return None, 0, result
    if type(result) is tuple:
        places = [place for place, part in enumerate(result) if part is not None]
        if len(places) == 1 and isinstance(result[places[0]], Tensor):
            return places[0], len(result), result[places[0]]
    return None, 0, None


def _tuple_with(values: Tensor, place: int, length: int) -> tuple[Tensor | None, ...]:
    return tuple(values if each == place else None for each in range(length))


def fingerprint(argument: object) -> Arguments:
    """Return what tells arguments apart: shape, type and two sums over the bits of each tensor, the second by place.

    Plain values stand for themselves, any other object for its identity.
    """
    if isinstance(argument, Tensor):
        return _bits(argument)
    if isinstance(argument, dict):
        return tuple((key, fingerprint(argument[key])) for key in sorted(argument))
    if isinstance(argument, (tuple, list)):
        return tuple(map(fingerprint, argument))
    if argument is None or isinstance(argument, (bool, int, float, str)):
        return (repr(argument),)
    return (type(argument).__name__, id(argument))


def _bits(tensor: Tensor) -> Arguments:
    raw = tensor.contiguous().flatten().view(torch.uint8)
    words = raw.view(torch.int64) if len(raw) % 8 == 0 and raw.storage_offset() % 8 == 0 else raw
    # Sums wrap around, which loses nothing.
    places = torch.arange(1, len(words) + 1, dtype=torch.int64, device=words.device)
    plain, weighted = words.sum(dtype=torch.int64), (words * places).sum(dtype=torch.int64)
    return (tuple(tensor.shape), str(tensor.dtype), int(plain), int(weighted))


@dataclass(frozen=True)
class PlannedRun:
    """One run of a block in the quantised network, for the forecast.

    Attributes:
        kept: entries a token (of a picture: all its entries) of the results that are kept at its end, attention's apart.
        attention: whether attention's are kept, too.
        multiplied: weights of the layers that it computes, each as often as a place makes it work.
    """

    kept: int
    attention: bool
    multiplied: int


def planned_runs(block: Block, *, wide: bool = False) -> tuple[PlannedRun, ...]:
    """Return the runs before each group and the last one, with or without the results of wide layers.

    A module's result is taken to be as wide as the block's input, as in every transformer, and attention to be a part of the
    first module that is solved as a whole.
    """
    first = block.groups[0]
    leaves, width = _leaves(block), round(first.rows_per_place * first.sites[0].shape[1])
    entries = {site.path: group.rows_per_place * site.shape[0] for group in block.groups for site in group.sites}
    runs: list[PlannedRun] = []
    before: tuple[str, ...] = ()
    for index in range(len(block.groups) + 1):
        last = index == len(block.groups)
        now = before if last else solved_modules(block, index, wide=wide)
        let_go_next = [path for path in before if path not in now]
        computed = [
            group.rows_per_place * site.shape[0] * site.shape[1]
            for group in block.groups[:index]
            for site in group.sites
            if not any(site.path == path or site.path.startswith(f"{path}.") for path in before)
        ]
        attention = index > 0 and all(path in leaves for path in before)
        kept = sum(entries.get(path, width) for path in [*now, *let_go_next])
        runs.append(PlannedRun(round(kept), attention, round(sum(computed))))
        before = now
    return tuple(runs)
