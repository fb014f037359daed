"""What one forward pass of a block takes: bytes, products and seconds, measured on a few tokens and carried to any number.

The block is run on four small batches while every tensor that torch makes is watched. After each operation the bytes that
are alive are noted. They are a + b t + c L + d t L for t tokens in rows of length L (c: what all rows share, d: scores that
attention keeps), so four batches give them for each operation, and the largest over all operations is the work space of any
batch. No architecture is known here by name.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bitmend.protocols import BlockInputs, ModelAdapter

SHORT, LONG = 16, 32  # row lengths of the batches that are watched
TIMED_TOKENS = 128
LEAST_SHARE = 0.1  # of a pass that is taken to grow with its tokens, whatever the clock says


@dataclass(frozen=True)
class Growth:
    """A number of bytes: `fixed + each * tokens + shared * length + scores * tokens * length`."""

    fixed: float
    each: float
    shared: float = 0.0
    scores: float = 0.0

    def at(self, rows: int, length: int) -> float:
        """Return the bytes for `rows` rows of `length` tokens."""
        tokens = rows * length
        return max(0.0, self.fixed + self.each * tokens + (self.shared + self.scores * tokens) * length)


@dataclass(frozen=True)
class ForwardCost:
    """One forward pass of one block.

    Attributes:
        work: what lives at each operation beside the block, its input and its arguments; the largest counts.
        arguments: what the block is called with besides hidden states: rotary tables, a mask.
        attention_bytes: results of fused attention, bytes a token: what is kept for the quantised stream.
        attention_macs: multiply-adds of fused attention, for each token and each token that it may look at.
        seconds: of one pass over `timed_tokens` tokens in one row, on this machine, beside `seconds_a_pass`.
        timed_tokens: how many.
        seconds_a_pass: what a pass takes however few its tokens are: weights that are widened or read from memory.
    """

    work: tuple[Growth, ...]
    arguments: Growth
    attention_bytes: float
    attention_macs: float
    seconds: float
    timed_tokens: int
    seconds_a_pass: float = 0.0

    def work_bytes(self, rows: int, length: int) -> float:
        """Return the largest work space of a pass over one batch, its output counted."""
        return max(growth.at(rows, length) for growth in self.work)


@torch.no_grad()
def measure_forward(adapter: ModelAdapter, index: int, timed_tokens: int = TIMED_TOKENS) -> ForwardCost:
    """Watch the loaded block `index` at work.

    Args:
        adapter: the model.
        index: of a loaded block.
        timed_tokens: length of the row that is timed; at most the model's context.

    Cost: ten passes over at most `timed_tokens` tokens each.
    """
    fixed = adapter.row_length
    shapes = ((1, SHORT), (1, LONG), (2, SHORT), (2, LONG)) if fixed is None else ((1, fixed), (2, fixed))
    seen = [_watch(adapter, index, rows, length) for rows, length in shapes]
    series = [one.live for one in seen]
    if len({len(one) for one in series}) > 1:  # routing took other ways: the peaks alone can be compared
        series = [[max(one)] for one in series]
    argument_bytes = [[one.arguments] for one in seen]
    whole = _time(adapter, index, timed_tokens)
    few = max(1, timed_tokens // 4)
    seconds = whole
    if few < timed_tokens:
        # What grows with the tokens; not more than all of it, where the few took as long.
        growing = (whole - _time(adapter, index, few)) * timed_tokens / (timed_tokens - few)
        seconds = min(whole, max(growing, LEAST_SHARE * whole))
    return ForwardCost(
        work=_growths(series, shapes),
        arguments=_growths(argument_bytes, shapes)[0],
        attention_bytes=seen[0].attention_bytes / shapes[0][1],
        attention_macs=seen[0].attention_macs / shapes[0][1] ** 2,
        seconds=seconds,
        timed_tokens=timed_tokens,
        seconds_a_pass=whole - seconds,
    )


def _growths(series: Sequence[Sequence[float]], shapes: Sequence[tuple[int, int]]) -> tuple[Growth, ...]:
    """Solve for a, b, c and d of each operation; for a and b alone where all rows are of one length."""
    known = len(shapes)
    equations = torch.tensor(
        [[1.0, rows * length, length, rows * length * length][:known] for rows, length in shapes], dtype=torch.float64
    )
    solved = torch.linalg.solve(equations, torch.tensor(series, dtype=torch.float64))
    return tuple(
        Growth(*map(float, column)) for column in dict.fromkeys(map(tuple, solved.T.round(decimals=6).tolist()))
    )


@dataclass
class _Seen:
    live: list[float]
    arguments: float
    attention_bytes: float
    attention_macs: float


def _watch(adapter: ModelAdapter, index: int, rows: int, length: int) -> _Seen:
    hidden, inputs = adapter.sample_inputs(index, rows, length)
    held = {id(tensor): tensor for tensor in _tensors(inputs.arguments[index])}
    attention = _AttentionShapes()
    with _LiveBytes([*held.values(), hidden, inputs.hidden, *_weights(adapter, index)]) as live, attention:
        output = adapter.run_block(index, hidden, inputs)
        del output
    arguments = sum(tensor.nbytes for tensor in held.values())
    return _Seen(live.series or [0.0], float(arguments), attention.result_bytes, attention.macs)


def _time(adapter: ModelAdapter, index: int, tokens: int) -> float:
    fixed = adapter.row_length
    hidden, inputs = adapter.sample_inputs(index, *((1, tokens) if fixed is None else (tokens // fixed, fixed)))

    def once() -> float:
        started = time.perf_counter()
        adapter.run_block(index, hidden, inputs)
        if hidden.device.type == "cuda":
            torch.cuda.synchronize(hidden.device)
        return time.perf_counter() - started

    once()  # code is generated and memory taken on the first pass
    return min(once() for _ in range(2))


def _weights(adapter: ModelAdapter, index: int) -> list[Tensor]:
    return list(adapter.block_tensors(index).values())


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested arguments of a block."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def argument_tensors(inputs: BlockInputs) -> list[Tensor]:
    """Return the tensors that blocks are called with besides hidden states, each once."""
    return list({id(tensor): tensor for tensor in _tensors(inputs.arguments)}.values())


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes after each operation how many bytes are alive of all tensors made since it was entered."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.series: list[float] = []
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in self._alive:
                self._alive[storage._cdata] = (_weak(storage), storage.nbytes())
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self.series.append(float(sum(size for _, size in self._alive.values())))
        return result


def _weak(storage: torch.UntypedStorage) -> Any:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


class _AttentionShapes(TorchFunctionMode):
    """Sums what fused attention gives back, and the products in it."""

    def __init__(self) -> None:
        super().__init__()
        self.result_bytes = self.macs = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention:
            options = kwargs or {}
            given = dict(zip(("query", "key", "value"), args, strict=False)) | options
            query, key, value = given["query"], given["key"], given["value"]
            self.result_bytes += result.nbytes
            pairs = query.shape[:-1].numel() * key.shape[-2]
            self.macs += pairs * (query.shape[-1] + value.shape[-1])
        return result
