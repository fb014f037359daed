"""How the block at hand rounds what its layers and its attention read: as the recipe says, or as calibration rows have shown.

What a recipe leaves open (static ranges, `clip_ratio = "search"`) is found before the weights of a block are rounded, behind
its transforms, on what the quantised network gives it. The largest magnitudes are those of the whole fit split. Ratios are
then searched one quantiser after the other, all others at work, by the error of what the block adds to the residual stream;
a search goes down from 1 and ends where smaller ratios have made it worse. Sites that read the same input share a quantiser,
keys and values have one each.

PrefixQuant (arXiv:2410.05265) searches eight coarse factors and ten fine ones for each. Here a search stops early, errors are
measured against the unrounded block on the same input, and the weights are not rounded yet.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bitmend.calibrate.dual_stream import DualStream, real_tokens
from bitmend.errors import NumericsError
from bitmend.linalg.learned_rotation import AnyRotation
from bitmend.models.attention import attach_attention, watching
from bitmend.numerics.activations import ActivationSpec
from bitmend.online import AttentionScheme, InputScheme, PrefixShape, attach_input
from bitmend.pipeline.recipe import SEARCH, Recipe
from bitmend.protocols import Event, ModelAdapter, TokenBatch
from bitmend.sites import Block

SEARCH_ROWS = 8  # of the fit split; whole batches
COARSE = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
FINE = 0.025  # on either side of the best coarse ratio
USUAL_RATIOS = 9  # that a search tries, for the forecast
PATIENCE = 2  # ratios in a row that are worse, before a search ends
HELD = ("keys", "values")


@dataclass(frozen=True)
class _Quantiser:
    """Something with a range of its own: what some layers read, or the keys or values of an attention.

    Attributes:
        paths: of the layers, or of the module that attends.
        operand: `keys` or `values`; None for layers.
    """

    paths: tuple[str, ...]
    operand: str | None = None


class BlockRounding:
    """The rounding of one block after the other.

    Attributes:
        inputs: path of a layer in the block -> how its input is rounded.
        attentions: path of a module in the block -> how it attends.
    """

    def __init__(self, adapter: ModelAdapter, recipe: Recipe, trace: TokenBatch) -> None:
        """Prepare; `trace` are a few tokens that show where a block attends."""
        self._adapter, self._recipe, self._trace = adapter, recipe, trace
        self._index: int | None = None
        self._prefixes: dict[str, PrefixShape] = {}
        self.inputs: dict[str, ActivationSpec] = {}
        self.attentions: dict[str, AttentionScheme] = {}

    @property
    def searches(self) -> bool:
        """Whether the recipe leaves something open."""
        return self._recipe.leaves_open

    # ------------------------------------------------------------------------------------------ what is known
    def begin_(self, block: Block) -> None:
        """Take what the recipe says of a block; what it leaves open stays so."""
        if self._index == block.index:
            return
        recipe = self._recipe
        self._index, self._prefixes = block.index, {}
        specs = {site.path: recipe.activation_spec(site.name) for site in block.sites}
        self.inputs = {path: spec for path, spec in specs.items() if spec is not None}
        sites = self._adapter.attentions_of(block, self._trace) if recipe.rounds_attention else ()
        schemes = {site.path: recipe.attention_scheme(site) for site in sites}
        self.attentions = {path: scheme for path, scheme in schemes.items() if scheme is not None}

    def with_prefixes_(self, prefixes: Mapping[str, PrefixShape]) -> None:
        """Let the attentions of the block, by path, look at a prefix that their modules hold."""
        self._prefixes = dict(prefixes)
        for path, shape in prefixes.items():
            self.attentions[path] = replace(self.attentions.get(path, AttentionScheme()), prefix=shape)

    def found_before_(
        self, block: Block, inputs: Mapping[str, InputScheme], attentions: Mapping[str, AttentionScheme]
    ) -> None:
        """Take what was found for a block that is finished, by full path."""
        self.begin_(block)
        start = f"{block.name}."
        schemes = {name.removeprefix(start): scheme.activations for name, scheme in inputs.items()}
        self.inputs = {path: spec for path, spec in schemes.items() if spec is not None}
        self.attentions = {
            "" if name == block.name else name.removeprefix(start): scheme for name, scheme in attentions.items()
        }

    def input_schemes(self, block: Block, rotations: Mapping[str, AnyRotation]) -> dict[str, InputScheme]:
        """Return what is done to the inputs of layers while the finished model runs, by full path."""
        paths = dict.fromkeys([*self.inputs, *rotations])
        return {f"{block.name}.{path}": InputScheme(rotations.get(path), self.inputs.get(path)) for path in paths}

    def attention_schemes(self, block: Block) -> dict[str, AttentionScheme]:
        """Return how the block's modules attend while the finished model runs, by full path."""
        return {f"{block.name}.{path}" if path else block.name: scheme for path, scheme in self.attentions.items()}

    # ------------------------------------------------------------------------------------------ at work
    @contextmanager
    def attached(self, block: Block) -> Iterator[None]:
        """Round what layers and attention read, as in the finished model."""
        self.begin_(block)
        with ExitStack() as attached:
            for path, spec in self.inputs.items():
                module = block.module.get_submodule(path)
                attached.callback(attach_input(module, InputScheme(activations=spec)).remove)
            for path, scheme in self.attentions.items():
                attached.callback(attach_attention(block.module.get_submodule(path), scheme))
            yield

    @contextmanager
    def unrounded(self, block: Block) -> Iterator[None]:
        """Round nothing, but look at the prefix, where there is one."""
        with ExitStack() as attached:
            for path, shape in self._prefixes.items():
                scheme = AttentionScheme(prefix=shape)
                attached.callback(attach_attention(block.module.get_submodule(path), scheme))
            yield

    # ------------------------------------------------------------------------------------------ what is to be found
    def find_(self, block: Block, streams: DualStream) -> list[Event]:
        """Find what the recipe leaves open, and return what the user must be told.

        Raises:
            NumericsError: NaN or Inf where a range is to be found.

        Cost: one pass of the fit split for static ranges; at most twelve passes of eight rows, or of one batch if that holds
        more, for each quantiser whose ratio is searched.
        """
        self.begin_(block)
        events = self._find_ranges_(block, streams)
        searched = [one for one in self._quantisers(block) if self._is_searched(one)]
        if searched:
            rows = _SearchRows(self._adapter, streams, block, self)
            for quantiser in searched:
                self._search_(quantiser, rows)
        return events

    def _quantisers(self, block: Block) -> list[_Quantiser]:
        groups = [tuple(site.path for site in group.sites if site.path in self.inputs) for group in block.groups]
        of_layers = [_Quantiser(paths) for paths in groups if paths]
        schemes = self.attentions.items()
        held = [_Quantiser((path,), name) for path, one in schemes for name in HELD if getattr(one, name) is not None]
        return of_layers + held

    def _is_searched(self, quantiser: _Quantiser) -> bool:
        section = self._recipe.activations if quantiser.operand is None else self._recipe.kv_cache
        return section is not None and section.clip_ratio == SEARCH

    def spec_of(self, quantiser: _Quantiser) -> ActivationSpec:
        """Return how it rounds now."""
        if quantiser.operand is None:
            return self.inputs[quantiser.paths[0]]
        spec: ActivationSpec = getattr(self.attentions[quantiser.paths[0]], quantiser.operand)
        return spec

    def set_(self, quantiser: _Quantiser, spec: ActivationSpec) -> None:
        """Let it round so."""
        for path in quantiser.paths:
            if quantiser.operand is None:
                self.inputs[path] = spec
            elif quantiser.operand == "keys":
                self.attentions[path] = replace(self.attentions[path], keys=spec)
            else:
                self.attentions[path] = replace(self.attentions[path], values=spec)

    def _find_ranges_(self, block: Block, streams: DualStream) -> list[Event]:
        quantisers = [one for one in self._quantisers(block) if self.spec_of(one).ranges is not None]
        if not quantisers:
            return []
        largest_of = _Largest(block, self, quantisers)
        with self.unrounded(block), largest_of.watching():
            for position, batch in enumerate(streams.batches):
                if not batch.held_out:
                    largest_of.tokens = batch.tokens
                    self._adapter.run_block(block.index, streams.x_q[position].to(streams.device), batch.inputs)
        events = []
        for quantiser in quantisers:
            largest = largest_of.seen.get(quantiser)
            if largest is not None and not bool(largest.isfinite().all()):
                raise NumericsError(
                    f"what {block.name}.{quantiser.paths[0]} reads must be finite, but holds NaN or Inf on the calibration "
                    "rows; nothing was saved"
                )
            if largest is not None and bool((largest > 0).all()):
                self.set_(quantiser, replace(self.spec_of(quantiser), ranges=tuple(largest.tolist())))
                continue
            # A range of zero would make zeros of whatever comes later.
            self.set_(quantiser, replace(self.spec_of(quantiser), ranges=None))
            what = "no calibration token reaches it" if largest is None else "it was zero on all calibration tokens"
            idle = any(path in _in_experts(block) for path in quantiser.paths)  # an expert may well be idle
            for path in quantiser.paths:
                where = f"{block.name}.{path}" + (f".{quantiser.operand}" if quantiser.operand else "")
                message = f"{what}, so each token gets a scale of its own"
                events.append(Event("no_range", where, message, degrades=not idle))
        return events

    def _search_(self, quantiser: _Quantiser, rows: "_SearchRows") -> None:
        start = self.spec_of(quantiser)
        errors: dict[float, float] = {}

        def error(ratio: float) -> float:
            if ratio not in errors:
                self.set_(quantiser, replace(start, clip_ratio=ratio))
                errors[ratio] = rows.error()
            return errors[ratio]

        if error(1.0) == error(COARSE[0]):  # no row of the search comes by
            self.set_(quantiser, start)
            return
        worse = 0
        for ratio in COARSE:
            worse = worse + 1 if error(ratio) > errors[_best(errors)] else 0
            if worse == PATIENCE:
                break
        coarse = _best(errors)
        for ratio in (coarse - FINE, coarse + FINE):
            if 0 < ratio <= 1:
                error(ratio)
        self.set_(quantiser, replace(start, clip_ratio=_best(errors)))


