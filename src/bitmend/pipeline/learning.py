"""The whole network at once, for transforms that learn on it before the first block is transformed.

All blocks are loaded in float32 and stay so while something is learned; a row passes them one after the other, and what a
block needs for the gradient is computed again when its turn comes, so that only one block's is in memory.
"""

import gc
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bitmend.calibrate.dual_stream import real_tokens
from bitmend.numerics.activations import ActivationSpec
from bitmend.numerics.products import FastLinearWithGradient
from bitmend.pipeline.transforming import Transforms, refuse_weights_not_finite
from bitmend.protocols import Batch, BlockInputs, ModelAdapter, OpenNetwork, Progress, TokenBatch, tokens_of
from bitmend.sites import Block, ModelEnds, Wiring


class WholeNetwork(OpenNetwork):
    """A model of an adapter with all its blocks loaded, without gradients of its weights."""

    def __init__(
        self,
        adapter: ModelAdapter,
        rows: Sequence[TokenBatch],
        rounding: Callable[[str], ActivationSpec | None],
        trace: Batch,
    ) -> None:
        """Load everything.

        Args:
            adapter: opened for this alone: its weights may be changed.
            rows: one row each, to learn from.
            rounding: of the input of a site, by its full name.
            trace: a few tokens that show how the layers hang together.

        Raises:
            NumericsError: NaN or Inf in a weight; names it.
        """
        self._adapter, self._rows, self._rounding = adapter, rows, rounding
        self.num_rows = len(rows)
        self.ends: ModelEnds = adapter.ends(trace)
        blocks: list[tuple[Block, Wiring]] = []
        for index in range(len(adapter.block_names)):
            adapter.load_block(index)
            block = adapter.describe_block(index, trace)
            refuse_weights_not_finite(block)
            blocks.append((block, adapter.wiring_of(block, trace)))
        self.blocks = tuple(blocks)
        for parameter in adapter.model.parameters():
            parameter.requires_grad_(False)

    def rounding(self, block: Block, path: str) -> ActivationSpec | None:
        """Return how the input of a layer will be rounded; a router's, which is no site, is not."""
        known = any(site.path == path for site in block.sites)
        return self._rounding(f"{block.name}.{path}") if known else None

    def logits(self, row: int) -> Tensor:
        """Return the logits of the real tokens of one row, with gradients, if they are on."""
        batch = self._rows[row]
        inputs = self._adapter.block_inputs(batch)
        hidden = inputs.hidden
        for index in range(len(self.blocks)):
            run = partial(self._run_block, index, inputs)
            if torch.is_grad_enabled():
                # The generators of random numbers are left alone: nothing is drawn in a network that is not trained.
                hidden = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = run(hidden)
        with FastLinearWithGradient():
            return real_tokens(self._adapter.forward_logits(hidden, batch), batch)

    def _run_block(self, index: int, inputs: BlockInputs, hidden: Tensor) -> Tensor:
        with FastLinearWithGradient():  # here, because the gradient calls this again from outside
            return self._adapter.forward_block(index, hidden, inputs)


def rows_to_learn_from(batches: Sequence[tuple[Batch, bool]]) -> list[TokenBatch]:
    """Return the rows of the fit split, one by one, without their padding."""
    rows = []
    for batch, held_out in ((tokens_of(rows), held_out) for rows, held_out in batches):
        for number, ids in enumerate(batch.ids if not held_out else ()):
            real = ids if batch.mask is None else ids[batch.mask[number].bool()]
            rows.append(TokenBatch(real.unsqueeze(0)))
    return rows


def learn(
    adapter: ModelAdapter,
    transforms: Transforms,
    batches: Sequence[tuple[Batch, bool]],
    rounding: Callable[[str], ActivationSpec | None],
    trace: Batch,
    progress: Progress,
) -> dict[str, Tensor]:
    """Return what the transforms of a run learn, by place in the recipe, a full stop, and the transform's own name.

    Each learns on the network as it is in its files. Reproducible: the same request learns the same on the same machine.

    Cost: the whole network in float32 beside everything else, and what a transform says of its own.
    """
    learned: dict[str, Tensor] = {}
    for place, part in transforms.learning.items():
        network = WholeNetwork(adapter.reopened(torch.float32), rows_to_learn_from(batches), rounding, trace)
        found = part.learn(network, progress)
        learned |= {f"{place}.{name}": tensor for name, tensor in found.items()}
        del network
        gc.collect()  # hooks and what they close over refer to one another: the network would stay for a while
    return learned
