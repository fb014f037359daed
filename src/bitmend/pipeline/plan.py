"""Before a run: gather the facts of a forecast, compare it with what the machine has, decide where activations go.

A run whose activations do not fit into memory keeps them on disk, and says so. A run that does not fit either way is refused
before anything is computed, with what would make it fit.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from bitmend.calibrate.forward_cost import TIMED_TOKENS, measure_forward
from bitmend.calibrate.kept_results import planned_runs
from bitmend.compensation import CompensationShape
from bitmend.errors import RequestError
from bitmend.formats.writer import companions
from bitmend.linalg.solver_cost import ONE_SWEEP, SolverCost
from bitmend.numerics.products import bfloat16_is_slower
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.pipeline import machine
from bitmend.pipeline.block_rounding import SEARCH_ROWS, USUAL_RATIOS
from bitmend.pipeline.compensating import LOCAL, place_of
from bitmend.pipeline.ends import end_shapes
from bitmend.pipeline.forecast import (
    BatchShape,
    BlockShape,
    Compensation,
    Facts,
    Forecast,
    Learning,
    SiteShape,
    forecast,
)
from bitmend.pipeline.forecast_time import seconds_of
from bitmend.pipeline.per_site import BOTH_STREAMS, FULL_PRECISION_STREAM
from bitmend.pipeline.prefix import ROWS_LOOKED_AT
from bitmend.pipeline.rates import Rates, measure_rates
from bitmend.pipeline.recipe import SEARCH, Recipe
from bitmend.pipeline.transform_guard import GUARD_ROWS
from bitmend.protocols import Batch, LearningTransform, ModelAdapter
from bitmend.sites import Block

# The timed pass: no more multiply-adds than this, so that it ends within a second.
TIMED_MACS = 4e9
LEAST_TIMED = 64  # tokens: fewer tell how long the weights take to read, and not what a token takes
MOST_TIMED_ROWS = 8  # pictures
TRIED_TOKENS = 4  # to see which shape a block gives
TOKENS_PER_BATCH = 2048
# Of pictures: as many as make hidden states of this size, but no more than this number.
ENTRIES_PER_BATCH, MOST_ROWS_PER_BATCH = 2**22, 64
# Results of wide layers are kept where the whole run then takes no more than this share of the memory that is there.
AMPLE_SHARE = 0.25


@dataclass(frozen=True)
class Limits:
    """What the machine has left; None where it cannot be known, or does not matter.

    Attributes:
        memory: bytes that may still be allocated on the host.
        device: bytes that may still be allocated on the device.
        disk: free bytes where the output will lie.
    """

    memory: int | None
    device: int | None
    disk: int | None


@dataclass(frozen=True)
class Plan:
    """What a run will take, and where its activations will be.

    Attributes:
        facts: of the run, as it will be carried out.
        forecast: of it.
        limits: what was there.
        spilled: activations go to disk because memory would not hold them, not because it was asked for.
        in_memory_bytes: what a spilled run would take in memory.
        low_memory_bytes: what a run that keeps the results of wide layers would take without them; 0 where that is no less.
    """

    facts: Facts
    forecast: Forecast
    limits: Limits
    spilled: bool = False
    in_memory_bytes: int = 0
    low_memory_bytes: int = 0

    def line(self) -> str:
        """Return the forecast as one line, for the head of a run."""
        made = self.forecast
        parts = [f"memory {size(made.host_bytes)}{_of(self.limits.memory, 'available')}"]
        if self.facts.on_device:
            parts.append(f"device memory {size(made.device_bytes)}{_of(self.limits.device, 'free')}")
        parts.append(f"disk {size(made.partial_bytes)}{_of(self.limits.disk, 'free')}")
        parts.append(f"output {size(made.output_bytes)}")
        return f"forecast: {', '.join(parts)}, about {duration(made.seconds['total'])}"

    def spill_line(self) -> str:
        """Return what is said when activations go to disk by themselves."""
        return (
            f"activations are kept on disk: in memory the run would take {size(self.in_memory_bytes)}, and "
            f"{size(self.limits.memory or 0)} are available"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        made = self.forecast
        return {
            "host_bytes": made.host_bytes,
            "host_bytes_ahead": made.host_bytes_ahead,
            "device_bytes": made.device_bytes,
            "partial_bytes": made.partial_bytes,
            "output_bytes": made.output_bytes,
            "seconds": made.seconds,
            "activations": "disk" if self.facts.on_disk else "memory",
            "spilled": self.spilled,
            "wide_results_kept": self.facts.keep_wide,
            "available": asdict(self.limits),
            "stages": [asdict(stage) for stage in made.stages],
        }

    def record(self) -> dict[str, Any]:
        """Return what `run.json` keeps: the numbers without where they come from."""
        return {key: value for key, value in self.to_json().items() if key not in ("stages", "available")}


# ---------------------------------------------------------------------------------------------- facts
@dataclass(frozen=True)
class Baseline:
    """The memory of this process before a model was opened; None where the system does not tell.

    Attributes:
        anonymous: its own memory.
        largest: the largest resident size until then.
    """

    anonymous: int | None
    largest: int

    @classmethod
    def take(cls) -> "Baseline":
        """Return that of this moment."""
        return cls(machine.anonymous_bytes(), machine.peak_memory_bytes())

    def now(self) -> int:
        """Return what is held above the baseline."""
        now = machine.anonymous_bytes()
        return 0 if now is None or self.anonymous is None else max(0, now - self.anonymous)

    def most_since(self) -> int:
        """Return the most that was held above it; only what is held now where the largest size is an older one's."""
        largest, mapped = machine.peak_memory_bytes(), machine.mapped_bytes()
        if self.anonymous is None or mapped is None or largest <= self.largest:
            return self.now()
        return max(self.now(), largest - mapped - self.anonymous)


