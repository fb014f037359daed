"""Compensators at work: what a block lacks is summed over the calibration rows, a map is fitted, the stream goes on by it.

For each block, once its weights are rounded: every batch passes it, and what it reads, what it gives and what that lacks go
into sums; four of the fit rows, so that a method can choose on rows that it has not fitted to, and one of the held-out rows,
which prove it. The map then changes the output in its stored precision, and the next block is quantised on what comes out.

At the end the whole is judged once more: the held-out rows also travel through the quantised network without any map, and if
what the model gives is no nearer to full precision with the maps, all of them are dropped.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from bitmend.calibrate.activation_store import ActivationStore
from bitmend.calibrate.dual_stream import BlockRun, DualStream
from bitmend.compensation import Compensation, CompensationShape
from bitmend.errors import NumericsError
from bitmend.formats.native import compensation_tensors
from bitmend.linalg.least_squares import RegressionSums
from bitmend.models.loading import CAUSAL_LM, IMAGE_CLASSIFIER
from bitmend.numerics.products import FastLinear
from bitmend.protocols import BlockReport, CompensationProblem, Compensator, Event, ModelAdapter, RunReport
from bitmend.sites import Block

LOCAL = "local"


class Compensating:
    """The compensator of one run, block by block."""

    def __init__(self, adapter: ModelAdapter, compensator: Compensator) -> None:
        self._adapter, self._compensator = adapter, compensator
        self._base: ActivationStore | None = None  # held-out rows without any map; None while there is none
        self._local: ActivationStore | None = None

    # ------------------------------------------------------------------------------------------ one block
    def before_(self, block: Block, streams: DualStream, unrounded: AbstractContextManager[None]) -> None:
        """Keep what the full-precision block gives on the quantised network's states; the block is still as it was.

        Cost: one pass of all rows through the block.
        """
        if LOCAL not in self._compensator.targets or self._place(block, streams) is None:
            return
        self._local = streams.new_store()
        with unrounded:
            for position, batch in enumerate(streams.batches):
                hidden = streams.x_q[position].to(streams.device)
                self._local.append(self._adapter.run_block(block.index, hidden, batch.inputs))

    def finish_(
        self, block: Block, run: BlockRun, streams: DualStream, report: BlockReport
    ) -> tuple[Compensation | None, list[Event]]:
        """Take the quantised stream through the rounded block and on with the map that was fitted; set the block's error.

        Returns:
            The map, and what the user must be told.

        Raises:
            NumericsError: NaN or Inf in what the block reads or gives.
        """
        place = self._place(block, streams)
        self._advance_base_(block, streams)
        read = _copy_of(streams)
        error = run.finish_()
        compensation, events = None, []
        if place is not None:
            problem = _Measured(self._compensator, block, place, streams, read, self._local)
            found = self._compensator.fit(problem.problem())
            events = list(found.events)
            report.compensation = {**found.diagnostics, "kept": found.shape is not None, "error_without": error}
            if self._judges(streams):
                without = error if self._base is None else streams.relative_error(self._base)
                report.compensation["error_without_any"] = without
            if found.shape is not None:
                compensation = Compensation(found.shape, found.tensors).to(streams.device)
                self._carry_on_(compensation, streams, read)
                error = streams.relative_error()
        report.relative_error = error
        self._let_go_(read)
        return compensation, events

    def replay_(self, block: Block, run: BlockRun, streams: DualStream, compensation: Compensation | None) -> float:
        """Take the quantised stream through a finished block and its map; return the error behind it."""
        self._advance_base_(block, streams)
        read = _copy_of(streams)
        error = run.finish_()
        if compensation is not None:
            self._carry_on_(compensation.to(streams.device), streams, read)
            error = streams.relative_error()
        self._let_go_(read)
        return error

    def _place(self, block: Block, streams: DualStream) -> CompensationShape | None:
        behind = next(one for one in streams.x_fp if len(one))
        return place_of(block, streams.x_q[0].shape[1:], behind.shape[1:], self._adapter.reads)

    def _advance_base_(self, block: Block, streams: DualStream) -> None:
        """Take the held-out rows without maps through the rounded block."""
        if self._base is None:
            return
        for place, position in enumerate(streams.judged):
            hidden = self._base[place].to(streams.device)
            inputs = streams.batches[position].inputs
            self._base.replace_(place, self._adapter.run_block(block.index, hidden, inputs))

    def _judges(self, streams: DualStream) -> bool:
        """Whether the whole model is judged in the end, for which some rows travel without any map."""
        return self._compensator.judges_model and streams.has_held_out

    def close(self) -> None:
        """Free what is left of the streams."""
        if self._base is not None:
            self._base.close()
            self._base = None

    def _carry_on_(self, compensation: Compensation, streams: DualStream, read: ActivationStore) -> None:
        """Change what the block has given; from the first map on the held-out rows also travel without any."""
        if self._base is None and self._judges(streams):
            self._base = streams.new_store()
            for position in streams.judged:
                self._base.append(streams.x_q[position])
        for position in range(len(streams.batches)):
            hidden, given = read[position].to(streams.device), streams.x_q[position].to(streams.device)
            with torch.no_grad():
                streams.x_q.replace_(position, compensation(hidden, given))

    def _let_go_(self, read: ActivationStore) -> None:
        read.close()
        if self._local is not None:
            self._local.close()
            self._local = None

    # ------------------------------------------------------------------------------------------ the whole model
    def judge(self, streams: DualStream) -> tuple[dict[str, float], list[Event]]:
        """Return what the model's output on the held-out rows says of all maps together, and what the user must be told.

        Both streams stand behind the last block. `without` and `with` are divergences from the full-precision model in nats,
        of encoders relative squared errors; `standard_error` is that of their difference, over rows; `kept` is 1 where the
        maps bring the output nearer by more than that, else 0. Empty where no map was kept or fewer than two rows are held
        out.

        Cost: what lies behind the last block, three times for each held-out row.
        """
        if self._base is None:
            return {}, []
        rows: dict[str, list[Tensor]] = {"without": [], "with": [], "weight": []}
        for place, position in enumerate(streams.judged):
            batch = streams.batches[position].tokens
            states = (streams.x_fp[position], self._base[place], streams.x_q[position])
            with FastLinear():  # what lies behind the blocks may be as much work as all of them
                wanted, base, now = (self._adapter.logits(one.to(streams.device), batch) for one in states)
            mask = None if batch.mask is None else batch.mask.to(wanted.device)
            rows["without"].append(self._distances(wanted, base, mask))
            rows["with"].append(self._distances(wanted, now, mask))
            rows["weight"].append(self._weights(wanted, mask))
        sums = {name: torch.cat(parts) for name, parts in rows.items()}
        if len(sums["weight"]) < 2:
            return {}, []
        weight = float(sums["weight"].sum())
        found = {name: float(sums[name].sum()) / weight for name in ("without", "with")}
        gained = sums["without"] - sums["with"]
        # By rows, because tokens of one row are alike.
        found["standard_error"] = float(gained.std()) * len(gained) ** 0.5 / weight
        kept = found["without"] - found["with"] > found["standard_error"]
        events = [] if kept else [Event("dropped", "the whole model", _why_dropped(found))]
        return found | {"kept": float(kept)}, events

    @property
    def _gives_logits(self) -> bool:
        return self._adapter.task in (CAUSAL_LM, IMAGE_CLASSIFIER)

    def _distances(self, wanted: Tensor, given: Tensor, mask: Tensor | None) -> Tensor:
        """Return how far the output is from what is wanted, summed over each row."""
        rows = [self._of_row(*pair) for pair in zip(wanted, given, strict=True)]  # vocabularies are large
        return _by_row(torch.stack(rows), mask)

    def _of_row(self, wanted: Tensor, given: Tensor) -> Tensor:
        wanted, given = wanted.float(), given.float()
        if self._gives_logits:
            return kl_div(given.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        return (wanted - given).square().sum(-1)

    def _weights(self, wanted: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the distances of each row are counted against: tokens, or the size of embeddings."""
        each = torch.ones_like(wanted[..., 0]) if self._gives_logits else wanted.float().square().sum(-1)
        return _by_row(each, mask)


