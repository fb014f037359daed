"""How much memory and disk a run will take, counted from the shapes before it starts.

A pure function of facts. A run is a row of stages; at each of them certain tensors live at the same time, and the peak is the
largest sum. Each term below says where it comes from. Symbols: T tokens of all rows (padding counted), H width of the
hidden states, e bytes of one of their entries, (O, I) shape of a site, n how many of the moments G, C, D are wanted.

Three terms are measured and not counted: the work space of a block's forward (`calibrate/forward_cost.py`), what the process
held when the forecast was made (imports that come late, the tokenizer), and what the allocator keeps (`KEPT_ALWAYS`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from bitmend.calibrate.forward_cost import ForwardCost
from bitmend.calibrate.kept_results import PlannedRun
from bitmend.compensation import CompensationShape
from bitmend.linalg.moments import CHUNK_TOKENS, QUADRATIC_PANEL
from bitmend.linalg.solver_cost import SolverCost
from bitmend.numerics.observers import CHUNK_ENTRIES
from bitmend.numerics.products import WIDENED_ROWS
from bitmend.numerics.qtensor import QuantSpec
from bitmend.pipeline.transform_guard import GUARD_ROWS
from bitmend.runtime.packed import packed_shapes

DOUBLE, SINGLE = 8, 4
# Freed memory that glibc keeps for later, because its pieces are below the 32 MB from which it always gives them back.
# Measured, not counted (docs/results/2026-11-20_cpu-2_forecast.md): some that is always there, copies of the largest weight
# in float32, and copies of a forward's work space.
KEPT_ALWAYS, KEPT_WEIGHTS, KEPT_FORWARDS = 24 * 2**20, 3, 2
LARGEST_KEPT = 32 * 2**20
# Scale search (`numerics/observers.py`): about eight float32 arrays of a chunk at once.
SEARCH_ARRAYS = 8
# float64 squares that a factorisation holds beside its result (`linalg/cholesky.py`), where it is torch that factors.
FACTOR_SQUARES = 1
# Matrices of the size of the weight in the proof: two Q, their Q - W, one product with a panel of G, and that times Q - W;
# W C with two streams.
# In float64 where errors are so small that float32 would blur them: not below this width of a code.
PROOF_MATRICES, PROOF_IN_DOUBLE = 6, 6
# float32 copies in a sweep: the stacked target, its columns, their errors, their levels.
SWEEP_MATRICES = 4
# `least_squares._solve` and `RegressionMoments.error`: squares and matrices of float64 beside the moments.
MAP_SQUARES, MAP_MATRICES = 4, 5
OPENING = "opening"
# While rotations are learned: tensors of a row as wide as what groups of layers read, as what layers give, and as its logits.
# Set so that they covered peaks seen on two llamas; no benchmark of this repository measures them yet.
LEARNT_WIDTHS, LEARNT_OUTS, LEARNT_LOGITS = 10, 3, 8
# run.json and the manifest, per site; marr lists its steps.
SITE_REPORT_BYTES = 2048


@dataclass(frozen=True)
class SiteShape:
    """One matrix of a block.

    Attributes:
        out: rows.
        width: columns.
        spec: its grid; None when it is skipped.
        rows: of its product for one place: 1 for a token, as many as a layer makes of it for a picture.
        read: entries of its input for one place; None: a row's width for each row.
    """

    out: int
    width: int
    spec: QuantSpec | None
    rows: float = 1.0
    read: float | None = None

    @property
    def entries(self) -> int:
        """How many weights."""
        return self.out * self.width

    @property
    def products(self) -> float:
        """Multiply-adds for one place."""
        return self.rows * self.entries

    @property
    def read_entries(self) -> float:
        """Entries of its input for one place."""
        return self.rows * self.width if self.read is None else self.read

    @property
    def packed_bytes(self) -> int:
        """Bytes in the file; 0 when it is skipped, because it then counts among the rest of its block."""
        if self.spec is None:
            return 0
        shapes = packed_shapes((self.out, self.width), self.spec).values()
        return sum(dtype.itemsize * rows * columns for dtype, (rows, columns) in shapes)


@dataclass(frozen=True)
class BlockShape:
    """One kind of block.

    Attributes:
        count: how many blocks are of this kind.
        groups: sites that share an input, in execution order.
        weight_bytes: of all its tensors, loaded.
        site_bytes: of those that are quantised, loaded.
        forward: what one pass takes; None without calibration rows.
        runs: in the quantised network, before each group and the last one; empty where nothing is kept from run to run.
        wide_runs: the same where results of wide layers are kept, too.
        beside: the largest map that may come to stand beside it; None: none.
        beside_rows: rows of its regression for one place.
    """

    count: int
    groups: tuple[tuple[SiteShape, ...], ...]
    weight_bytes: int
    site_bytes: int
    forward: ForwardCost | None = None
    runs: tuple[PlannedRun, ...] = ()
    wide_runs: tuple[PlannedRun, ...] = ()
    beside: CompensationShape | None = None
    beside_rows: float = 1.0

    @property
    def sites(self) -> tuple[SiteShape, ...]:
        """All sites that are quantised."""
        return tuple(site for group in self.groups for site in group if site.spec is not None)

    @property
    def written_bytes(self) -> int:
        """Bytes of the finished block in the file."""
        beside = 0 if self.beside is None else self.beside.num_bytes()
        return sum(site.packed_bytes for site in self.sites) + self.weight_bytes - self.site_bytes + beside


@dataclass(frozen=True)
class BatchShape:
    """One batch of calibration rows; padding counts as tokens."""

    rows: int
    length: int
    held_out: bool = False
    masked: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens run."""
        return self.rows * self.length


