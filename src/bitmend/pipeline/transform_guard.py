"""Whether a transform helps at a block: the block rounded without it and with it, on held-out rows.

All weights are rounded to nearest at the bits of the recipe, and everything else as in the finished model, so that the two
cost the same bits; the errors are of what the block gives, against the unrounded block on the same input. It is a cheap
stand-in for the solver that the recipe names, which is fitted after the transforms.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from bitmend.calibrate.dual_stream import added_by
from bitmend.numerics.qtensor import QuantSpec
from bitmend.pipeline.per_site import finite_weight
from bitmend.protocols import Batch, BlockInputs, ModelAdapter, Problem
from bitmend.sites import Block, LinearSite
from bitmend.solvers.rtn import Rtn

GUARD_ROWS = 8  # held-out rows at most


class TransformGuard:
    """Judges transforms of one run."""

    def __init__(
        self,
        adapter: ModelAdapter,
        scheme: Callable[[LinearSite], QuantSpec | None],
        rounding: Callable[[Block], AbstractContextManager[None]],
        batches: Sequence[tuple[Batch, bool]],
        device: torch.device,
    ) -> None:
        """Prepare.

        Args:
            adapter: the model.
            scheme: how a site is rounded; None: it is not.
            rounding: a context in which a block rounds what its layers and its attention read.
            batches: calibration rows and whether they are held out.
            device: where blocks run.
        """
        self._adapter, self._scheme, self._rounding, self._device = adapter, scheme, rounding, device
        self.positions: list[int] = []
        rows = 0
        for position, (tokens, held_out) in enumerate(batches):
            if held_out and rows < GUARD_ROWS:
                self.positions.append(position)
                rows += tokens.num_rows
        self._batches = [batches[position][0] for position in self.positions]

    def embedded(self) -> tuple[list[Tensor], list[BlockInputs]]:
        """Return the held-out rows in front of the first block, with the other arguments of blocks."""
        inputs = [self._adapter.block_inputs(tokens) for tokens in self._batches]
        return [one.hidden for one in inputs], inputs

    def added(self, block: Block, hidden: Sequence[Tensor], inputs: Sequence[BlockInputs]) -> list[Tensor]:
        """Return what a block as it stands adds to the residual stream, padding set to zero."""
        found = []
        for one, arguments, tokens in zip(hidden, inputs, self._batches, strict=True):
            values = one.to(self._device)
            change = added_by(self._adapter.run_block(block.index, values, arguments), values)
            found.append(change if tokens.mask is None else change * tokens.mask.to(change).unsqueeze(-1))
        return found

    def error(
        self, block: Block, hidden: Sequence[Tensor], inputs: Sequence[BlockInputs], wanted: Sequence[Tensor]
    ) -> float:
        """Return the error of the rounded block over the size of what is wanted; the block is as before afterwards."""
        with self._rounded(block), self._rounding(block):
            got = self.added(block, hidden, inputs)
        error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, wanted, strict=True))
        size = sum(float(b.double().square().sum()) for b in wanted)
        return error / size if size else error

    @contextmanager
    def _rounded(self, block: Block) -> Iterator[None]:
        """Round the weights to nearest while the context lasts."""
        originals = []
        try:
            for site in block.sites:
                spec = self._scheme(site)
                if spec is None:
                    continue
                weight = finite_weight(site, block)
                originals.append((site, site.weight(block.module).clone()))
                rounded = Rtn().solve(Problem(site, weight, spec)).qtensor
                site.store_(block.module, rounded.dequantize(self._adapter.dtype))
            yield
        finally:
            for site, original in originals:
                site.store_(block.module, original)
