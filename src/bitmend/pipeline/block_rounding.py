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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitmend.calibrate.dual_stream import DualStream, added_by, real_tokens
from bitmend.errors import NumericsError, RecipeError
from bitmend.linalg.learned_rotation import AnyRotation
from bitmend.models.attention import attach_attention, watching
from bitmend.numerics.activation_ranges import AnyRounding, RangeSample, choose_range
from bitmend.numerics.activations import ActivationSpec
from bitmend.numerics.qtensor import ObserverName
from bitmend.numerics.twin_uniform import GELU_DEPTH, TwinGeluSpec
from bitmend.online import AttentionScheme, InputScheme, PrefixShape, attach_input
from bitmend.pipeline.recipe import SEARCH, Recipe
from bitmend.protocols import Batch, Event, ModelAdapter
from bitmend.sites import Block

SEARCH_ROWS = 8  # of the fit split; whole batches
COARSE = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
FINE = 0.025  # on either side of the best coarse ratio
USUAL_RATIOS = 9  # that a search tries, for the forecast
PATIENCE = 2  # ratios in a row that are worse, before a search ends
HELD = ("keys", "values")
OPERANDS = ("queries", "keys", "values", "probabilities")
DEFAULT_OBSERVER: ObserverName = "percentile"  # of what attention multiplies
ALL_ZERO = "it was zero on all calibration rows"
GELU_REACHED = 0.12  # below zero: some of many values come near GELU's smallest
GELU_SLACK = 0.001  # how far below the smallest value of GELU the rounding of a 16-bit type may bring it


@dataclass(frozen=True)
class _Quantiser:
    """Something with a range of its own: what some layers read, or the keys or values of an attention.

    Attributes:
        paths: of the layers, or of the module that attends.
        operand: one of `OPERANDS`; None for layers.
    """

    paths: tuple[str, ...]
    operand: str | None = None