@dataclass(frozen=True)
class Learning:
    """What transforms learn on the whole network (`pipeline/learning.py`).

    Attributes:
        rows: that pass it with gradients, all steps together; of all transforms.
        length: tokens of the longest row.
        vocabulary: logits of a token.
    """

    rows: int
    length: int
    vocabulary: int


@dataclass(frozen=True)
class Compensation:
    """What puts maps beside blocks (`pipeline/compensating.py`).

    Attributes:
        targets: what is measured as lacking, each with sums of its own.
        local: the full-precision block runs on the quantised network's states, too, and what it gives is kept.
        folds: of the fit rows.
        solved: maps that are solved for on each fold.
    """

    targets: int
    local: bool
    folds: int
    solved: int


@dataclass(frozen=True)
class Facts:
    """All that the forecast depends on.

    Attributes:
        blocks: kinds of blocks.
        batches: calibration rows; empty for data-free solvers.
        hidden: width of the hidden states.
        dtype_bytes: of one of their entries.
        outside_bytes: tensors outside the blocks, loaded.
        ends: embedding and head where they are quantised: (out, width) and grid, and bytes as loaded.
        companion_bytes: tokenizer and other files that are copied.
        cost: of the solver.
        moments: n.
        refit: fit again on all rows.
        keep_inputs: the inputs of all groups in the full-precision network are stored.
        on_disk: activations are kept on disk.
        on_device: blocks run on a device with memory of its own.
        keep_wide: results of wide layers are kept from run to run.
        judged: how many transforms the guard judges at each block.
        rows_before: how many rows pass each block before it is solved, for transforms, ranges and the choice of a prefix.
        widened: products of the layers are taken in float32 (`numerics/products.py`).
        learning: what transforms learn before the first block; None: nothing.
        compensation: what puts maps beside blocks; None: nothing.
        held_bytes: what the process held above its baseline when the forecast was made, tensors outside the blocks apart.
        opening_bytes: the most that it had held above its baseline until then: a tokenizer at work on the calibration texts
            may take more than all that follows. 0 where it is not known.
    """

    blocks: tuple[BlockShape, ...]
    batches: tuple[BatchShape, ...]
    hidden: int
    dtype_bytes: int
    outside_bytes: int
    ends: tuple[tuple[SiteShape, int], ...]
    companion_bytes: int
    cost: SolverCost
    moments: int
    refit: bool
    keep_inputs: bool
    on_disk: bool = False
    on_device: bool = False
    keep_wide: bool = False
    judged: int = 0
    rows_before: int = 0
    widened: bool = False
    learning: Learning | None = None
    compensation: Compensation | None = None
    held_bytes: int = 0
    opening_bytes: int = 0

    @property
    def tokens(self) -> int:
        """T."""
        return sum(batch.tokens for batch in self.batches)

    @property
    def has_held_out(self) -> bool:
        """Whether some rows are held out."""
        return any(batch.held_out for batch in self.batches)

    @property
    def refits(self) -> bool:
        """Whether moments of all rows are made beside those of the two splits."""
        return self.refit and self.has_held_out

    @property
    def num_blocks(self) -> int:
        """How many blocks."""
        return sum(block.count for block in self.blocks)

    def runs_in_full_precision(self, batch: BatchShape) -> bool:
        """Whether a batch travels through the full-precision network."""
        return self.keep_inputs or self.compensation is not None or batch.held_out or not self.has_held_out

    def runs_of(self, block: BlockShape) -> tuple[PlannedRun, ...]:
        """Return a block's runs in the quantised network."""
        return block.wide_runs if self.keep_wide else block.runs

    @property
    def full_precision_share(self) -> float:
        """The share of all tokens that travel through the full-precision network."""
        run = sum(batch.tokens for batch in self.batches if self.runs_in_full_precision(batch))
        return run / max(1, self.tokens)

    @property
    def stream_bytes(self) -> int:
        """One stream of hidden states: T H e."""
        return self.tokens * self.hidden * self.dtype_bytes