def gather_facts(
    adapter: ModelAdapter,
    recipe: Recipe,
    batches: Sequence[BatchShape],
    device: torch.device,
    *,
    baseline: "Baseline | None" = None,
    on_disk: bool = False,
) -> Facts:
    """Look at one block of each kind, and at what lies outside the blocks.

    Args:
        adapter: opened.
        recipe: what is to be done.
        batches: calibration rows; empty for data-free solvers.
        device: where blocks run.
        baseline: memory of this process before the model was opened; None: nothing is taken off and nothing added.
        on_disk: whether activations are to be kept on disk.

    Cost: reads one block of each kind, and five passes over a few tokens.
    """
    solver = recipe.build_solver()
    wanted = recipe.calibration
    needs = solver.needs | BOTH_STREAMS if wanted.two_streams else solver.needs
    opening = 0 if baseline is None else baseline.most_since()
    machine.return_free_memory()  # what drawing the rows has left behind
    outside = sum(tensor.nbytes for _, tensor in adapter.outside_tensors())
    blocks = tuple(_block_kinds(adapter, recipe, bool(batches)))
    held = 0 if baseline is None else max(0, baseline.now() - (outside if device.type == "cpu" else 0))
    return Facts(
        blocks=blocks,
        batches=tuple(batches),
        hidden=adapter.stream_width(),
        dtype_bytes=adapter.dtype.itemsize,
        outside_bytes=outside,
        ends=tuple((SiteShape(*shape, spec), loaded) for shape, spec, loaded in end_shapes(adapter, recipe)),
        companion_bytes=sum(path.stat().st_size for path in companions(adapter.folder)),
        cost=cost_of(solver),
        moments=len(needs & BOTH_STREAMS) if batches else 0,
        refit=wanted.refit,
        keep_inputs=wanted.two_streams or bool(solver.needs & FULL_PRECISION_STREAM),
        on_disk=on_disk,
        judged=len(recipe.transforms),
        rows_before=_rows_before(recipe, batches, len(blocks[0].groups)) if batches else 0,
        on_device=device.type != "cpu",
        widened=device.type == "cpu" and adapter.dtype == torch.bfloat16 and bfloat16_is_slower(),
        learning=_learning(adapter, recipe, batches),
        compensation=_compensation(recipe) if batches else None,
        held_bytes=held,
        opening_bytes=opening,
    )


def _learning(adapter: ModelAdapter, recipe: Recipe, batches: Sequence[BatchShape]) -> Learning | None:
    rows = sum(part.num_passes for part in recipe.build_transforms() if isinstance(part, LearningTransform))
    if not rows or not batches:
        return None
    if adapter.embedding_name is None:
        raise RequestError("a transform that learns on the whole network needs a language model; leave it out")
    vocabulary = adapter.model.get_submodule(adapter.embedding_name).get_parameter("weight").shape[0]
    return Learning(rows, max(batch.length for batch in batches), vocabulary)


