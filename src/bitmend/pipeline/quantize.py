"""The loop: one block after the other, both streams side by side, each result stored before the next is asked for."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitmend.calibrate.dual_stream import BlockRun, DualStream
from bitmend.errors import NumericsError
from bitmend.numerics.qtensor import QTensor, QuantSpec
from bitmend.pipeline.per_site import BOTH_STREAMS, PerSite
from bitmend.pipeline.recipe import Recipe
from bitmend.protocols import BlockReport, Event, ModelAdapter, Progress, RunReport, TokenBatch
from bitmend.sites import Block

TRACE_TOKENS = 8


@dataclass(frozen=True)
class QuantisedBlock:
    """One finished block, ready to be written.

    Attributes:
        name: full path in the model.
        sites: the quantised matrices by full module name.
        kinds: how each of them was held in the model, a key of `sites.LAYER_VIEWS`.
        rest: all other tensors of the block by full tensor name.
    """

    name: str
    sites: dict[str, QTensor]
    kinds: dict[str, str]
    rest: dict[str, Tensor]


def quantise_blocks(
    adapter: ModelAdapter,
    recipe: Recipe,
    batches: Sequence[tuple[TokenBatch, bool]],
    report: RunReport,
    progress: Progress,
    *,
    device: torch.device,
    directory: Path | None = None,
) -> Iterator[QuantisedBlock]:
    """Quantise a model block by block and yield each finished block.

    Args:
        adapter: the opened model; its blocks are read one at a time.
        recipe: what to do.
        batches: calibration rows and whether they are held out; empty for data-free solvers.
        report: filled as the run goes on.
        progress: shown block by block.
        device: where blocks run.
        directory: where activations are kept; None keeps them in memory.

    Raises:
        NumericsError: NaN or Inf in a weight, in a layer's input or in a block's output.
        FactorizationError: moments that stay indefinite.
        RecipeError: a grid that does not fit a site.

    Cost: per block one full-precision forward, one partial quantised forward for each group of sites, one quantised
    forward, and the solver.
    """
    loop = _Loop(adapter, recipe, report)
    streams = None
    if batches:
        with loop.timed("embed"):
            streams = DualStream(adapter, batches, directory=directory, device=device)
    try:
        names = adapter.block_names
        for index in progress.track(range(len(names)), "quantising blocks", len(names)):
            yield loop.run_block(index, streams)
            adapter.release_block(index)
    finally:
        if streams is not None:
            streams.close()


class _Loop:
    def __init__(self, adapter: ModelAdapter, recipe: Recipe, report: RunReport) -> None:
        solver = recipe.build_solver()
        self.adapter = adapter
        self.recipe = recipe
        self.report = report
        self.transforms = recipe.build_transforms()
        wanted = recipe.calibration
        self.solver = PerSite(solver, recipe.solver["name"], wanted.refit, wanted.two_streams)
        self.keep_inputs = wanted.two_streams or bool(solver.needs & BOTH_STREAMS)

    def run_block(self, index: int, streams: DualStream | None) -> QuantisedBlock:
        started = time.perf_counter()
        with self.timed("load"):
            self.adapter.load_block(index)
            block = self.adapter.describe_block(index, trace_batch())
        report = BlockReport(block.name)
        self.report.blocks.append(report)
        self.report.events += _unread_events(block)
        for transform in self.transforms:
            self.report.events += transform.apply_(block, streams)
        with self.timed("forward"):
            run = None if streams is None else BlockRun(streams, block, keep_inputs=self.keep_inputs)
        sites = self._solve(block, run, report)
        if streams is not None and run is not None:
            with self.timed("forward"):
                y_q = run.run_quantised()
                report.relative_error = streams.relative_error(run.y_fp, y_q)
            if not math.isfinite(report.relative_error):
                raise NumericsError(
                    f"the output of {block.name} must be finite, but holds NaN or Inf; nothing was saved"
                )
            run.close()
            streams.advance(run.y_fp, y_q)
        report.seconds = time.perf_counter() - started
        kinds = {site.name: site.kind for site in block.sites if site.name in sites}
        return QuantisedBlock(block.name, sites, kinds, self._rest(index, sites))

    def _solve(self, block: Block, run: BlockRun | None, report: BlockReport) -> dict[str, QTensor]:
        """Solve and store all sites in execution order."""
        solved: dict[str, QTensor] = {}
        started = time.perf_counter()
        for site, solution, site_report in self.solver.solve_block(block, run, self._schemes(block)):
            deployed = solution.qtensor.dequantize(self.adapter.dtype)
            if not bool(deployed.isfinite().all()):
                raise NumericsError(f"the quantised weight of {site.name} must be finite, but holds NaN or Inf")
            site.store_(block.module, deployed)
            solved[site.name] = solution.qtensor
            report.sites.append(site_report)
            self.report.events += solution.events
        in_solver = sum((site.seconds for site in report.sites), 0.0)
        self._add_seconds("solve", in_solver)
        self._add_seconds("moments", time.perf_counter() - started - in_solver)
        return solved

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


def trace_batch() -> TokenBatch:
    """Return a few tokens that every vocabulary has; only the order of layers is read from them."""
    return TokenBatch(torch.arange(TRACE_TOKENS).unsqueeze(0) % 2)


def _unread_events(block: Block) -> list[Event]:
    return [
        Event(
            "unread",
            f"{block.name}.{path}",
            "the layer never ran, so nothing is known of its input; not quantised",
            True,
        )
        for path in block.unread
    ]