@dataclass
class Stage:
    """What lives at one moment: bytes by what they are."""

    name: str
    host: dict[str, float] = field(default_factory=dict)
    device: dict[str, float] = field(default_factory=dict)
    disk: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        host_bytes: largest anonymous memory above the baseline of the process.
        device_bytes: largest memory on the device; 0 on a CPU.
        partial_bytes: largest size of the partial folder.
        output_bytes: of the finished folder.
        stages: where these numbers come from.
        seconds: by phase, `total` among them; empty where no rates were measured.
    """

    host_bytes: int
    device_bytes: int
    partial_bytes: int
    output_bytes: int
    stages: tuple[Stage, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def largest(self) -> Stage:
        """The stage with the largest host memory."""
        return max(self.stages, key=lambda stage: sum(stage.host.values()))

    @property
    def host_bytes_ahead(self) -> int:
        """The largest host memory of what is still to come when the forecast is made."""
        return int(max(sum(stage.host.values()) for stage in self.stages if stage.name != OPENING))

    def with_seconds(self, seconds: dict[str, float]) -> "Forecast":
        """Return the forecast with times."""
        return replace(self, seconds=seconds)


def forecast(facts: Facts) -> Forecast:
    """Count the stages of a run and return the largest sums."""
    stages = tuple(_stages(facts))
    return Forecast(
        host_bytes=int(max(sum(stage.host.values()) for stage in stages)),
        device_bytes=int(max(sum(stage.device.values()) for stage in stages)) if facts.on_device else 0,
        partial_bytes=int(max(sum(stage.disk.values()) for stage in stages)),
        output_bytes=int(_output_bytes(facts)),
        stages=stages,
    )


def _stages(facts: Facts) -> Iterator[Stage]:
    yield Stage(OPENING, {"opening the model, drawing calibration rows": float(facts.opening_bytes)})
    if facts.learning is not None:
        yield _learning(facts, facts.learning)
    written = float(sum(block.count * block.written_bytes for block in facts.blocks))
    for block in facts.blocks:
        if facts.judged and facts.has_held_out:
            yield _judging(facts, block)
        if facts.batches:
            yield _full_precision_pass(facts, block)
            for position in range(len(block.groups)):
                yield from _group(facts, block, position)
            yield _quantised_pass(facts, block, written)
            if facts.compensation is not None and block.beside is not None:
                yield _compensating(facts, block, facts.compensation, block.beside)
        elif block.groups:  # a norm alone may be a block of a model of pictures
            yield from _group(facts, block, len(block.groups) - 1)
        yield _writing_block(facts, block, written)
    yield _ending(facts, written)


def _stage(facts: Facts, name: str, on_device: dict[str, float], on_host: dict[str, float]) -> Stage:
    """Return a stage with what always lives."""
    always_host = {
        "held by the process": float(facts.held_bytes),
        "kept by the allocator": _kept_by_allocator(facts),
        # Token numbers: the rows and the batches made of them, 64 bits each.
        "token numbers": 16.0 * facts.tokens,
    }
    always_device = {"outside the blocks": float(facts.outside_bytes), "block arguments": _argument_bytes(facts)}
    if facts.on_device:
        return Stage(name, always_host | on_host, always_device | on_device)
    return Stage(name, always_host | always_device | on_device | on_host)


def _kept_by_allocator(facts: Facts) -> float:
    weight = max((SINGLE * site.entries for block in facts.blocks for site in block.sites), default=0)
    work = max((_work_bytes(facts, block) for block in facts.blocks), default=0.0)
    return KEPT_ALWAYS + KEPT_WEIGHTS * min(weight, LARGEST_KEPT) + KEPT_FORWARDS * min(work, 2 * LARGEST_KEPT)


def _argument_bytes(facts: Facts) -> float:
    """Rotary tables and masks: kept once for each shape of full rows, and for each batch of padded ones."""
    distinct = {(batch.rows, batch.length) for batch in facts.batches if not batch.masked}
    shapes = [*distinct, *((batch.rows, batch.length) for batch in facts.batches if batch.masked)]
    forward = next((block.forward for block in facts.blocks if block.forward is not None), None)
    return 0.0 if forward is None else float(sum(forward.arguments.at(*shape) for shape in shapes))


def _work_bytes(facts: Facts, block: BlockShape) -> float:
    if block.forward is None or not facts.batches:
        return 0.0
    work = max(block.forward.work_bytes(batch.rows, batch.length) for batch in facts.batches)
    return work + (_widened_bytes(facts, block) if facts.widened else 0)


def _widened_bytes(facts: Facts, block: BlockShape) -> int:
    """Weight, inputs and outputs of one product in float32."""
    places = max(batch.tokens for batch in facts.batches)
    sites = [site for group in block.groups for site in group]
    return max(
        (
            int(SINGLE * (site.entries + min(WIDENED_ROWS, places * site.rows) * (site.width + site.out)))
            for site in sites
        ),
        default=0,
    )


# ---------------------------------------------------------------------------------------------- what is stored of streams
def _stores(facts: Facts, block: BlockShape, *, inputs: bool, before: int | None = None) -> dict[str, float]:
    """Activations at one stage: both streams, the output that is to take a batch's place, group inputs, kept results."""
    streams = {"x_fp, x_q": (1 + facts.full_precision_share) * facts.stream_bytes}
    streams["output of a batch"] = float(
        max((b.tokens for b in facts.batches), default=0) * facts.hidden * facts.dtype_bytes
    )
    if inputs and facts.keep_inputs:
        widths = sum(group[0].read_entries for group in block.groups)
        streams["group inputs"] = float(facts.tokens * widths * facts.dtype_bytes)
    runs = facts.runs_of(block)
    if before is not None and block.forward is not None and runs:
        run = runs[before]
        each = run.kept * facts.dtype_bytes + run.attention * block.forward.attention_bytes
        streams["kept results"] = float(facts.tokens * each)
    return streams