def _compensation(recipe: Recipe) -> Compensation | None:
    part = recipe.build_compensator()
    return None if part is None else Compensation(len(part.targets), LOCAL in part.targets, part.folds, part.num_solved)


def _beside(adapter: ModelAdapter, recipe: Recipe, block: Block) -> tuple[CompensationShape | None, float]:
    """Return the largest map that may come to stand beside a block, and rows of its regression for one place."""
    compensator = recipe.build_compensator()
    if compensator is None:
        return None, 1.0
    hidden, inputs = adapter.sample_inputs(block.index, 1, adapter.row_length or TRIED_TOKENS)
    made = adapter.run_block(block.index, hidden, inputs)
    place = place_of(block, hidden.shape[1:], made.shape[1:], adapter.reads)
    if place is None:
        return None, 1.0
    return compensator.largest(place), made.numel() / place.outputs / (adapter.row_length or TRIED_TOKENS)


def _rows_before(recipe: Recipe, batches: Sequence[BatchShape], groups: int) -> int:
    """Return how many rows pass each block before it is solved.

    Transforms read the fit split once each, and the guard runs a few rows thrice for each; static ranges read the fit split;
    a search runs a few rows for each ratio of each quantiser; a prefix is chosen from a pass through the whole network.
    """
    fit = sum(batch.rows for batch in batches if not batch.held_out)
    held_out = sum(batch.rows for batch in batches if batch.held_out)
    transforms = recipe.build_transforms()
    rows = fit * sum(transform.needs_rows for transform in transforms) + 3 * min(GUARD_ROWS, held_out) * len(transforms)
    for section, quantisers in ((recipe.activations, groups), (recipe.kv_cache, 2)):
        if section is not None:
            rows += fit if section.static else 0
            rows += quantisers * USUAL_RATIOS * _taken(batches, SEARCH_ROWS) if section.clip_ratio == SEARCH else 0
    if recipe.prefix is not None and recipe.prefix.tokens is None:
        rows += _taken(batches, ROWS_LOOKED_AT)
    return rows


def _taken(batches: Sequence[BatchShape], most: int) -> int:
    """Return how many rows of the fit split are in the whole batches that hold `most`."""
    rows = 0
    for batch in batches:
        rows += batch.rows if not batch.held_out and rows < most else 0
    return rows


def cost_of(solver: Any) -> SolverCost:
    """Return what a solver says of its cost; one sweep as by GPTQ of one that asks for moments and says nothing."""
    say = getattr(solver, "cost", None)
    if callable(say):
        said: SolverCost = say()
        return said
    return ONE_SWEEP if solver.needs else SolverCost()


def _block_kinds(adapter: ModelAdapter, recipe: Recipe, with_rows: bool) -> list[BlockShape]:
    """Return the kinds of blocks; blocks whose tensors have the same shapes are of one kind."""
    kinds: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
    for index, name in enumerate(adapter.block_names):
        places = adapter.model.get_submodule(name).state_dict()
        kinds.setdefault(tuple((key, tuple(place.shape)) for key, place in places.items()), []).append(index)
    return [_block_shape(adapter, recipe, indices, with_rows) for indices in kinds.values()]


def _block_shape(adapter: ModelAdapter, recipe: Recipe, indices: Sequence[int], with_rows: bool) -> BlockShape:
    index = indices[0]
    adapter.load_block(index)
    try:
        block = adapter.describe_block(index, adapter.few_rows())
        groups = tuple(
            tuple(
                SiteShape(
                    *site.shape,
                    recipe.scheme(site.name, adapter.dtype),
                    group.rows_per_place,
                    group.entries_per_place,
                )
                for site in group.sites
            )
            for group in block.groups
        )
        tensors = adapter.block_tensors(index)
        quantised = {f"{site.name}.weight" for site in block.sites if recipe.scheme(site.name, adapter.dtype)}
        macs = sum(site.products for group in groups for site in group)
        beside, rows = _beside(adapter, recipe, block) if with_rows else (None, 1.0)
        return BlockShape(
            count=len(indices),
            groups=groups,
            weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            site_bytes=sum(tensor.nbytes for name, tensor in tensors.items() if name in quantised),
            forward=measure_forward(adapter, index, _timed_places(adapter, macs)) if with_rows else None,
            runs=planned_runs(block) if with_rows and block.groups else (),
            wide_runs=planned_runs(block, wide=True) if with_rows and block.groups else (),
            beside=beside,
            beside_rows=rows,
        )
    finally:
        adapter.release_block(index)


