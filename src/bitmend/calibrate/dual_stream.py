"""The calibration rows as they travel through both networks, one block at a time.

`x_fp` is the input of the current block in the full-precision network, `x_q` the same rows in the quantised network. Only
one block's activations exist at a time, in memory or on disk. What a block's inner layers read is not stored for the
quantised stream: the block is run again for each group of sites, up to that group, and the moments are summed batch by
batch. What the solved part of the block gives is kept and not computed again (`kept_results.py`). For the
full-precision stream the inputs are stored, because the full-precision weights are gone once a group is solved. Experts, of
which there may be hundreds, share one run of the block (`experts.py`).

A block's outputs take the place of its inputs batch by batch. Where nothing is fitted against the full-precision network,
only the held-out rows travel through it: they are what the error after each block is measured on.

Both streams run the same kernels on the same batch shapes, so that without any rounding they stay equal bit for bit.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmend.calibrate.activation_store import ActivationStore
from bitmend.calibrate.experts import (
    ExpertInputs,
    called_with,
    read_at,
    read_both,
    refuse_not_finite,
    with_own_rounding,
)
from bitmend.calibrate.kept_results import KeptResults
from bitmend.linalg.moments import CHUNK_TOKENS, Moments, MomentSums
from bitmend.protocols import Batch, BlockInputs, ModelAdapter, Need
from bitmend.routing import Expert, ExpertTokens, RareExperts
from bitmend.sites import Block, SiteGroup


@dataclass(frozen=True)
class StreamedBatch:
    """One batch with what its blocks need besides hidden states.

    Attributes:
        tokens: the rows.
        held_out: whether they belong to the held-out split.
        inputs: further arguments of every block (`hidden` is empty: it lives in the stores).
    """

    tokens: Batch
    held_out: bool
    inputs: BlockInputs


class DualStream:
    """Both streams in front of one block.

    Attributes:
        x_fp: input of the next block in the full-precision network, one tensor a batch.
        x_q: the same in the quantised network.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        batches: Sequence[tuple[Batch, bool]],
        *,
        directory: Path | None = None,
        device: torch.device,
        full_precision_of_all: bool = True,
        keep_wide: bool = False,
    ) -> None:
        """Embed all rows.

        Args:
            adapter: the model.
            batches: rows, and whether they are held out; a batch never mixes both.
            directory: where activations are kept on disk; None keeps them in memory.
            device: where blocks run.
            full_precision_of_all: take all rows through the full-precision network, else only those that are held out (all
                where none are).
            keep_wide: keep the results of wide layers inside a block as well (`kept_results.py`).
        """
        self.adapter = adapter
        self.keep_wide = keep_wide
        self.device = device
        self._directory = directory
        self.batches: list[StreamedBatch] = []
        judged_only = not full_precision_of_all and any(held_out for _, held_out in batches)
        self._in_full_precision = [held_out or not judged_only for _, held_out in batches]
        self.x_fp, self.x_q = self.new_store(), self.new_store()
        shared: dict[tuple[int, ...], BlockInputs] = {}
        for tokens, held_out in batches:
            inputs = adapter.block_inputs(tokens)
            self.x_fp.append(inputs.hidden if self._in_full_precision[len(self.batches)] else inputs.hidden[:0])
            self.x_q.append(inputs.hidden)
            light = BlockInputs(inputs.hidden[:0], inputs.arguments)
            if tokens.mask is None:  # positions and masks of full rows depend on the shape alone: keep them once
                light = shared.setdefault(tokens.shape, light)
            self.batches.append(StreamedBatch(tokens, held_out, light))

    @property
    def has_held_out(self) -> bool:
        """Whether some rows are held out."""
        return any(batch.held_out for batch in self.batches)

    def new_store(self) -> ActivationStore:
        """Return an empty store, in memory or on disk as the streams are."""
        return ActivationStore(self._directory)

    def run_full_precision_(self, index: int) -> None:
        """Take the full-precision stream through the loaded block `index`: x_fp is its output from here on."""
        self._run_(index, self.x_fp, [position for position, runs in enumerate(self._in_full_precision) if runs])

    def run_quantised_(
        self,
        index: int,
        kept: Callable[[int], AbstractContextManager[None]] = lambda position: nullcontext(),
    ) -> None:
        """Take the quantised stream through the loaded block `index`: x_q is its output from here on.

        Args:
            index: of the block.
            kept: makes the context in which a batch runs, given its number.
        """
        self._run_(index, self.x_q, range(len(self.batches)), kept)

    def _run_(
        self,
        index: int,
        stream: ActivationStore,
        positions: Sequence[int],
        kept: Callable[[int], AbstractContextManager[None]] = lambda position: nullcontext(),
    ) -> None:
        for position in positions:
            with kept(position):
                hidden = stream[position].to(self.device)
                stream.replace_(position, self.adapter.run_block(index, hidden, self.batches[position].inputs))

    def largest_inputs(
        self, block: Block, paths: Sequence[str], turn: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the largest magnitude of each feature that these layers read, in the quantised network, over the fit split.

        Runs the block as it stands once; padding counts for nothing.

        Args:
            block: loaded.
            paths: of the layers.
            turn: applied to the residual stream in front of the block.
        """
        largest: dict[str, Tensor] = {}
        for position, batch in enumerate(self.batches):
            if batch.held_out:
                continue
            with ExitStack() as hooks:
                for path in paths:
                    layer = block.module.get_submodule(path)
                    hooks.callback(
                        layer.register_forward_pre_hook(_keeping_largest(largest, path, batch.tokens)).remove
                    )
                hidden = self.x_q[position].to(self.device)
                self.adapter.run_block(block.index, hidden if turn is None else turn(hidden), batch.inputs)
        return largest

    def some_inputs(
        self,
        block: Block,
        paths: Sequence[str],
        count: int,
        turn: Callable[[Tensor], Tensor] | None = None,
        *,
        evenly: bool = False,
    ) -> dict[str, Tensor]:
        """Return some tokens that these layers read, in the quantised network, of the fit split.

        Half of them are those with the largest magnitudes, the others are taken evenly. Runs the block as it stands once;
        padding counts for nothing.

        Args:
            block: loaded.
            paths: of the layers; one that reads no token has no entry in the answer.
            count: tokens in all.
            turn: applied to the residual stream in front of the block.
            evenly: take all of them evenly.
        """
        places = sum(batch.tokens.num_places for batch in self.batches if not batch.held_out)
        rows = {site.path: round(places * group.rows_per_place) for group in block.groups for site in group.sites}
        largest = 0 if evenly else count // 2
        samples = {path: _Sample(largest, max(1, rows.get(path, places) // max(1, count - largest))) for path in paths}
        for position, batch in enumerate(self.batches):
            if batch.held_out:
                continue
            with ExitStack() as hooks:
                for path, sample in samples.items():
                    layer = block.module.get_submodule(path)
                    hooks.callback(layer.register_forward_pre_hook(_sampling(sample, batch.tokens)).remove)
                hidden = self.x_q[position].to(self.device)
                self.adapter.run_block(block.index, hidden if turn is None else turn(hidden), batch.inputs)
        return {path: sample.tokens() for path, sample in samples.items() if sample.seen}

    def close(self) -> None:
        """Free everything."""
        self.x_fp.close()
        self.x_q.close()

    @property
    def judged(self) -> list[int]:
        """The batches that errors are measured on: the held-out rows if there are any, else all."""
        return [position for position, batch in enumerate(self.batches) if batch.held_out or not self.has_held_out]

    def relative_error(self, others: ActivationStore | None = None) -> float:
        """Return mean (x_fp - x_q)^2 / mean x_fp^2 over the real tokens of the batches in `judged`.

        Args:
            others: states of these batches, one tensor each, that are compared in place of x_q.
        """
        error = energy = 0.0
        for place, position in enumerate(self.judged):
            tokens = self.batches[position].tokens
            full = real_tokens(self.x_fp[position], tokens).double()
            found = self.x_q[position] if others is None else others[place]
            error += float((full - real_tokens(found, tokens).double()).square().sum())
            energy += float(full.square().sum())
        return error / energy if energy else 0.0


class _Sample:
    """Some of the tokens that come by: the largest, and each of a certain number."""

    def __init__(self, largest: int, every: int) -> None:
        self._count, self._every = largest, every
        self._largest: Tensor | None = None
        self._even: list[Tensor] = []
        self.seen = 0

    def add(self, tokens: Tensor) -> None:
        """Take (token, features) into account."""
        if not len(tokens):
            return
        first = -self.seen % self._every
        self._even.append(tokens[first :: self._every].float())
        self.seen += len(tokens)
        largest = self._first(tokens).float()
        self._largest = largest if self._largest is None else self._first(torch.cat([self._largest, largest]))

    def _first(self, tokens: Tensor) -> Tensor:
        return tokens[tokens.abs().amax(1).argsort(descending=True, stable=True)[: self._count]]

    def tokens(self) -> Tensor:
        """Return those that were kept, the largest first."""
        assert self._largest is not None
        return torch.cat([self._largest, *self._even])


def _sampling(sample: _Sample, tokens: Batch) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        del module
        values = arguments[0].detach()
        # The rows of an expert are no longer those of the batch; padding is not told there.
        whole = values.shape[:-1].numel() == tokens.num_places
        sample.add(real_tokens(values, tokens) if whole else values.reshape(-1, values.shape[-1]))

    return add


def real_tokens(values: Tensor, tokens: Batch) -> Tensor:
    """Return (token, features) without the padding."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if tokens.mask is None else flat[tokens.mask.reshape(-1).to(flat.device)]


def added_by(output: Tensor, hidden: Tensor) -> Tensor:
    """Return what a block adds to the residual stream; all that it gives, where it changes the shape of the stream."""
    return output - hidden if output.shape == hidden.shape else output


class BlockRun:
    """Both streams inside one block; gives a solver the moments it asks for.

    From the start the full-precision stream stands behind the block, the quantised stream before it until `finish_`.
    """

    def __init__(
        self,
        streams: DualStream,
        block: Block,
        *,
        keep_inputs: bool,
        rare_experts: RareExperts | None = None,
        whole_residual: bool = False,
        rounded: Container[str] = (),
    ) -> None:
        """Run the full-precision stream through the block, whose weights must still be full precision.

        Args:
            streams: in front of this block.
            block: loaded; transforms already applied.
            keep_inputs: store what each group reads in the full-precision network, for the moments C and D.
            rare_experts: what is done with experts that too few tokens reach; None pools them.
            whole_residual: count what rounding its own input does to a layer as a residual, too; else dx is only what
                earlier layers have left.
            rounded: paths of the layers whose input will be rounded; where it is only for some layers of a group, the
                group's moments are those of what these read.
        """
        self._whole_residual, self._rounded = whole_residual, rounded
        self.streams = streams
        self.block = block
        self._kept = KeptResults(block, streams.new_store, streams.device, wide=streams.keep_wide)
        self._experts = ExpertInputs(
            block,
            streams.new_store,
            rare_experts or RareExperts(),
            keep_inputs=keep_inputs,
            whole_residual=whole_residual,
            rounded=rounded,
        )
        self.fp_inputs = [
            streams.new_store() if keep_inputs and group.expert is None else None for group in block.groups
        ]
        stores = {
            group.sites[0].path: store
            for group, store in zip(block.groups, self.fp_inputs, strict=True)
            if store is not None
        }
        hooks = [
            block.module.get_submodule(path).register_forward_pre_hook(_appender(store))
            for path, store in (stores | self._experts.fp_hidden).items()
        ]
        try:
            streams.run_full_precision_(block.index)
        finally:
            for hook in hooks:
                hook.remove()

    def finish_(self) -> float:
        """Take the quantised stream through the block as it now stands; return its error, as `DualStream.relative_error`."""
        self._kept.solved_before_(len(self.block.groups))
        self.streams.run_quantised_(self.block.index, self._kept.of_batch)
        self.close()
        return self.streams.relative_error()

    def close(self) -> None:
        """Free the stored inputs."""
        self._kept.close()
        self._experts.close()
        for store in self.fp_inputs:
            if store is not None:
                store.close()

    def moments(self, group_index: int, needs: frozenset[Need]) -> tuple[Moments, Moments | None]:
        """Return the moments of one group's input over the fit split and over the held-out split (None without one).

        Raises:
            NumericsError: the group reads NaN or Inf.
            CalibrationError: too few tokens reach the group's expert, and that is to be refused.
        """
        group = self.block.groups[group_index]
        self._kept.solved_before_(group_index)
        if group.expert is not None:
            self._keep_experts(group.expert)
            return self._experts.moments(group, group.expert, needs, self.streams.device)
        stored = self.fp_inputs[group_index]
        cross, residual = Need.CROSS_MOMENT in needs, Need.RESIDUAL_MOMENT in needs
        if (cross or residual) and stored is None:
            raise ValueError(f"{self.block.name}: C and D need keep_inputs=True")
        width = group.sites[0].shape[1]
        fit, held_out = (
            MomentSums(width, cross=cross, residual=residual, device=self.streams.device) for _ in range(2)
        )
        for position, batch in enumerate(self.streams.batches):
            before, x = read_both(*self._quantised_up_to(read_at(group, self._rounded), position))
            x_fp = None
            if stored is not None and (cross or residual):
                x_fp = stored[position].to(x.device).reshape(x.shape)
                x_fp = x_fp if self._whole_residual else with_own_rounding(x_fp, before, x)
            sums = held_out if batch.held_out else fit
            for rows, rows_fp in self._rows(group, batch.tokens, x, x_fp):
                sums.add_(rows, rows_fp)
        refuse_not_finite(group, (fit, held_out))
        return fit.means(), held_out.means() if held_out.num_tokens else None

    def _rows(
        self, group: SiteGroup, tokens: Batch, x: Tensor, x_fp: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield what a group reads, in both networks, as rows of the products that its sites are."""
        view, layer = group.sites[0].view, self.block.module.get_submodule(group.sites[0].path)
        if tokens.mask is not None:  # of texts, whose layers read one row a token
            yield real_tokens(x, tokens), None if x_fp is None else real_tokens(x_fp, tokens)
            return
        if x_fp is None:
            yield from ((rows, None) for rows in view.pieces(layer, x, CHUNK_TOKENS))
            return
        yield from zip(view.pieces(layer, x, CHUNK_TOKENS), view.pieces(layer, x_fp, CHUNK_TOKENS), strict=True)

    def expert_tokens(self, group_index: int) -> ExpertTokens | None:
        """Return how many tokens reach the group's expert; None for a group that every token reaches.

        Raises:
            CalibrationError: too few, and that is to be refused.
        """
        group = self.block.groups[group_index]
        if group.expert is None:
            return None
        self._kept.solved_before_(group_index)
        self._keep_experts(group.expert)
        return self._experts.tokens(group, group.expert)

    def _keep_experts(self, expert: Expert) -> None:
        def calls() -> Iterator[tuple[tuple[Any, ...], Batch, bool]]:
            for position, batch in enumerate(self.streams.batches):
                yield called_with(*self._quantised_up_to(expert.experts, position)), batch.tokens, batch.held_out

        self._experts.keep(expert.experts, calls)

    def _quantised_up_to(self, path: str, position: int) -> tuple[nn.Module, Callable[[], None], str]:
        """Return a module, what runs the block as it stands on one batch, and where that is, in words."""
        where = f"{path} of {self.block.name} on batch {position}"
        return self.block.module.get_submodule(path), partial(self._run_quantised, position), where

    def _run_quantised(self, position: int) -> None:
        """Run the block as it stands on one batch of the quantised network."""
        hidden = self.streams.x_q[position].to(self.streams.device)
        with self._kept.of_batch(position):
            self.streams.adapter.run_block(self.block.index, hidden, self.streams.batches[position].inputs)


def _keeping_largest(
    largest: dict[str, Tensor], path: str, tokens: Batch
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        del module
        read = real_tokens(arguments[0].detach(), tokens).float().abs().amax(0)
        largest[path] = torch.maximum(largest[path], read) if path in largest else read

    return keep


def _appender(store: ActivationStore) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def append(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        del module
        store.append(arguments[0].detach())

    return append