def _placed(facts: Facts, stage: Stage, stores: dict[str, float]) -> Stage:
    if facts.batches:
        (stage.disk if facts.on_disk else stage.host).update(stores)
    return stage


# ---------------------------------------------------------------------------------------------- the stages of one block
def _full_precision_pass(facts: Facts, block: BlockShape) -> Stage:
    """`BlockRun.__init__`: the group inputs grow while the block runs batch by batch."""
    on_device = {"block weights": float(block.weight_bytes), "forward of a batch": _work_bytes(facts, block)}
    stage = _stage(facts, "full-precision forward", on_device, {})
    return _placed(facts, stage, _stores(facts, block, inputs=True))


def _judging(facts: Facts, block: BlockShape) -> Stage:
    """`Transforms.apply_` under the guard: the block as it was, its weights while they are rounded, a few rows thrice."""
    site = max(block.sites, key=lambda one: one.entries)
    rows = GUARD_ROWS * max(batch.length for batch in facts.batches if batch.held_out)
    on_device = {
        "block weights": 3.0 * block.weight_bytes,
        "forward of a batch": _work_bytes(facts, block),
        "rows of the guard": 3.0 * rows * facts.hidden * facts.dtype_bytes,
        "rounding a site": float(3 * SINGLE * site.entries),
    }
    return _placed(facts, _stage(facts, "judging a transform", on_device, {}), _stores(facts, block, inputs=False))