def _across(lacking: Tensor, given: Tensor) -> Tensor:
    """Return what is lacking without its part along each token: that part changes its size alone."""
    size = given.square().sum(-1, keepdim=True)
    along = (lacking * given).sum(-1, keepdim=True) / size.clamp(min=torch.finfo(size.dtype).tiny)
    return lacking - along * given


def _by_row(each: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum over the tokens of each row, padding left out."""
    each = each.double()
    if mask is not None and mask.shape == each.shape:
        each = torch.where(mask, each, 0.0)
    return each.reshape(len(each), -1).sum(1)


def final_maps_(report: RunReport, fitted: Mapping[str, Compensation]) -> tuple[dict[str, CompensationShape], set[str]]:
    """Return the maps that stay, and the names of tensors that go after all, by the verdict over the whole model.

    Where it dropped all maps, the report says so at each block from here on.

    Args:
        report: of a run that is through all blocks.
        fitted: the map beside each block that has one.
    """
    judged = report.blocks[-1].compensation.get("model", {}) if report.blocks else {}
    if judged.get("kept", 1.0) == 1:
        return {name: one.shape for name, one in fitted.items()}, set()
    for block in report.blocks:
        if "structure" in block.compensation:
            block.relative_error = block.compensation["error_without_any"]
            block.compensation |= {"kept": False, "bytes": 0}
    return {}, {key for name, one in fitted.items() for key in compensation_tensors(name, one)}


def _why_dropped(found: Mapping[str, float]) -> str:
    return (
        f"on held-out rows the model is at {found['with']:.3g} from full precision with the maps beside its blocks and at "
        f"{found['without']:.3g} without them, with a standard error of {found['standard_error']:.2g}; all are left out "
        "(what was rounded behind them was fitted to their outputs: a run without the compensator is cleaner)"
    )


def _copy_of(streams: DualStream) -> ActivationStore:
    store = streams.new_store()
    for values in streams.x_q:
        store.append(values)
    return store


def place_of(
    block: Block, read: Sequence[int], made: Sequence[int], reads: Literal["tokens", "pictures"]
) -> CompensationShape | None:
    """Return how features lie at the door of a block and behind it; None where a map has no place.

    That is: in front of what reads the pictures, where a sequence changes its length or width, and at a block without layers.

    Args:
        block: described.
        read: shape of what it reads, the rows left out.
        made: shape of what it gives, likewise.
        reads: what the model reads.
    """
    if not block.sites or isinstance(block.module, nn.Sequential) or (reads == "pictures" and block.index == 0):
        return None
    read, made = tuple(read), tuple(made)
    if len(read) != 3 or not any(site.kind in ("conv2d", "grouped_conv2d") for site in block.sites):
        return CompensationShape("bias", read[-1], read[-1]) if made == read else None
    strides = {before / after for before, after in zip(read[1:], made[1:], strict=True)} if len(made) == 3 else set()
    stride = strides.pop() if len(strides) == 1 else 0.0
    if stride < 1 or stride != int(stride):
        return None
    return CompensationShape("bias", read[0], made[0], channels_first=True, stride=int(stride))


class _Measured:
    """The sums at one block."""

    def __init__(
        self,
        compensator: Compensator,
        block: Block,
        place: CompensationShape,
        streams: DualStream,
        read: ActivationStore,
        local: ActivationStore | None,
    ) -> None:
        self._block, self._compensator, self._place = block, compensator, place
        self._streams, self._read, self._local = streams, read, local
        self._usual: Tensor | None = None
        self._clamped = place.channels_first
        self._rows = 0

    def problem(self) -> CompensationProblem:
        """Sum over all batches.

        Raises:
            NumericsError: NaN or Inf among the numbers.
        """
        place, compensator = self._place, self._compensator
        sums: list[RegressionSums] = []
        for position, batch in enumerate(self._streams.batches):
            for x, y, errors, fold in self._parts(position, batch.held_out):
                if not sums:
                    shift = x.float().mean(0)
                    sums = [
                        RegressionSums(place.inputs, place.outputs, len(compensator.targets), shift)
                        for _ in range(compensator.folds + 1)
                    ]
                sums[fold].add_(x, y, errors, self._weights(x))
        if not all(one.is_finite() for one in sums):
            raise NumericsError(
                f"what {self._block.name} reads and gives must be finite, but holds NaN or Inf on the calibration rows; "
                "nothing was saved"
            )
        shape = CompensationShape(
            "bias", place.inputs, place.outputs, 0, 1, place.channels_first, place.stride, self._clamped
        )
        *folds, held_out = sums
        weights = sum(math.prod(site.shape) for site in self._block.sites)
        return CompensationProblem(self._block.name, shape, folds, held_out if held_out.num_rows else None, weights)

    def _parts(self, position: int, held_out: bool) -> Iterator[tuple[Tensor, Tensor, list[Tensor], int]]:
        """Yield inputs, outputs and what these lack of the rows of a batch, by fold; the last fold is the held-out rows."""
        streams, folds = self._streams, self._compensator.folds
        batch = streams.batches[position].tokens
        read, given = self._read[position].to(streams.device), streams.x_q[position].to(streams.device)
        wanted = []
        for target in self._compensator.targets:
            store = self._local if target == LOCAL else streams.x_fp
            assert store is not None
            wanted.append(store[position].to(streams.device))
        # A sum that is cut off at zero may only stand for what is never negative.
        self._clamped = self._clamped and bool((given >= 0).all()) and all(bool((one >= 0).all()) for one in wanted)
        first = self._rows
        self._rows += 0 if held_out else len(read)
        for fold in [folds] if held_out else range(folds):
            rows = slice(None) if held_out else slice((fold - first) % folds, None, folds)
            if not len(read[rows]):
                continue
            mask = None if batch.mask is None else batch.mask[rows].to(streams.device)
            x = self._flat(read[rows], mask, strided=True)
            y = self._flat(given[rows], mask)
            lacking = [self._flat(one[rows], mask).float() - y.float() for one in wanted]
            if self._compensator.scale_free and not self._place.channels_first:
                lacking = [_across(one, y.float()) for one in lacking]
            yield x, y, lacking, fold

    def _flat(self, values: Tensor, mask: Tensor | None, *, strided: bool = False) -> Tensor:
        """Return (token, features)."""
        if self._place.channels_first:
            step = self._place.stride if strided else 1
            values = values[:, :, ::step, ::step].movedim(1, -1)
        if mask is not None and values.shape[: mask.ndim] == mask.shape:
            return values[mask]
        return values.reshape(-1, values.shape[-1])

    def _weights(self, x: Tensor) -> Tensor | None:
        """Return how much each token counts: 1, or less where it is far larger than the median of the first tokens."""
        sizes = x.float().square().sum(-1)
        if self._usual is None:
            self._usual = sizes[sizes > 0].median() if bool((sizes > 0).any()) else sizes.new_tensor(torch.inf)
        limit = self._compensator.token_cap * self._usual
        return (
            None
            if bool((sizes <= limit).all())
            else (limit / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)).clamp(max=1)
        )
