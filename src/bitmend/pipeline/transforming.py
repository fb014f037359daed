"""Transforms at work: the ends of the model once, then block by block, each proved to keep what the model computes.

What a block or an end did before is compared with what it does afterwards on a few tokens, so that a wrong guess of how its
layers hang together (`models/wiring.py`) ends the run with a sentence and not in a worse model. Where rows are held out, a
guard (`pipeline/transform_guard.py`) drops a transform from a block that it makes worse at the same bits; one that rotates
the residual stream is judged at the first block, for all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitmend.calibrate.dual_stream import DualStream, added_by
from bitmend.errors import ModelError, NumericsError, RecipeError
from bitmend.linalg.learned_rotation import AnyRotation, StreamRotation
from bitmend.online import InputScheme, attach_input, attach_output
from bitmend.pipeline.per_site import finite_weight
from bitmend.pipeline.transform_guard import TransformGuard
from bitmend.protocols import (
    TRANSFORMS,
    Batch,
    BlockInputs,
    Calibrated,
    Event,
    LearningTransform,
    ModelAdapter,
    ModelTransform,
    Transform,
    Transformed,
    TransformReport,
)
from bitmend.sites import Block

# Largest error of what a part computes, over its size, that rounding to its dtype explains; a wrong rotation gives about 1.
# Models compute norms and softmax in float32, whatever their dtype.
SMALL = 0.05  # size of the numbers that blocks are proved on
SLACK = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass
class BlockTransforms:
    """What was done to a block.

    Attributes:
        inputs: path of a layer in the block -> rotation of its input while the model runs.
        events: what the user must be told.
        judged: what the guard found.
    """

    inputs: dict[str, AnyRotation]
    events: list[Event]
    judged: list[TransformReport]


class Transforms:
    """The transforms of one run.

    Attributes:
        inputs: path in the model -> rotation of what a module reads, around the blocks.
        outputs: path in the model -> rotation of what a module gives, around the blocks.
        tensors: name in the model -> what must lie in the files for these.
        events: what the user must be told of the ends.
        guard: judges transforms on held-out rows; None keeps them all.
    """

    def __init__(
        self, adapter: ModelAdapter, parts: Sequence[Transform], batch: Batch, forced: Sequence[bool] | None = None
    ) -> None:
        """Prepare; nothing is changed yet.

        Args:
            adapter: the model.
            parts: the transforms in order.
            batch: a few tokens for the proofs.
            forced: of each transform, whether it stays even if it makes a block worse; None: no.
        """
        self._adapter, self._batch = adapter, batch
        self._parts = list(zip(parts, forced or [False] * len(parts), strict=True))
        self._begun = False
        self._rotating: Transform | None = None  # the one that rotates the residual stream
        self._rotation: StreamRotation | None = None
        self._on_block: list[RemovableHandle] = []
        self._at_first: list[TransformReport] = []
        self.guard: TransformGuard | None = None
        self.inputs: dict[str, AnyRotation] = {}
        self.outputs: dict[str, StreamRotation] = {}
        self.tensors: dict[str, Tensor] = {}
        self.events: list[Event] = []

    @property
    def learning(self) -> dict[int, LearningTransform]:
        """Those that learn before anything is transformed, by their place in the recipe."""
        return {place: part for place, (part, _) in enumerate(self._parts) if isinstance(part, LearningTransform)}

    def take_(self, learned: Mapping[str, Tensor]) -> None:
        """Let the transforms that learn apply what they have learned.

        Args:
            learned: by place in the recipe, a full stop, and the transform's own name.
        """
        for place, part in self.learning.items():
            start = f"{place}."
            own = {name.removeprefix(start): tensor for name, tensor in learned.items() if name.startswith(start)}
            self._parts[place] = (part.with_learned(own), self._parts[place][1])

    def begin_(self) -> None:
        """Transform what lies around the blocks, if that has not been done; all blocks must be transformed from here on.

        Raises:
            RecipeError: two transforms rotate the same thing.
            ModelError: a transform that this model does not bear, or that does not keep its function.
        """
        if self._begun:
            return
        self._begun = True
        for part, forced in list(self._parts):
            if isinstance(part, ModelTransform) and self._helps_at_first_block(part, forced):
                self._apply_to_ends_(part)

    def _apply_to_ends_(self, part: ModelTransform) -> None:
        adapter = self._adapter
        ends = adapter.ends(self._batch)
        hidden = adapter.block_inputs(self._batch).hidden
        logits = adapter.logits(hidden, self._batch)
        rotation = part.residual_rotation(ends)
        if rotation is not None:
            if self._rotation is not None:
                raise RecipeError(
                    "two transforms rotate the residual stream; leave one out, or set its residual = false"
                )
            self._rotating, self._rotation = part, rotation
            hidden = rotation.apply(hidden)
        done = part.apply_to_ends_(ends)
        _refuse_twice(self.inputs, done)
        _attach(ends.model, done)
        self.inputs |= done.inputs
        self.outputs |= done.outputs
        self.tensors |= done.tensors
        self.events += done.events
        if part.exact:
            _prove(part, "the embedding", hidden, adapter.block_inputs(self._batch).hidden)
            _prove(part, "the output head", logits, adapter.logits(hidden, self._batch))

    def _helps_at_first_block(self, part: ModelTransform, forced: bool) -> bool:
        """Judge a transform that rotates the residual stream; drop it, saying so, where it does not help.

        It is applied to the first block alone, whose input is rotated likewise: the ends of the model stay as they are.
        """
        rotation = part.residual_rotation(self._adapter.ends(self._batch))
        if rotation is None or self.guard is None or not self.guard.positions:
            return True
        hidden, inputs = self.guard.embedded()
        self._adapter.load_block(0)
        try:
            block = self._adapter.describe_block(0, self._batch)
            refuse_weights_not_finite(block)
            wiring = self._adapter.wiring_of(block, self._batch)
            wanted = self.guard.added(block, hidden, inputs)
            before = self.guard.error(block, hidden, inputs, wanted)
            handles = _attach(block.module, part.apply_(block, wiring, None))
            turned = [[rotation.apply(one) for one in values] for values in (hidden, wanted)]
            after = self.guard.error(block, turned[0], inputs, turned[1])
            for handle in handles:
                handle.remove()
        finally:
            self._adapter.release_block(0)
        judged = self._judge(part, before, after, forced)
        self._at_first.append(judged)
        if not judged.kept:
            self._parts = [pair for pair in self._parts if pair[0] is not part]
            self.events.append(_dropped(judged, f"{block.name} and, with it, of the whole model"))
        return judged.kept

    def apply_(self, block: Block, streams: Calibrated | None) -> BlockTransforms:
        """Transform a loaded block; its online rotations stay attached until the next one, or `release_block`.

        Raises:
            RecipeError: two transforms rotate the same input.
            ModelError: a transform that this block does not bear, or that does not keep its function.
            NumericsError: NaN or Inf in the weights of the block.
        """
        self.release_block()
        found = BlockTransforms({}, [], self._at_first if block.index == 0 else [])
        if not self._parts:
            return found
        refuse_weights_not_finite(block)
        rows, places = self._batch.num_rows, self._batch.num_places
        sample, given = self._adapter.sample_inputs(block.index, rows, places // rows)
        wiring = self._adapter.wiring_of(block, self._batch)
        hidden = small_numbers_like(sample)
        # The streams are rotated from the embedding on, the block only once it is its turn.
        turn = None if self._rotation is None else self._rotation.inverse

        def added(hidden: Tensor) -> Tensor:
            return added_by(self._adapter.run_block(block.index, hidden, given), hidden)

        for part, forced in self._parts:
            before = added(hidden)
            judging = self._begin_judging(block, streams, turn) if part is not self._rotating else None
            done = part.apply_(block, wiring, _turned(streams, turn))
            _refuse_twice(found.inputs, done)
            handles = _attach(block.module, done)
            if part is self._rotating and self._rotation is not None:
                hidden, before, turn = self._rotation.apply(hidden), self._rotation.apply(before), None
            if part.exact:
                _prove(part, block.name, before, added(hidden), rotated=list(found.inputs))
            if judging is not None:
                judged = self._judge(part, judging.before, judging.error(), forced)
                found.judged.append(judged)
                if not judged.kept:
                    judging.restore_(handles)
                    found.events.append(_dropped(judged, block.name))
                    continue
            self._on_block += handles
            found.inputs |= done.inputs
            found.events += done.events
        return found

    def _begin_judging(
        self, block: Block, streams: Calibrated | None, turn: StreamRotation | None
    ) -> "_Judging | None":
        if self.guard is None or not self.guard.positions or not isinstance(streams, DualStream):
            return None
        hidden = [streams.x_q[position].to(streams.device) for position in self.guard.positions]
        if turn is not None:
            hidden = [turn.apply(one) for one in hidden]
        inputs = [streams.batches[position].inputs for position in self.guard.positions]
        wanted = self.guard.added(block, hidden, inputs)
        return _Judging(self.guard, block, hidden, inputs, wanted)

    def _judge(self, part: Transform, before: float, after: float, forced: bool) -> TransformReport:
        # Not a number is not better.
        helps = after <= before
        return TransformReport(name_of(part), before, after, kept=helps or forced, forced=forced and not helps)

    def release_block(self) -> None:
        """Take the online rotations off the block that was transformed last."""
        for handle in self._on_block:
            handle.remove()
        self._on_block.clear()


def refuse_weights_not_finite(block: Block) -> None:
    """Refuse a block that would spoil the proof, before a transform gets the blame."""
    for site in block.sites:
        finite_weight(site, block)
    for name, tensor in block.module.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise NumericsError(
                f"the tensor {block.name}.{name} must be finite, but holds NaN or Inf; nothing was saved"
            )


def small_numbers_like(hidden: Tensor) -> Tensor:
    """Return normal random numbers, small beside what blocks add.

    A real residual stream has a few features a thousand times larger than what one block adds; rounded to bfloat16, their sum
    would hide whether that stays the same. Norms make the same of small numbers.
    """
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(hidden.shape, generator=draw) * SMALL).to(hidden)


def _attach(module: nn.Module, done: Transformed) -> list[RemovableHandle]:
    inputs = [attach_input(module.get_submodule(path), InputScheme(one)) for path, one in done.inputs.items()]
    return inputs + [attach_output(module.get_submodule(path), one) for path, one in done.outputs.items()]


def _refuse_twice(inputs: Mapping[str, AnyRotation], done: Transformed) -> None:
    twice = sorted(set(inputs) & set(done.inputs))
    if twice:
        raise RecipeError(f"two transforms rotate the input of {twice[0]} while the model runs; leave one of them out")


def _prove(part: Transform, where: str, wanted: Tensor, got: Tensor, rotated: Sequence[str] = ()) -> None:
    """Refuse a transform that changes what is computed; `rotated`: inputs that earlier ones rotate as the model runs."""
    size = float(wanted.double().norm())
    error = float((wanted.double() - got.double()).norm()) / size if size else float(got.double().norm())
    if error <= SLACK[wanted.dtype]:
        return
    if rotated:
        raise RecipeError(
            f"the transform {type(part).__name__} cannot come behind one that rotates {rotated[0]} while the model runs: it "
            f"would change what {where} computes by {error:.2g} of its size; put it in front, or leave one of them out"
        )
    raise ModelError(
        f"the transform {type(part).__name__} must keep what {where} computes, but changes it by {error:.2g} of its "
        "size; this architecture is wired in a way that it does not know; leave it out"
    )


class _Turned:
    """The calibration rows in front of a block whose turn to be rotated is still to come."""

    def __init__(self, streams: DualStream, turn: StreamRotation) -> None:
        self._streams, self._turn = streams, turn

    def largest_inputs(self, block: Block, paths: Sequence[str]) -> dict[str, Tensor]:
        return self._streams.largest_inputs(block, paths, self._turn.apply)

    def some_inputs(self, block: Block, paths: Sequence[str], count: int, *, evenly: bool = False) -> dict[str, Tensor]:
        return self._streams.some_inputs(block, paths, count, self._turn.apply, evenly=evenly)


def _turned(streams: Calibrated | None, turn: StreamRotation | None) -> Calibrated | None:
    return _Turned(streams, turn) if isinstance(streams, DualStream) and turn is not None else streams


class _Judging:
    """A block before a transform, and how wrong it is when it is rounded."""

    def __init__(
        self,
        guard: TransformGuard,
        block: Block,
        hidden: list[Tensor],
        inputs: list[BlockInputs],
        wanted: list[Tensor],
    ) -> None:
        self._guard, self._block = guard, block
        self._rows = (hidden, inputs, wanted)
        self._state = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
        self.before = self.error()

    def error(self) -> float:
        return self._guard.error(self._block, *self._rows)

    def restore_(self, handles: Sequence[RemovableHandle]) -> None:
        for handle in handles:
            handle.remove()
        self._block.module.load_state_dict(self._state)


def name_of(part: Transform) -> str:
    """Return the name of a transform in recipes, or of its class."""
    return next((entry.name for entry in TRANSFORMS if entry.part is type(part)), type(part).__name__)


def _dropped(judged: TransformReport, where: str) -> Event:
    return Event(
        "dropped",
        where,
        f"the transform {judged.name} would raise the error of the rounded block on held-out rows from "
        f"{judged.error_without:.3g} to {judged.error_with:.3g}; left out (force = true keeps it)",
    )