class BlockRounding:
    """The rounding of one block after the other.

    Attributes:
        inputs: path of a layer in the block -> how its input is rounded.
        attentions: path of a module in the block -> how it attends.
    """

    def __init__(self, adapter: ModelAdapter, recipe: Recipe, trace: Batch) -> None:
        """Prepare; `trace` are a few tokens that show where a block attends."""
        self._adapter, self._recipe, self._trace = adapter, recipe, trace
        self._index: int | None = None
        self._prefixes: dict[str, PrefixShape] = {}
        self.inputs: dict[str, AnyRounding] = {}
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
        # The last block also holds what is done to the input of the head.
        here = {name: scheme for name, scheme in inputs.items() if name == block.name or name.startswith(start)}
        schemes = {_path_in(block, name): scheme.activations for name, scheme in here.items()}
        self.inputs = {path: spec for path, spec in schemes.items() if spec is not None}
        self.attentions = {_path_in(block, name): scheme for name, scheme in attentions.items()}

    def input_schemes(self, block: Block, rotations: Mapping[str, AnyRotation]) -> dict[str, InputScheme]:
        """Return what is done to the inputs of layers while the finished model runs, by full path."""
        paths = dict.fromkeys([*self.inputs, *rotations])
        return {_name_of(block, path): InputScheme(rotations.get(path), self.inputs.get(path)) for path in paths}

    def attention_schemes(self, block: Block) -> dict[str, AttentionScheme]:
        """Return how the block's modules attend while the finished model runs, by full path."""
        return {_name_of(block, path): scheme for path, scheme in self.attentions.items()}

    def head_schemes(self, streams: DualStream | None) -> tuple[dict[str, InputScheme], list[Event]]:
        """Return what is done to the inputs of the heads of a model of pictures, behind whose last block the streams are.

        Also what the user must be told.

        Raises:
            NumericsError: NaN or Inf where a range is to be found.

        Cost: what lies behind the last block, once for each fit row.
        """
        spec = self._recipe.head_activation_spec()
        if spec is None or self._adapter.reads != "pictures":
            return {}, []
        if not _is_static(spec):
            return {name: InputScheme(activations=spec) for name in self._adapter.head_names}, []
        assert streams is not None  # what a recipe leaves open needs rows
        samples = {name: RangeSample() for name in self._adapter.head_names}
        with ExitStack() as attached:
            for name, sample in samples.items():
                head = self._adapter.model.get_submodule(name)
                recorder = _Recorder(sample=sample)
                attached.callback(attach_input(head, InputScheme(activations=recorder)).remove)
            for position, batch in enumerate(streams.batches):
                if not batch.held_out:
                    self._adapter.logits(streams.x_q[position].to(streams.device), batch.tokens)
        section = self._recipe.activations
        assert section is not None
        schemes, events = {}, []
        for name, sample in samples.items():
            found = choose_range(sample, spec, section.observer or "minmax")
            schemes[name] = InputScheme(activations=found or _for_each_token(spec))
            if found is None:
                events.append(Event("no_range", name, f"{ALL_ZERO}, so each token gets a scale of its own", True))
        return schemes, events

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
        events = self._find_ranges_(block, streams) + self._observe_ranges_(block, streams)
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
        held = [
            _Quantiser((path,), name) for path, one in schemes for name in OPERANDS if getattr(one, name) is not None
        ]
        return of_layers + held

    def _is_searched(self, quantiser: _Quantiser) -> bool:
        if quantiser.operand is not None and quantiser.operand not in HELD:
            return False
        if not isinstance(self.spec_of(quantiser), ActivationSpec):
            return False
        section = self._recipe.activations if quantiser.operand is None else self._recipe.kv_cache
        return section is not None and section.clip_ratio == SEARCH

    def observer_of(self, quantiser: _Quantiser) -> ObserverName | None:
        """Return how a static range is chosen; None: the largest magnitude, head by head, or no static range at all."""
        recipe = self._recipe
        if quantiser.operand is None:
            return None if recipe.activations is None else recipe.activations.observer
        attention = recipe.attention
        if attention is None or not attention.static or (recipe.kv_cache is not None and quantiser.operand in HELD):
            return None
        return attention.observer or DEFAULT_OBSERVER

    def spec_of(self, quantiser: _Quantiser) -> AnyRounding:
        """Return how it rounds now."""
        if quantiser.operand is None:
            return self.inputs[quantiser.paths[0]]
        spec: AnyRounding = getattr(self.attentions[quantiser.paths[0]], quantiser.operand)
        return spec

    def _uniform_of(self, quantiser: _Quantiser) -> ActivationSpec:
        """Return how it rounds now, to levels that are evenly spaced."""
        spec = self.spec_of(quantiser)
        assert isinstance(spec, ActivationSpec)
        return spec

    def set_(self, quantiser: _Quantiser, spec: AnyRounding) -> None:
        """Let it round so."""
        for path in quantiser.paths:
            if quantiser.operand is None:
                self.inputs[path] = spec
            else:
                self.attentions[path] = _with_operand(self.attentions[path], quantiser.operand, spec)

    def _find_ranges_(self, block: Block, streams: DualStream) -> list[Event]:
        quantisers = [
            one for one in self._quantisers(block) if _is_static(self.spec_of(one)) and self.observer_of(one) is None
        ]
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
                self.set_(quantiser, replace(self._uniform_of(quantiser), ranges=tuple(largest.tolist())))
                continue
            # A range of zero would make zeros of whatever comes later.
            self._without_range_(block, quantiser)
            what = "no calibration token reaches it" if largest is None else "it was zero on all calibration tokens"
            events += _no_range(block, quantiser, what)
        return events

    def _observe_ranges_(self, block: Block, streams: DualStream) -> list[Event]:
        """Choose static ranges from a sample of what comes by."""
        quantisers = [one for one in self._quantisers(block) if _is_static(self.spec_of(one)) and self.observer_of(one)]
        if not quantisers:
            return []
        samples = {one: RangeSample() for one in quantisers}
        with self._recording(block, samples):
            for position, batch in enumerate(streams.batches):
                if batch.held_out:
                    continue
                if batch.tokens.mask is not None:
                    raise RecipeError(
                        "an observer of activations needs rows without padding; give texts that fill the rows, or leave "
                        "observer out"
                    )
                self._adapter.run_block(block.index, streams.x_q[position].to(streams.device), batch.inputs)
        events = []
        for quantiser, sample in samples.items():
            spec, observer = self.spec_of(quantiser), self.observer_of(quantiser)
            assert observer is not None
            if quantiser.operand is None and self._made_by_gelu(sample):
                spec = TwinGeluSpec(spec.bits)
            try:
                chosen = choose_range(sample, spec, observer)
            except NumericsError as error:
                raise NumericsError(f"what {block.name}.{quantiser.paths[0]} reads: {error}") from error
            if chosen is not None:
                self.set_(quantiser, chosen)
                continue
            self._without_range_(block, quantiser)
            what = "nothing came by" if sample.count == 0 else ALL_ZERO
            events += _no_range(block, quantiser, what)
        return events

    def _without_range_(self, block: Block, quantiser: _Quantiser) -> None:
        """Give each token a scale of its own; round nothing in front of a convolution, whose input has no tokens."""
        views = {site.path: site.view for site in block.sites}
        if all(path in views and not views[path].features_last for path in quantiser.paths):
            for path in quantiser.paths:
                del self.inputs[path]
            return
        self.set_(quantiser, _for_each_token(self.spec_of(quantiser)))

    def _made_by_gelu(self, sample: RangeSample) -> bool:
        section = self._recipe.activations
        if section is None or section.after_gelu is None:
            return False
        return -GELU_DEPTH - GELU_SLACK <= sample.lowest < -GELU_REACHED < 0 < sample.highest

    @contextmanager
    def _recording(self, block: Block, samples: Mapping[_Quantiser, RangeSample]) -> Iterator[None]:
        """Round nothing, but let samples take in what would be rounded."""
        schemes: dict[str, AttentionScheme] = {}
        with self.unrounded(block), ExitStack() as attached:
            for quantiser, sample in samples.items():
                recorder = _Recorder(sample=sample)
                path = quantiser.paths[0]
                if quantiser.operand is None:
                    module = block.module.get_submodule(path)
                    attached.callback(attach_input(module, InputScheme(activations=recorder)).remove)
                    continue
                scheme = schemes.get(path) or AttentionScheme(rotation=self.attentions[path].rotation)
                schemes[path] = _with_operand(scheme, quantiser.operand, recorder)
            for path, scheme in schemes.items():
                attached.callback(attach_attention(block.module.get_submodule(path), scheme))
            yield

    def _search_(self, quantiser: _Quantiser, rows: "_SearchRows") -> None:
        start = self._uniform_of(quantiser)
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