def _learning(facts: Facts, learning: Learning) -> Stage:
    """`pipeline/learning.py`: all weights in float32, what a row leaves before each block, and the gradient of one block."""
    weights = sum(block.count * block.weight_bytes for block in facts.blocks) + facts.outside_bytes
    widths = max(sum(group[0].width for group in block.groups) for block in facts.blocks)
    outs = max(sum(site.out for group in block.groups for site in group) for block in facts.blocks)
    largest = max(max(site.entries for group in block.groups for site in group) for block in facts.blocks)
    on_device = {
        "network in float32": SINGLE / facts.dtype_bytes * weights,
        "a row before each block": float(SINGLE * (facts.num_blocks + 1) * learning.length * facts.hidden),
        "gradient of a block": float(SINGLE * learning.length * (LEARNT_WIDTHS * widths + LEARNT_OUTS * outs)),
        "logits of a row": float(SINGLE * LEARNT_LOGITS * learning.length * learning.vocabulary),
        "weights turned for the gradient": float(2 * SINGLE * max(largest, facts.hidden * learning.vocabulary)),
    }
    return _stage(facts, "learning rotations", on_device, {})


def _group(facts: Facts, block: BlockShape, position: int) -> Iterator[Stage]:
    """The moments of one group, then its sites one by one."""
    group = block.groups[position]
    # Without rows nothing is shared by a group, and one stage stands for all; with rows, one that is skipped takes nothing.
    sites = [site for site in (group if facts.batches else block.sites) if site.spec is not None]
    if not sites:
        return
    earlier = float(sum(site.entries for each in block.groups[:position] for site in each if site.spec is not None))
    shared = {"block weights": float(block.weight_bytes), "codes of solved sites": earlier}
    stores = _stores(facts, block, inputs=True, before=position) if facts.batches else {}
    square = float(DOUBLE * group[0].width ** 2)
    if facts.batches and facts.moments:
        work = {"forward of a batch": _work_bytes(facts, block), **_summing(facts, group[0])}
        yield _placed(facts, _stage(facts, "moments of a group", shared | work, {}), stores)
        # Of the fit rows and of the held-out rows (there, if empty); their merged ones take the place of both.
        shared = shared | {"moments": 2 * facts.moments * square}
        solving = {"factorisation": (_squares(facts, sites) + FACTOR_SQUARES) * square}
        yield _placed(facts, _stage(facts, "factorisation", shared | solving, {}), stores)
    squares = _squares(facts, sites) * square
    site = max(sites, key=lambda one: one.entries)
    shared = shared | {"codes of candidates": float(sum(one.entries for one in sites))}
    yield _placed(facts, _stage(facts, "solving a site", shared | _solving(facts, site, square, squares), {}), stores)


def _summing(facts: Facts, site: SiteShape) -> dict[str, float]:
    """`MomentSums.add_`: sums of both splits, a chunk of inputs in float32, the float32 product; or the means at the end."""
    width = site.width
    square = DOUBLE * width**2
    chunk = min(CHUNK_TOKENS, max(batch.tokens for batch in facts.batches) * site.rows) * width * SINGLE
    sums = 2 * facts.moments * square
    adding = chunk * (3 if facts.moments > 1 else 2) + SINGLE * width**2
    # The means take the place of the sums, one at a time; what is finite is marked.
    means = square * (1 + 2 / DOUBLE)
    return {"sums of moments": float(sums), "adding to them": float(max(adding, means))}


def _squares(facts: Facts, sites: Sequence[SiteShape]) -> int:
    """Return how many squares a group keeps beside its moments."""
    wide = any(2 * site.out >= site.width for site in sites)
    return facts.cost.squares - (0 if wide else facts.cost.wide_squares)


def _solving(facts: Facts, site: SiteShape, square: float, kept: float) -> dict[str, float]:
    """One site: what the group shares, the weight in float32, then the sweep or the proof, whichever takes more."""
    cost, entries = facts.cost, site.entries
    swept = entries * cost.stacked
    if cost.stacked_entries is not None:
        swept = min(swept, max(cost.stacked_entries, site.width * cost.stacked))
    # U and each P in float32 beside the copies of the matrix.
    sweep = SWEEP_MATRICES * SINGLE * swept + (SINGLE / DOUBLE) * square * (1 + cost.residual_terms) * (swept > 0)
    proof = _proving(facts, site, square) if facts.batches and facts.moments else 0
    solver = cost.double_matrices * DOUBLE * entries + sweep
    # `finite_weight` and `choose_qparams` before all: magnitudes and marks of the whole weight, then arrays of a chunk.
    search = max((SINGLE + 2) * entries, SEARCH_ARRAYS * SINGLE * min(CHUNK_ENTRIES, entries))
    return {
        "factors": kept,
        "weight in float32": float(SINGLE * entries),
        "codes": float(entries),
        "solver or proof": float(max(solver, proof, search)),
    }