def _in_experts(block: Block) -> set[str]:
    return {site.path for group in block.groups if group.expert is not None for site in group.sites}


def _best(errors: Mapping[float, float]) -> float:
    return min(errors, key=errors.__getitem__)


class _SearchRows:
    """A few rows in front of a block, and what the block adds to them when nothing is rounded."""

    def __init__(self, adapter: ModelAdapter, streams: DualStream, block: Block, rounding: BlockRounding) -> None:
        self._adapter, self._streams, self._block, self._rounding = adapter, streams, block, rounding
        self._positions: list[int] = []
        rows = 0
        for position, batch in enumerate(streams.batches):
            if not batch.held_out and rows < SEARCH_ROWS:
                self._positions.append(position)
                rows += len(batch.tokens.ids)
        with rounding.unrounded(block):
            self._wanted = [self._added(position) for position in self._positions]

    def error(self) -> float:
        """Return the squared error of what the block adds, rounded as it is now."""
        total = 0.0
        with self._rounding.attached(self._block):
            for position, wanted in zip(self._positions, self._wanted, strict=True):
                total += float((self._added(position) - wanted).square().sum(dtype=torch.float64))
        return total

    def _added(self, position: int) -> Tensor:
        batch = self._streams.batches[position]
        hidden = self._streams.x_q[position].to(self._streams.device)
        output = self._adapter.run_block(self._block.index, hidden, batch.inputs)
        return real_tokens((output - hidden).float(), batch.tokens)