def _with_operand(scheme: AttentionScheme, operand: str, rounding: Any) -> AttentionScheme:
    changes: dict[str, Any] = {operand: rounding}
    return replace(scheme, **changes)


def _name_of(block: Block, path: str) -> str:
    return f"{block.name}.{path}" if path else block.name


def _path_in(block: Block, name: str) -> str:
    return "" if name == block.name else name.removeprefix(f"{block.name}.")


def _for_each_token(spec: AnyRounding) -> ActivationSpec:
    """Return a grid as it is, but with a scale for each token; of grids of another kind, one with evenly spaced levels."""
    if isinstance(spec, ActivationSpec):
        return replace(spec, ranges=None, lows=None)
    return ActivationSpec(spec.bits, symmetric=False)


def _is_static(spec: AnyRounding) -> bool:
    return not isinstance(spec, ActivationSpec) or spec.ranges is not None


def _no_range(block: Block, quantiser: _Quantiser, what: str) -> list[Event]:
    idle = any(path in _in_experts(block) for path in quantiser.paths)  # an expert may well be idle
    events = []
    for path in quantiser.paths:
        where = f"{block.name}.{path}" + (f".{quantiser.operand}" if quantiser.operand else "")
        message = f"{what}, so each token gets a scale of its own (none in front of a convolution)"
        events.append(Event("no_range", where, message, degrades=not idle))
    return events


@dataclass(frozen=True)
class _Recorder(ActivationSpec):
    """Stands where something would be rounded, and leaves it as it is."""

    bits: int = 8
    sample: RangeSample = field(default_factory=RangeSample)

    def round(self, values: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
        """Take in what comes by."""
        self.sample.add_(values)
        return values


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
                rows += batch.tokens.num_rows
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
        return real_tokens(added_by(output, hidden).float(), batch.tokens)


class _Largest:
    """Watches what quantisers are given, and keeps the largest magnitude of each, (1,) or (heads,)."""

    def __init__(self, block: Block, rounding: BlockRounding, quantisers: list[_Quantiser]) -> None:
        self.seen: dict[_Quantiser, Tensor] = {}
        self.tokens: Batch | None = None  # at hand
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
        whole = values.shape[:-1].numel() == self.tokens.num_places  # not so inside an expert
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
