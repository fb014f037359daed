"""The loop: one block after the other, both streams side by side, each result stored before the next is asked for."""

import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bitmend.calibrate.dual_stream import BlockRun, DualStream
from bitmend.compensation import Compensation
from bitmend.errors import NumericsError, ResumeError
from bitmend.numerics.qtensor import QTensor, QuantSpec
from bitmend.online import InputScheme
from bitmend.pipeline.block_rounding import BlockRounding
from bitmend.pipeline.compensating import Compensating
from bitmend.pipeline.learning import learn
from bitmend.pipeline.machine import return_free_memory
from bitmend.pipeline.per_site import FULL_PRECISION_STREAM, PerSite
from bitmend.pipeline.prefix import Prefix, choose_prefix, first_token_of
from bitmend.pipeline.rare_experts import refuse_rare_experts
from bitmend.pipeline.recipe import Recipe
from bitmend.pipeline.resume import Journal, QuantisedBlock
from bitmend.pipeline.transform_guard import TransformGuard
from bitmend.pipeline.transforming import BlockTransforms, Transforms
from bitmend.protocols import Batch, BlockReport, Event, ModelAdapter, Progress, RunReport
from bitmend.sites import Block

UNREAD = "the layer never ran, so nothing is known of its input; not quantised"


def quantise_blocks(
    adapter: ModelAdapter,
    recipe: Recipe,
    batches: Sequence[tuple[Batch, bool]],
    report: RunReport,
    progress: Progress,
    *,
    device: torch.device,
    directory: Path | None = None,
    journal: Journal | None = None,
    transforms: Transforms | None = None,
    keep_wide: bool = False,
) -> Generator[QuantisedBlock, None, None]:
    """Quantise a model block by block and yield each finished block, from the first that `journal` does not hold.

    Args:
        adapter: the opened model; its blocks are read one at a time.
        recipe: what to do.
        batches: calibration rows and whether they are held out; empty for data-free solvers.
        report: filled as the run goes on.
        progress: shown block by block.
        device: where blocks run.
        directory: where activations are kept; None keeps them in memory.
        journal: what an earlier process has finished; gets each site as soon as it is solved. The blocks that are yielded
            are for the caller to write.
        transforms: of the recipe; None makes them here. They begin here, even if no block is left.
        keep_wide: keep what wide layers give from run to run; takes memory, saves products, changes no result.

    Raises:
        NumericsError: NaN or Inf in a weight, in a layer's input or in a block's output.
        FactorizationError: moments that stay indefinite.
        RecipeError: a grid that does not fit a site.
        CalibrationError: an expert that too few tokens reach, where that is to be refused.
        ModelError: a transform that the model does not bear.
        ResumeError: finished blocks do not compute what they computed when they were written.

    Cost: per block one full-precision forward (of the held-out rows, if nothing is fitted against it), one partial
    quantised forward for each group of sites (one for all experts of a layer), one quantised forward, and the solver; before
    it all one full-precision forward where rare experts are to be refused. For each block that the journal holds one
    full-precision and one quantised forward, unless there are no rows or no block is left. A prefix that is to be found takes
    one full-precision forward of at most 64 rows before all else, also when a run goes on.
    """
    if recipe.changes_attention:
        adapter.prepare_attention_()
    transforms = transforms or Transforms(
        adapter, recipe.build_transforms(), adapter.few_rows(), recipe.forced_transforms()
    )
    loop = _Loop(adapter, recipe, report, device, journal, transforms)
    if batches:
        transforms.guard = TransformGuard(
            adapter, lambda site: recipe.scheme(site.name, adapter.dtype), loop.rounding.attached, batches, device
        )
    names = adapter.block_names
    first = 0 if journal is None else journal.num_finished
    if batches and first == 0 and recipe.calibration.rare_experts == "refuse" and loop.measures:
        with loop.timed("forward"):
            refuse_rare_experts(
                adapter,
                batches,
                recipe.calibration.rare(),
                lambda site: recipe.scheme(site.name, adapter.dtype) is not None,
                progress,
                device=device,
                directory=directory,
                trace=adapter.few_rows(),
            )
    loop.begin_(batches, progress, directory)
    if first == len(names):
        return
    streams = None
    if batches:
        with loop.timed("embed"):
            streams = DualStream(
                adapter,
                batches,
                directory=directory,
                device=device,
                full_precision_of_all=loop.keep_inputs or loop.compensating is not None,
                keep_wide=keep_wide,
            )
    try:
        if journal is not None and first and (streams is not None or loop.prefix is not None):
            for index in progress.track(range(first), "running finished blocks again", first):
                loop.replay_block(journal.read_block(index, device), index, streams)
                adapter.release_block(index)
        for index in progress.track(range(first, len(names)), "quantising blocks", len(names) - first):
            yield loop.run_block(index, streams)
            adapter.release_block(index)
            return_free_memory()
    finally:
        loop.close(streams)