class _Largest:
    """Watches what quantisers are given, and keeps the largest magnitude of each, (1,) or (heads,)."""

    def __init__(self, block: Block, rounding: BlockRounding, quantisers: list[_Quantiser]) -> None:
        self.seen: dict[_Quantiser, Tensor] = {}
        self.tokens: TokenBatch | None = None  # at hand
        self._block = block
        self._of_layers = [one for one in quantisers if one.operand is None]
        held = [one for one in quantisers if one.operand is not None]
        self._of_attentions = {
            block.module.get_submodule(path): (rounding.attentions[path], [one for one in held if one.paths == (path,)])
            for path in {one.paths[0] for one in held}
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as hooks, watching(self._look_at_attention):
            for quantiser in self._of_layers:
                layer = self._block.module.get_submodule(quantiser.paths[0])
                hooks.callback(layer.register_forward_pre_hook(partial(self._look_at_layer, quantiser)).remove)
            yield

    def _take(self, quantiser: _Quantiser, largest: Tensor) -> None:
        before = self.seen.get(quantiser)
        self.seen[quantiser] = largest if before is None else torch.maximum(before, largest)

    def _look_at_layer(self, quantiser: _Quantiser, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        del module
        assert self.tokens is not None
        values = arguments[0].detach()
        whole = values.shape[:-1].numel() == self.tokens.ids.numel()  # not so inside an expert
        rows = real_tokens(values, self.tokens) if whole else values
        if rows.numel():
            self._take(quantiser, rows.float().abs().amax().reshape(1))

    def _look_at_attention(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        del query
        assert self.tokens is not None
        scheme, quantisers = self._of_attentions.get(module, (None, []))
        for quantiser in quantisers:
            held = InputScheme(scheme.rotation).apply(key) if scheme and quantiser.operand == "keys" else value
            magnitudes = held.float().abs()
            if self.tokens.mask is not None:
                padding = ~self.tokens.mask.bool().to(magnitudes.device)
                magnitudes = magnitudes.masked_fill(padding[:, None, :, None], 0)
            self._take(quantiser, magnitudes.amax((0, 2, 3)))
