"""Transforms at work: the ends of the model once, then block by block, each proved to keep what the model computes.

What a block or an end did before is compared with what it does afterwards on a few tokens, so that a wrong guess of how its
layers hang together (`models/wiring.py`) ends the run with a sentence and not in a worse model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitmend.errors import ModelError, NumericsError, RecipeError
from bitmend.linalg.hadamard import Rotation
from bitmend.online import InputScheme, attach_input, attach_output
from bitmend.pipeline.per_site import finite_weight
from bitmend.protocols import Calibrated, Event, ModelAdapter, ModelTransform, TokenBatch, Transform, Transformed
from bitmend.sites import Block

# Largest error of what a part computes, over its size, that rounding to its dtype explains; a wrong rotation gives about 1.
# Models compute norms and softmax in float32, whatever their dtype.
SMALL = 0.05  # size of the numbers that blocks are proved on
SLACK = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


class Transforms:
    """The transforms of one run.

    Attributes:
        inputs: path in the model -> rotation of what a module reads, around the blocks.
        outputs: path in the model -> rotation of what a module gives, around the blocks.
        events: what the user must be told of the ends.
    """

    def __init__(self, adapter: ModelAdapter, parts: Sequence[Transform], batch: TokenBatch) -> None:
        """Prepare; nothing is changed yet.

        Args:
            adapter: the model.
            parts: the transforms in order.
            batch: a few tokens for the proofs.
        """
        self._adapter, self._parts, self._batch = adapter, tuple(parts), batch
        self._begun = False
        self._rotating: Transform | None = None  # the one that rotates the residual stream
        self._rotation: Rotation | None = None
        self._on_block: list[RemovableHandle] = []
        self.inputs: dict[str, Rotation] = {}
        self.outputs: dict[str, Rotation] = {}
        self.events: list[Event] = []

    def begin_(self) -> None:
        """Transform what lies around the blocks, if that has not been done; all blocks must be transformed from here on.

        Raises:
            RecipeError: two transforms rotate the same thing.
            ModelError: a transform that this model does not bear, or that does not keep its function.
        """
        if self._begun:
            return
        self._begun = True
        adapter = self._adapter
        for part in self._parts:
            if not isinstance(part, ModelTransform):
                continue
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
            self.events += done.events
            if part.exact:
                _prove(part, "the embedding", hidden, adapter.block_inputs(self._batch).hidden)
                _prove(part, "the output head", logits, adapter.logits(hidden, self._batch))

    def apply_(self, block: Block, streams: Calibrated | None) -> tuple[dict[str, Rotation], list[Event]]:
        """Transform a loaded block; its online rotations stay attached until the next one, or `release_block`.

        Returns:
            Path of a layer in the block -> rotation of its input; and what the user must be told.

        Raises:
            RecipeError: two transforms rotate the same input.
            ModelError: a transform that this block does not bear, or that does not keep its function.
            NumericsError: NaN or Inf in the weights of the block.
        """
        self.release_block()
        inputs: dict[str, Rotation] = {}
        events: list[Event] = []
        if not self._parts:
            return inputs, events
        _refuse_not_finite(block)
        given = self._adapter.block_inputs(self._batch)
        wiring = self._adapter.wiring_of(block, self._batch)
        hidden = _small_numbers_like(given.hidden)

        def added(hidden: Tensor) -> Tensor:
            return self._adapter.run_block(block.index, hidden, given) - hidden

        for part in self._parts:
            before = added(hidden)
            done = part.apply_(block, wiring, streams)
            _refuse_twice(inputs, done)
            self._on_block += _attach(block.module, done)
            inputs |= done.inputs
            events += done.events
            if part is self._rotating and self._rotation is not None:
                hidden, before = self._rotation.apply(hidden), self._rotation.apply(before)
            if part.exact:
                _prove(part, block.name, before, added(hidden))
        return inputs, events

    def release_block(self) -> None:
        """Take the online rotations off the block that was transformed last."""
        for handle in self._on_block:
            handle.remove()
        self._on_block.clear()


def _refuse_not_finite(block: Block) -> None:
    """Refuse a block that would spoil the proof, before a transform gets the blame."""
    for site in block.sites:
        finite_weight(site, block)
    for name, tensor in block.module.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise NumericsError(
                f"the tensor {block.name}.{name} must be finite, but holds NaN or Inf; nothing was saved"
            )


def _small_numbers_like(hidden: Tensor) -> Tensor:
    """Return normal random numbers, small beside what blocks add.

    A real residual stream has a few features a thousand times larger than what one block adds; rounded to bfloat16, their sum
    would hide whether that stays the same. Norms make the same of small numbers.
    """
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(hidden.shape, generator=draw) * SMALL).to(hidden)


def _attach(module: nn.Module, done: Transformed) -> list[RemovableHandle]:
    inputs = [attach_input(module.get_submodule(path), InputScheme(one)) for path, one in done.inputs.items()]
    return inputs + [attach_output(module.get_submodule(path), one) for path, one in done.outputs.items()]


def _refuse_twice(inputs: Mapping[str, Rotation], done: Transformed) -> None:
    twice = sorted(set(inputs) & set(done.inputs))
    if twice:
        raise RecipeError(f"two transforms rotate the input of {twice[0]} while the model runs; leave one of them out")


def _prove(part: Transform, where: str, wanted: Tensor, got: Tensor) -> None:
    size = float(wanted.double().norm())
    error = float((wanted.double() - got.double()).norm()) / size if size else float(got.double().norm())
    if not error <= SLACK[wanted.dtype]:
        raise ModelError(
            f"the transform {type(part).__name__} must keep what {where} computes, but changes it by {error:.2g} of its "
            "size; this architecture is wired in a way that it does not know; leave it out"
        )