class _Loop:
    def __init__(
        self,
        adapter: ModelAdapter,
        recipe: Recipe,
        report: RunReport,
        device: torch.device,
        journal: Journal | None,
        transforms: Transforms,
    ) -> None:
        solver = recipe.build_solver()
        self.device = device
        self.journal = journal
        self.adapter = adapter
        self.recipe = recipe
        self.report = report
        self.transforms = transforms
        self.rounding = BlockRounding(adapter, recipe, adapter.few_rows())
        self.prefix: Prefix | None = None
        wanted = recipe.calibration
        self.solver = PerSite(solver, recipe.solver["name"], wanted.refit, wanted.two_streams)
        self.keep_inputs = wanted.two_streams or bool(solver.needs & FULL_PRECISION_STREAM)
        self.measures = wanted.two_streams or bool(solver.needs)
        compensator = recipe.build_compensator()
        self.compensating = None if compensator is None else Compensating(adapter, compensator)

    def close(self, streams: DualStream | None) -> None:
        """Free the activations of all streams."""
        if streams is not None:
            streams.close()
        if self.compensating is not None:
            self.compensating.close()

    def begin_(self, batches: Sequence[tuple[Batch, bool]], progress: Progress, directory: Path | None) -> None:
        """Choose the tokens that stand in front of every text, then transform what lies around the blocks."""
        self.report.events += [Event("unread", path, UNREAD, True) for path in self.adapter.idle]
        if self.recipe.prefix is not None:
            with self.timed("prefix"):
                tokens, event = choose_prefix(
                    self.adapter,
                    self.recipe.prefix,
                    batches,
                    first_token_of(self.adapter.model.config),
                    progress,
                    device=self.device,
                    directory=directory,
                    trace=self.adapter.few_rows(),
                )
            self.report.events.append(event)
            self.prefix = Prefix(self.adapter, tokens) if tokens else None
        if self.transforms.learning:
            with self.timed("learn"):
                self._learn_(batches, progress)
        with self.timed("embed"):
            self.transforms.begin_()
            if self.prefix is not None:
                self.prefix.begin_()
        self.report.events += self.transforms.events

    def _learn_(self, batches: Sequence[tuple[Batch, bool]], progress: Progress) -> None:
        """Let transforms learn on the whole network, or take what the journal holds of it."""
        learned = None if self.journal is None else self.journal.learned()
        # What is finished was made with rotations that nobody can be sure to learn again.
        if learned is None and self.journal is not None and not self.journal.is_empty:
            raise ResumeError(
                "what transforms had learned for the finished blocks cannot be read any more; pass --overwrite to start again"
            )
        if learned is None:
            learned = learn(
                self.adapter, self.transforms, batches, self.recipe.activation_spec, self.adapter.few_rows(), progress
            )
            return_free_memory()
            if self.journal is not None:
                self.journal.keep_learned(learned)
        self.transforms.take_(learned)

    def run_block(self, index: int, streams: DualStream | None) -> QuantisedBlock:
        started = time.perf_counter()
        block, transformed, events = self._open(index, streams)
        if streams is not None and self.rounding.searches:
            with self.timed("ranges"):
                events += self.rounding.find_(block, streams)
        report = BlockReport(block.name, transforms=transformed.judged)
        self.report.blocks.append(report)
        with self.timed("forward"):
            run = None if streams is None else self._both_streams(streams, block)
            if streams is not None and self.compensating is not None:
                self.compensating.before_(block, streams, self.rounding.unrounded(block))
        return_free_memory()
        compensation = None
        with self.rounding.attached(block):
            sites = self._solve(block, run, report, events)
            return_free_memory()
            if streams is not None and run is not None:
                compensation = self._finish_(block, run, streams, report, events)
        if report.relative_error is not None and not math.isfinite(report.relative_error):
            raise NumericsError(f"the output of {block.name} must be finite, but holds NaN or Inf; nothing was saved")
        report.seconds = time.perf_counter() - started
        kinds = {site.name: site.kind for site in block.sites if site.name in sites}
        inputs, attentions = (
            self.rounding.input_schemes(block, transformed.inputs),
            self.rounding.attention_schemes(block),
        )
        if index == len(self.adapter.block_names) - 1:
            inputs |= self._behind_last_block(streams, report, events)
        self.report.events += events
        rest = self._rest(index, sites)
        self._leave()
        return QuantisedBlock(block.name, sites, kinds, rest, report, tuple(events), inputs, attentions, compensation)

    def _finish_(
        self, block: Block, run: BlockRun, streams: DualStream, report: BlockReport, events: list[Event]
    ) -> Compensation | None:
        """Take the quantised stream through the block, and on with a map beside it where there is a compensator."""
        if self.compensating is None:
            with self.timed("forward"):
                report.relative_error = run.finish_()
            return None
        with self.timed("compensate"):
            compensation, told = self.compensating.finish_(block, run, streams, report)
        events += told
        return compensation

    def _behind_last_block(
        self, streams: DualStream | None, report: BlockReport, events: list[Event]
    ) -> dict[str, InputScheme]:
        """Judge all compensations by what the model gives, and return how the inputs of heads are rounded."""
        if self.compensating is not None and streams is not None:
            with self.timed("compensate"):
                judged, told = self.compensating.judge(streams)
            report.compensation |= {"model": judged} if judged else {}
            events += told
        if self.adapter.reads != "pictures":
            return {}
        with self.timed("ranges"):
            found, told = self.rounding.head_schemes(streams)
        events += told
        return found

    def _both_streams(self, streams: DualStream, block: Block) -> BlockRun:
        rare = self.recipe.calibration.rare()
        with self.rounding.unrounded(block):
            return BlockRun(
                streams,
                block,
                keep_inputs=self.keep_inputs,
                rare_experts=rare,
                whole_residual=self.recipe.calibration.residual != "inherited",
                rounded=frozenset(self.rounding.inputs),
            )

    def replay_block(self, finished: QuantisedBlock, index: int, streams: DualStream | None) -> None:
        """Take both streams and the prefix through a finished block, by the very steps by which they went through it before.

        Raises:
            ResumeError: they come out differently, so that what follows would differ, too.
        """
        block, _, _ = self._open(index, streams)
        if streams is None:
            self._leave()
            return
        self.rounding.found_before_(block, finished.inputs, finished.attentions)
        with self.timed("forward"):
            with self.rounding.unrounded(block):
                run = BlockRun(streams, block, keep_inputs=False)
            for site in block.sites:
                if site.name in finished.sites:
                    site.store_(block.module, finished.sites[site.name].dequantize(self.adapter.dtype))
            with self.rounding.attached(block):
                if self.compensating is None:
                    error = run.finish_()
                else:
                    error = self.compensating.replay_(block, run, streams, finished.compensation)
        self._leave()
        if error != finished.report.relative_error:
            raise ResumeError(
                f"{block.name} was finished with a relative error of {finished.report.relative_error!r}, but run again it "
                f"has {error!r}: this machine computes otherwise than the one that it was finished on, so that the rest "
                "would not fit; go on there, or pass --overwrite to start again"
            )

    def _open(self, index: int, streams: DualStream | None) -> tuple[Block, BlockTransforms, list[Event]]:
        """Load a block and apply the transforms; return also what they did and all that the user must be told."""
        with self.timed("load"):
            self.adapter.load_block(index)
            block = self.adapter.describe_block(index, self.adapter.few_rows())
            transformed = self.transforms.apply_(block, streams)
            self.rounding.begin_(block)
            if self.prefix is not None:
                self.rounding.with_prefixes_(self.prefix.enter_(block))
        return block, transformed, _unread_events(block) + transformed.events

    def _leave(self) -> None:
        """Take off the block what was attached when it was opened."""
        self.transforms.release_block()
        if self.prefix is not None:
            self.prefix.leave_()

    def _solve(
        self, block: Block, run: BlockRun | None, report: BlockReport, events: list[Event]
    ) -> dict[str, QTensor]:
        """Solve and store all sites in execution order; those that the journal holds are stored only."""
        known = {} if self.journal is None else self.journal.known_sites(block, self.device)
        qtensors: dict[str, QTensor] = {}
        started, in_solver = time.perf_counter(), 0.0
        for solved in self.solver.solve_block(block, run, self._schemes(block), known):
            site, qtensor = solved.site, solved.solution.qtensor
            deployed = qtensor.dequantize(self.adapter.dtype)
            if not bool(deployed.isfinite().all()):
                raise NumericsError(f"the quantised weight of {site.name} must be finite, but holds NaN or Inf")
            site.store_(block.module, deployed)
            qtensors[site.name] = qtensor
            report.sites.append(solved.report)
            events += solved.solution.events
            if site.name not in known:
                in_solver += solved.report.seconds
                if self.journal is not None:
                    self.journal.keep_site(solved)
        self._add_seconds("solve", in_solver)
        self._add_seconds("moments", time.perf_counter() - started - in_solver)
        return qtensors

    def _schemes(self, block: Block) -> dict[str, QuantSpec]:
        schemes = {site.name: self.recipe.scheme(site.name, self.adapter.dtype) for site in block.sites}
        return {name: spec for name, spec in schemes.items() if spec is not None}

    def _rest(self, index: int, sites: dict[str, QTensor]) -> dict[str, Tensor]:
        """Return the tensors of the block that are not quantised."""
        replaced = {f"{name}.weight" for name in sites}
        tensors = self.adapter.block_tensors(index)
        return {name: tensor for name, tensor in tensors.items() if name not in replaced}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._add_seconds(what, time.perf_counter() - started)

    def _add_seconds(self, what: str, seconds: float) -> None:
        self.report.seconds[what] = self.report.seconds.get(what, 0.0) + seconds


def _unread_events(block: Block) -> list[Event]:
    return [
        Event(
            "unread",
            f"{block.name}.{path}",
            UNREAD,
            True,
        )
        for path in block.unread
    ]