def _proving(facts: Facts, site: SiteShape, square: float) -> float:
    """`relative_errors`: in float32, a panel of G in float32; where codes are wide, once more in float64."""
    pull, panel = 0.0, float(SINGLE * site.width * min(site.width, QUADRATIC_PANEL))
    if facts.moments > 1:
        pull, panel = (
            float(SINGLE * site.entries),
            max(panel, 2 * square * SINGLE / DOUBLE),
        )  # C^T, and that in one piece
    single = PROOF_MATRICES * SINGLE * site.entries + panel
    in_double = site.spec is not None and site.spec.grid.bits >= PROOF_IN_DOUBLE
    return pull + (PROOF_MATRICES * DOUBLE * site.entries if in_double else single)


def _quantised_pass(facts: Facts, block: BlockShape, written: float) -> Stage:
    """`BlockRun.finish_`: everything of the block is there."""
    on_device = {
        "block weights": float(block.weight_bytes),
        "codes of solved sites": float(sum(site.entries for site in block.sites)),
        "forward of a batch": _work_bytes(facts, block),
    }
    stage = _stage(facts, "quantised forward", on_device, {})
    stage.disk["finished blocks"] = written - block.written_bytes
    stage.disk["solved sites"] = float(sum(site.packed_bytes for site in block.sites))
    return _placed(facts, stage, _stores(facts, block, inputs=True, before=-1))


def _compensating(facts: Facts, block: BlockShape, about: Compensation, shape: CompensationShape) -> Stage:
    """`Compensating.finish_`: the sums of all parts, those of a fold's rest, its moments, and one map that is solved for."""
    d, m = shape.inputs, shape.outputs
    sums = d * (d + about.targets * m)
    rows = max(batch.tokens for batch in facts.batches) * block.beside_rows
    on_device = {
        "block weights": float(block.weight_bytes),
        "codes of solved sites": float(sum(site.entries for site in block.sites)),
        "sums of a regression": float(DOUBLE * (about.folds + 1) * sums),
        "a fold left out": float(DOUBLE * 3 * sums),
        "a map": float(DOUBLE * (MAP_SQUARES * d * d + MAP_MATRICES * d * m)),
        "rows of a batch": float(SINGLE * rows * (2 * d + (2 + 2 * about.targets) * m)),
    }
    stage = _stage(facts, "compensating", on_device, {})
    stores = _stores(facts, block, inputs=False)
    held_out = sum(batch.tokens for batch in facts.batches if batch.held_out) / max(1, facts.tokens)
    stores["what blocks read and lack"] = (1 + about.local + held_out) * facts.stream_bytes
    return _placed(facts, stage, stores)


def _writing_block(facts: Facts, block: BlockShape, written: float) -> Stage:
    """`Journal.keep_block`: the codes are packed; the block is let go of afterwards, the streams have moved on."""
    on_device = {
        "block weights": float(block.weight_bytes),
        "codes of solved sites": float(sum(site.entries for site in block.sites)),
        "packed codes": float(sum(site.packed_bytes for site in block.sites)),
    }
    stage = _stage(facts, "writing a block", on_device, {})
    stage.disk["finished blocks"] = written
    stage.disk["solved sites"] = float(sum(site.packed_bytes for site in block.sites))
    return _placed(facts, stage, _stores(facts, block, inputs=False))


# ---------------------------------------------------------------------------------------------- the end
def _ending(facts: Facts, written: float) -> Stage:
    """`quantise_ends` and `CheckpointWriter.finish`: parts and shards are on disk at once until the rename."""
    codes = sum(end.entries + end.packed_bytes for end, _ in facts.ends)
    stage = _stage(facts, "embedding, head, shards", {"codes of the ends": float(codes)}, {})
    stage.disk["parts"] = written + _outside_written(facts)
    stage.disk["model folder"] = _output_bytes(facts)
    return stage


def _outside_written(facts: Facts) -> float:
    return float(
        facts.outside_bytes - sum(loaded for _, loaded in facts.ends) + sum(end.packed_bytes for end, _ in facts.ends)
    )


def _output_bytes(facts: Facts) -> float:
    sites = sum(block.count * len(block.sites) for block in facts.blocks)
    written = sum(block.count * block.written_bytes for block in facts.blocks)
    return written + _outside_written(facts) + facts.companion_bytes + SITE_REPORT_BYTES * sites
