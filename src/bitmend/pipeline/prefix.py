"""A prefix: keys and values of a few tokens in front of every text, computed once in full precision.

Some tokens of a trained model (the first one, delimiters) take on activations hundreds of times larger than all others, and
every other token attends to them. Once such tokens stand in front, those of the text stay ordinary, and one static range
suits them (PrefixQuant, arXiv:2410.05265).

Where it differs from PrefixQuant: its prefix fills the cache, so that the text begins behind it; here keys and values lie
beside the weights of the attention, at the positions before 0, and no cache, mask or position of the caller changes. For
rotary embeddings the two are the same, which is proved at every block on random numbers; models that add an embedding of
the position to the token are refused. In a layer with a sliding window every token sees the prefix, however far behind it is.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmend.calibrate.dual_stream import DualStream
from bitmend.errors import ModelError, RecipeError
from bitmend.models.attention import attach_attention, drop_prefix_, hold_prefix_, watching
from bitmend.online import AttentionScheme, PrefixShape
from bitmend.pipeline.recipe import PrefixSection
from bitmend.pipeline.transforming import SLACK, small_numbers_like
from bitmend.protocols import Batch, Event, ModelAdapter, Progress, TokenBatch, tokens_of
from bitmend.sites import Block

ROWS_LOOKED_AT = 64  # of the fit split, whole batches, for the tokens that have massive activations
SMALLEST_SHARE = 0.1  # of the rows in which a token must have them
PROOF_TOKENS = 8


class Prefix:
    """The prefix of one run, at one block after the other.

    Attributes:
        tokens: token numbers, in order.
    """

    def __init__(self, adapter: ModelAdapter, tokens: Sequence[int]) -> None:
        """Prepare; nothing is run yet."""
        self._adapter, self.tokens = adapter, tuple(tokens)
        self._modules: list[nn.Module] = []
        self._hidden: Tensor | None = None

    def begin_(self) -> None:
        """Run everything before the first block.

        Raises:
            ModelError: a model that tells tokens apart by where they stand before any block.
        """
        ids = torch.tensor([self.tokens])
        here, moved = (self._adapter.block_inputs(TokenBatch(ids, first_position=place)).hidden for place in (0, 1))
        if not torch.equal(here, moved):
            raise ModelError(
                "a prefix needs a model whose blocks alone know where a token stands, but "
                f"{type(self._adapter.model).__name__} adds an embedding of the position to each token; leave the prefix out"
            )
        self._inputs = self._adapter.block_inputs(TokenBatch(ids, first_position=-len(self.tokens)))
        self._hidden = self._inputs.hidden
        # For the proof: some tokens behind the prefix, where a text would stand, and all of it as one text, which must fit
        # into a sliding window: there, tokens far behind see the prefix, but would not see the same tokens of a text.
        behind = torch.zeros(1, self._proof_tokens(), dtype=torch.long)
        self._text = self._adapter.block_inputs(TokenBatch(behind))
        self._whole = self._adapter.block_inputs(TokenBatch(torch.cat([ids, behind], 1)))

    def _proof_tokens(self) -> int:
        config: Any = self._adapter.model.config
        window = getattr(config.get_text_config(), "sliding_window", None)
        if not isinstance(window, int):
            return PROOF_TOKENS
        if window <= len(self.tokens):
            raise ModelError(
                f"a prefix must be shorter than the model's sliding window of {window} tokens; got {len(self.tokens)}"
            )
        return min(PROOF_TOKENS, window - len(self.tokens))

    def enter_(self, block: Block) -> dict[str, PrefixShape]:
        """Put keys and values into the modules of a block that attend, before its weights are rounded; return what they hold.

        Raises:
            ModelError: a block that gives the tokens behind the prefix something else than if they stood behind its tokens.
        """
        assert self._hidden is not None, "begin_ comes first"
        self.leave_()
        held: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def keep(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
            del query
            held[module] = key[0].clone(), value[0].clone()

        def run(hidden: Tensor) -> Tensor:
            held.clear()
            with watching(keep):
                return self._adapter.run_block(block.index, hidden, self._inputs)

        paths = {module: path for path, module in block.module.named_modules()}
        # First on the random numbers of the proof, then on the prefix itself, whose keys stay.
        draw = small_numbers_like(self._whole.hidden)
        count = len(self.tokens)
        wanted = self._adapter.run_block(block.index, draw, self._whole)[:, count:]
        run(draw[:, :count])
        self._hold_(held)
        shapes = {paths[module]: _shape(*tensors) for module, tensors in held.items()}
        got = self._run_behind(block, shapes, draw[:, count:])
        _refuse_other(block, wanted, got)
        self._hidden = run(self._hidden)
        self._hold_(held)
        return shapes

    def leave_(self) -> None:
        """Take the prefix out of the block that was entered last."""
        for module in self._modules:
            drop_prefix_(module)
        self._modules = []

    def _hold_(self, held: dict[nn.Module, tuple[Tensor, Tensor]]) -> None:
        for module, (keys, values) in held.items():
            hold_prefix_(module, keys, values)
        self._modules = list(held)

    def _run_behind(self, block: Block, shapes: dict[str, PrefixShape], hidden: Tensor) -> Tensor:
        with ExitStack() as attached:
            for path, shape in shapes.items():
                scheme = AttentionScheme(prefix=shape)
                attached.callback(attach_attention(block.module.get_submodule(path), scheme))
            return self._adapter.run_block(block.index, hidden, self._text)


def _shape(keys: Tensor, values: Tensor) -> PrefixShape:
    heads, tokens, key_width = keys.shape
    return PrefixShape(tokens, heads, key_width, values.shape[-1])


def _refuse_other(block: Block, wanted: Tensor, got: Tensor) -> None:
    error = float((wanted.double() - got.double()).norm() / wanted.double().norm())
    if not error <= SLACK[wanted.dtype]:
        raise ModelError(
            f"{block.name} gives tokens behind a prefix something else than behind the same tokens of a text (error "
            f"{error:.2g} of its size), so that its positions are not relative; leave the prefix out"
        )


# ---------------------------------------------------------------------------------------------- which tokens
def choose_prefix(
    adapter: ModelAdapter,
    section: PrefixSection,
    batches: Sequence[tuple[Batch, bool]],
    first_token: int | None,
    progress: Progress,
    *,
    device: torch.device,
    directory: Path | None,
    trace: Batch,
) -> tuple[tuple[int, ...], Event]:
    """Return the tokens that stand in front, and what the user must be told.

    A token has massive activations where the largest number that a layer writing to the residual stream reads of it is more
    than `threshold` times the median over its row. As many tokens are taken as a row has of them, on average, in the layer
    that has most, of those that are most often among them in other places than the first; then the first token of texts.

    Args:
        adapter: the opened model, in full precision.
        section: of the recipe; its `tokens` are taken as they are.
        batches: calibration rows and whether they are held out; those of the fit split are looked at.
        first_token: with which the model's texts begin; None where it has none.
        progress: shown block by block.
        device: where blocks run.
        directory: where activations are kept; None keeps them in memory.
        trace: a few tokens that show the structure of a block.

    Cost: one pass of 64 rows (whole batches) through the full-precision network.
    """
    if section.tokens is not None:
        return tuple(section.tokens), Event(
            "prefix", "model", f"{len(section.tokens)} tokens of the recipe stand in front"
        )
    rows = _fit_rows(batches)
    if not rows:
        raise RecipeError("prefix.tokens must name tokens where no calibration rows tell which; got neither")
    seen = _Seen(section.threshold)
    streams = DualStream(adapter, [(batch, False) for batch in rows], directory=directory, device=device)
    try:
        names = adapter.block_names
        for index in progress.track(range(len(names)), "looking for massive activations", len(names)):
            adapter.load_block(index)
            block = adapter.describe_block(index, trace)
            seen.look_(streams, block, adapter.wiring_of(block, trace).writers)
            adapter.release_block(index)
    finally:
        streams.close()
    tokens = seen.tokens(first_token, section.max_tokens)
    if not tokens:
        message = f"no token has activations {section.threshold:g} times those of others, so nothing stands in front"
        return (), Event("no_prefix", "model", message)
    message = f"the tokens {list(tokens)} stand in front (largest activation {seen.largest:.0f} times the median)"
    return tokens, Event("prefix", "model", message)


def first_token_of(config: Any) -> int | None:
    """Return the token with which texts of a model begin, as its config says; else the one with which they end."""
    text = config.get_text_config()
    numbers = (getattr(text, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next((number for number in numbers if isinstance(number, int)), None)


def _fit_rows(batches: Sequence[tuple[Batch, bool]]) -> list[TokenBatch]:
    rows: list[TokenBatch] = []
    for batch, held_out in batches:
        if not held_out and sum(len(one.ids) for one in rows) < ROWS_LOOKED_AT:
            rows.append(tokens_of(batch))
    return rows


class _Seen:
    """Which tokens have massive activations, layer by layer."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._in_row: dict[int, set[int]] = {}  # row -> tokens that have them somewhere, behind the first place
        self._count = 0
        self._most = 0.0  # of them a row, in the layer that has most
        self.largest = 0.0

    def look_(self, streams: DualStream, block: Block, paths: Sequence[str]) -> None:
        """Run a block and look at what some of its layers read; layers inside experts see other rows and are left out."""
        inside = {site.path for group in block.groups if group.expert is not None for site in group.sites}
        found: dict[str, list[Tensor]] = {path: [] for path in paths if path not in inside}
        with ExitStack() as hooks:
            for path, ratios in found.items():
                hook = _ratios_to_median(ratios, streams)
                hooks.callback(block.module.get_submodule(path).register_forward_pre_hook(hook).remove)
            streams.run_full_precision_(block.index)
        rows = [row for batch in streams.batches for row in tokens_of(batch.tokens).ids]
        self._count = len(rows)
        for ratios in found.values():
            by_row = [ratio for batch in ratios for ratio in batch]
            for number, (ids, ratio) in enumerate(zip(rows, by_row, strict=True)):
                massive = ids[1:][ratio[1:] > self._threshold]
                self._in_row.setdefault(number, set()).update(massive.tolist())
            self._most = max(self._most, sum(int((ratio > self._threshold).sum()) for ratio in by_row) / len(rows))
            self.largest = max(self.largest, *(float(ratio.max()) for ratio in by_row))

    def tokens(self, first_token: int | None, most: int) -> tuple[int, ...]:
        """Return the prefix; empty where no token has massive activations."""
        if self._most == 0:
            return ()
        rows = Counter(token for ids in self._in_row.values() for token in sorted(ids))
        often = [token for token, count in rows.most_common() if count >= SMALLEST_SHARE * self._count]
        frequent = often[: math.ceil(self._most)]
        first = [] if first_token is None else [first_token]
        return (*frequent[: most - len(first)], *first)


def _ratios_to_median(ratios: list[Tensor], streams: DualStream) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        del module
        tokens = tokens_of(streams.batches[len(ratios)].tokens)
        largest = arguments[0].detach().float().abs().amax(-1).reshape(tokens.ids.shape).cpu()
        real = torch.ones_like(tokens.ids, dtype=torch.bool) if tokens.mask is None else tokens.mask.bool()
        median = largest.masked_fill(~real, torch.nan).nanmedian(1, keepdim=True).values
        ratios.append((largest / median.clamp(min=torch.finfo(torch.float32).tiny)).masked_fill(~real, 0.0))

    return note