def _timed_places(adapter: ModelAdapter, macs: float) -> int:
    """Return how many tokens, or pictures, a pass is timed with."""
    if adapter.row_length is not None:
        return int(max(1, min(MOST_TIMED_ROWS, TIMED_MACS // max(1, macs)))) * adapter.row_length
    context = getattr(adapter.model.config, "max_position_embeddings", None) or TIMED_TOKENS
    return int(max(1, min(TIMED_TOKENS, context, max(LEAST_TIMED, TIMED_MACS // max(1, macs)))))


def batch_shapes(batches: Sequence[tuple[Batch, bool]]) -> list[BatchShape]:
    """Return the shapes of batches that have been drawn."""
    return [
        BatchShape(rows.num_rows, rows.num_places // max(1, rows.num_rows), held_out, rows.mask is not None)
        for rows, held_out in batches
    ]


def rows_per_batch(adapter: ModelAdapter, length: int) -> int:
    """Return how many rows of `length` places run at once."""
    if adapter.row_length is None:
        return max(1, TOKENS_PER_BATCH // length)
    return max(1, min(MOST_ROWS_PER_BATCH, ENTRIES_PER_BATCH // adapter.stream_width()))


def asked_batches(sequences: int, length: int, held_out: float, size_of_batch: int | None = None) -> list[BatchShape]:
    """Return the shapes of rows that have not been drawn: as many full ones as the recipe asks for.

    `size_of_batch` None stands for as many rows of tokens as run at once.
    """
    size_of_batch = size_of_batch or max(1, TOKENS_PER_BATCH // length)
    kept = min(max(1, round(held_out * sequences)), sequences - 1) if held_out and sequences > 1 else 0
    found = []
    for count, is_held_out in ((sequences - kept, False), (kept, True)):
        found += [
            BatchShape(min(size_of_batch, count - start), length, is_held_out)
            for start in range(0, count, size_of_batch)
        ]
    return found


def rates_for(facts: Facts, device: torch.device) -> Rates:
    """Return the rates of this machine for the widest site; measured once a process for each width and grid."""
    sites = [(site.width, site.spec) for block in facts.blocks for site in block.sites if site.spec is not None]
    width, spec = max(sites, key=lambda one: one[0], default=(64, QuantSpec(UniformGrid(4, symmetric=True))))
    return _measured(width, spec, device, torch.get_num_threads())


@lru_cache(maxsize=16)
def _measured(width: int, spec: QuantSpec, device: torch.device, threads: int) -> Rates:
    del threads  # another number of threads is another machine
    return measure_rates(width, spec, device)


# ---------------------------------------------------------------------------------------------- does it fit?
def limits_at(output: Path, device: torch.device) -> Limits:
    """Return what this machine has left."""
    return Limits(machine.available_memory(), machine.available_device_memory(device), machine.free_disk(output))


def settle(facts: Facts, limits: Limits, output: Path, *, low_memory: bool = False) -> Plan:
    """Decide where activations go, and whether there is memory to spare for products that need not be taken twice.

    Args:
        facts: of the run, as it was asked for.
        limits: what there is.
        output: named where it does not fit.
        low_memory: whether such products are taken twice even where there is memory to spare.

    Raises:
        RequestError: the run fits neither way; the sentence says what would make it fit.
    """
    facts = replace(facts, keep_wide=not low_memory and _ample(replace(facts, keep_wide=True), limits))
    made = forecast(facts)
    if lacks(facts, made, limits) is None:
        without = forecast(replace(facts, keep_wide=False)).host_bytes
        return Plan(facts, made, limits, low_memory_bytes=without if without < made.host_bytes else 0)
    spilled = replace(facts, on_disk=True)
    on_disk = forecast(spilled)
    if lacks(facts, made, limits) == "memory" and facts.batches and lacks(spilled, on_disk, limits) is None:
        return Plan(spilled, on_disk, limits, spilled=True, in_memory_bytes=made.host_bytes_ahead)
    raise RequestError(_refusal(facts, made, limits, output))


def _ample(facts: Facts, limits: Limits) -> bool:
    """Return whether a run takes a small share of the host's memory; not where products are taken on a device."""
    if limits.memory is None or not facts.batches or facts.on_disk or facts.on_device:
        return False
    return forecast(facts).host_bytes_ahead <= AMPLE_SHARE * limits.memory


def lacks(facts: Facts, made: Forecast, limits: Limits) -> str | None:
    """Return which of memory, device memory and disk a run would not find, or None when it fits."""
    # What has been loaded already is no longer available, and no longer needed.
    there = facts.held_bytes + (0 if facts.on_device else facts.outside_bytes)
    if limits.memory is not None and made.host_bytes_ahead - there > limits.memory:
        return "memory"
    if limits.device is not None and made.device_bytes - facts.outside_bytes > limits.device:
        return "device memory"
    if limits.disk is not None and made.partial_bytes > limits.disk:
        return "disk"
    return None


def _refusal(facts: Facts, made: Forecast, limits: Limits, output: Path) -> str:
    missing = lacks(facts, made, limits)
    needed, there = {
        "memory": (made.host_bytes_ahead, limits.memory),
        "device memory": (made.device_bytes, limits.device),
        "disk": (made.partial_bytes, limits.disk),
    }[missing or "memory"]
    where = f" at {output.parent}" if missing == "disk" else ""
    ways = list(_ways(facts, limits)) or [f"use a machine with more {missing}"]
    found = f"the run would take {size(needed)} of {missing}{where}, but {size(there or 0)} are available"
    return f"{found}; {', or '.join(ways)}"


def _ways(facts: Facts, limits: Limits) -> list[str]:
    """Return what would make the run fit, each tried in a forecast."""
    ways = []
    missing = lacks(facts, forecast(facts), limits)

    def fits(changed: Facts) -> bool:
        return lacks(changed, forecast(changed), limits) is None

    if facts.on_disk and fits(replace(facts, on_disk=False)):
        ways.append("leave out --activations-on-disk")
    if not facts.on_disk and fits(replace(facts, on_disk=True)):
        ways.append("pass --activations-on-disk")
    for on_disk in (facts.on_disk, True) if not facts.on_disk else (True,):
        sequences = _most_sequences(replace(facts, on_disk=on_disk), limits)
        if sequences:
            ways.append(
                f"pass --sequences {sequences}{' --activations-on-disk' if on_disk and not facts.on_disk else ''}"
            )
            break
    if facts.on_device and fits(replace(facts, on_device=False)):
        ways.append("pass --device cpu")
    if missing == "disk":
        ways.append("free some space or choose an --output on another disk")
    return ways


def _most_sequences(facts: Facts, limits: Limits) -> int:
    """Return the largest number of rows with which the run fits, by halving the interval; 0 when not even two would do."""
    rows = sum(batch.rows for batch in facts.batches)
    if rows < 3:
        return 0
    length, together = max(batch.length for batch in facts.batches), max(batch.rows for batch in facts.batches)
    share = sum(batch.rows for batch in facts.batches if batch.held_out) / rows

    def fits(count: int) -> bool:
        fewer = replace(facts, batches=tuple(asked_batches(count, length, share, together)))
        return lacks(fewer, forecast(fewer), limits) is None

    low, high = 2, rows  # at least one row to fit on and one to judge on
    if not fits(low):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def timed(plan: Plan, rates: Rates, *, finished_blocks: int = 0, before: float = 0.0) -> Plan:
    """Return the plan with the seconds of each phase."""
    seconds = seconds_of(plan.facts, rates, finished_blocks=finished_blocks, before=before)
    return replace(plan, forecast=plan.forecast.with_seconds(seconds))


# ---------------------------------------------------------------------------------------------- in words
def size(count: int | float) -> str:
    """Return bytes in words: 3 digits, MB below a gigabyte."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def duration(seconds: int | float) -> str:
    """Return a time in words: no more digits than a forecast has."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _of(there: int | None, word: str) -> str:
    return "" if there is None else f" ({size(there)} {word})"
