"""The contracts: what a part of bitmend is given, what it gives back, and the tables in which parts are found.

A reader of this file and of `pipeline/quantize.py` knows the system.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitmend.compensation import CompensationShape
from bitmend.errors import RequestError
from bitmend.linalg.learned_rotation import AnyRotation, StreamRotation
from bitmend.linalg.least_squares import RegressionSums
from bitmend.linalg.moments import Moments
from bitmend.numerics.activations import ActivationSpec
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec
from bitmend.registry import Registry
from bitmend.routing import ExpertTokens
from bitmend.sites import AttentionSite, Block, LinearSite, ModelEnds, Wiring

ItemT = TypeVar("ItemT")


# ---------------------------------------------------------------------------------------------- how work is shown
@runtime_checkable
class Progress(Protocol):
    """Where long work says how far it is; the command line shows bars, a library call nothing."""

    def track(self, items: Iterable[ItemT], label: str, total: int) -> Iterator[ItemT]:
        """Yield `items`, showing how many of `total` are done and the time left."""
        ...

    def say(self, line: str) -> None:
        """Show one line of text."""
        ...


class SilentProgress:
    """Shows nothing."""

    def track(self, items: Iterable[ItemT], label: str, total: int) -> Iterator[ItemT]:
        del label, total
        yield from items

    def say(self, line: str) -> None:
        del line


# ---------------------------------------------------------------------------------------------- what is measured
class Need(StrEnum):
    """What a method asks the engine to measure for each group of sites that share an input."""

    INPUT_MOMENT = "G"  # (in, in) mean x_q x_q^T
    CROSS_MOMENT = "C"  # (in, in) mean (x_fp - x_q) x_q^T
    RESIDUAL_MOMENT = "D"  # (in, in) mean (x_fp - x_q)(x_fp - x_q)^T
    HELD_OUT = "held_out"  # the same moments over the held-out sequences, for the method's own choices


# ---------------------------------------------------------------------------------------------- one matrix
@dataclass(frozen=True)
class Problem:
    """Everything that a site solver may look at.

    Attributes:
        site: which matrix; for error sentences only.
        weight: the full-precision weight, float32.
        spec: the grid to round to.
        fit: moments of the part of the calibration data that the solution is fitted on; None for data-free solvers.
        held_out: moments of the other part, only for methods that ask for `Need.HELD_OUT`; None without a split.
    """

    site: LinearSite
    weight: Float[Tensor, "out in"]
    spec: QuantSpec
    fit: Moments | None = None
    held_out: Moments | None = None
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def qparams(self) -> QParams:
        """Return scales chosen on the weight alone, searched once for all copies of this problem made by `replace`."""
        # The weight is kept beside its answer, so that its id cannot become another's.
        key = (id(self.weight), self.spec)
        if key not in self._known:
            self.knowing(choose_qparams(self.weight, self.spec))
        chosen: QParams = self._known[key][1]
        return chosen

    def knowing(self, qparams: QParams | None) -> "Problem":
        """Take over scales that were searched for an equal weight and grid; None: none were. Returns itself."""
        if qparams is not None:
            self._known[id(self.weight), self.spec] = (self.weight, qparams)
        return self

    @property
    def known_qparams(self) -> QParams | None:
        """The scales, if they have been searched."""
        known = self._known.get((id(self.weight), self.spec))
        return None if known is None else known[1]


@dataclass(frozen=True)
class Event:
    """Something that the user must be told: a raised damping, a fallback, a dropped module.

    Attributes:
        kind: a fixed word, such as `damping_raised`, `fallback`, `dropped`, `dead_columns`.
        where: the site, block or file it speaks of.
        message: one sentence.
        degrades: whether this site did not get what was asked for; such sites count towards the 5 % guard.
    """

    kind: str
    where: str
    message: str
    degrades: bool = False


@dataclass(frozen=True)
class Solution:
    """What a site solver returns.

    Attributes:
        qtensor: the quantised matrix.
        diagnostics: plain numbers (or lists of them) for the run report.
        events: what the user must be told.
        proved: the matrix before it was fitted again on all rows; None when it was not, so that `qtensor` itself can be
            judged on held-out rows.
        fit_error: mean over the fit tokens of ||Q x - W x||^2, where the solver knows it without another product.
    """

    qtensor: QTensor
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    proved: QTensor | None = None
    fit_error: float | None = None


@runtime_checkable
class SiteSolver(Protocol):
    """Chooses the codes of one matrix in closed form: rtn, gptq, gptaq, marr, sage.

    A frozen dataclass that holds its hyperparameters and nothing else. It may have a method `cost()` that returns a
    `linalg.solver_cost.SolverCost`, for the forecast; without it, one sweep as by GPTQ is assumed. One that makes choices
    on held-out rows is also a `ChoosingSolver`.
    """

    needs: ClassVar[frozenset[Need]]

    def solve(self, problem: Problem) -> Solution:
        """Return the quantised matrix; never changes its input."""
        ...


@runtime_checkable
class ChoosingSolver(SiteSolver, Protocol):
    """A site solver that chooses something on held-out rows (`Need.HELD_OUT`), and can keep to its choice."""

    def solve_again(self, problem: Problem, judged: Solution) -> Solution:
        """Return the matrix fitted to `problem.fit` with what `judged` has chosen.

        Args:
            problem: of the same matrix, its moments those of all rows; nothing is held out any more.
            judged: what `solve` returned.
        """
        ...


# ---------------------------------------------------------------------------------------------- one block
@runtime_checkable
class BlockStreams(Protocol):
    """The calibration data at one block, in both networks."""

    def moments(self, group_index: int, needs: frozenset[Need]) -> tuple[Moments, Moments | None]:
        """Return the moments of one group's input over the fit split and the held-out split.

        Runs the quantised block as it stands, so groups solved before are seen quantised. The caller may write to them,
        unless the group belongs to an expert: several experts may share theirs.
        """
        ...

    def expert_tokens(self, group_index: int) -> ExpertTokens | None:
        """Return how many tokens reach a group that belongs to an expert; None for one that every token reaches."""
        ...


@dataclass(frozen=True)
class SolvedSite:
    """One site with everything that a run keeps of it, also in its journal.

    Attributes:
        site: which matrix.
        solution: codes and events; what a resumed run reads of it back is the same but for diagnostics, which the report
            has, and for `proved`, which nothing reads once the report is made.
        report: what `run.json` says of it.
        carried: plain values that later sites of the group need of this one when a run is resumed between them.
    """

    site: LinearSite
    solution: Solution
    report: "SiteReport"
    carried: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class BlockSolver(Protocol):
    """Solves all sites of a block; `per_site` lifts a `SiteSolver` to it."""

    def solve_block(
        self,
        block: Block,
        streams: BlockStreams | None,
        schemes: Mapping[str, QuantSpec],
        known: Mapping[str, SolvedSite],
    ) -> Iterator[SolvedSite]:
        """Yield the sites in the order in which they must be stored.

        The caller stores each result in the block before it asks for the next, so that later groups see earlier ones
        quantised. Sites without a scheme stay in full precision. Those in `known`, by name, were solved before a run was
        stopped: they are yielded as they are, and nothing is measured for a group of which all sites are known.
        """
        ...


@runtime_checkable
class Calibrated(Protocol):
    """The calibration rows in front of a block, for transforms that ask what its layers read."""

    def largest_inputs(self, block: Block, paths: Sequence[str]) -> dict[str, Tensor]:
        """Return the largest magnitude of each feature that these layers read, in the quantised network, over the fit split.

        Runs the block as it stands, on the residual stream as the block takes it.
        """
        ...

    def some_inputs(self, block: Block, paths: Sequence[str], count: int, *, evenly: bool = False) -> dict[str, Tensor]:
        """Return some tokens (token, features) that these layers read, in the quantised network, of the fit split.

        Half of the `count` are those with the largest magnitudes, the others are taken evenly; all of them with `evenly`. A
        layer that reads no token has no entry. Runs the block as it stands, on the residual stream as the block takes it.
        """
        ...


@dataclass(frozen=True)
class Transformed:
    """What a transform leaves to be done while the model runs, and what the user must be told.

    Attributes:
        inputs: path of a module (in the block, or in the model) -> rotation of its input, for which its weights were changed.
        outputs: path -> rotation of what the module returns.
        tensors: name in the model -> what must lie in the files for that, beside the model's own.
        events: what the user must be told.
    """

    inputs: Mapping[str, AnyRotation] = field(default_factory=dict)
    outputs: Mapping[str, StreamRotation] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    events: tuple[Event, ...] = ()


@runtime_checkable
class Transform(Protocol):
    """Keeps the function of the model and moves the difficulty: smooth, rotate, permute.

    Each block is changed when it has been loaded. An exact transform is proved on a few tokens: the block adds to the
    residual stream what it added before.

    Attributes:
        exact: the model computes the same, up to the rounding of its dtype.
        needs_rows: it asks what layers read, so that there must be calibration rows.
    """

    exact: ClassVar[bool]
    needs_rows: ClassVar[bool]

    def apply_(self, block: Block, wiring: Wiring, streams: Calibrated | None) -> Transformed:
        """Change the weights of a block in place."""
        ...


@runtime_checkable
class ModelTransform(Transform, Protocol):
    """A transform that also changes what lies around the blocks, once, before anything runs.

    If it rotates the residual stream, blocks are proved to add what they added before, rotated.
    """

    def residual_rotation(self, ends: ModelEnds) -> StreamRotation | None:
        """Return how the residual stream is rotated, or None when it stays as it is."""
        ...

    def apply_to_ends_(self, ends: ModelEnds) -> Transformed:
        """Change the weights around the blocks in place."""
        ...


@runtime_checkable
class OpenNetwork(Protocol):
    """The whole network in full precision at once, in float32, for transforms that learn on it.

    Its weights may be changed as long as it computes the same; nothing of it is kept.

    Attributes:
        ends: what lies around the blocks.
        blocks: all blocks in order, loaded, with how their layers hang together.
        num_rows: calibration rows to learn from; those that are held out are not among them.
    """

    ends: ModelEnds
    blocks: Sequence[tuple[Block, Wiring]]
    num_rows: int

    def rounding(self, block: Block, path: str) -> ActivationSpec | None:
        """Return how the input of a layer will be rounded."""
        ...

    def logits(self, row: int) -> Float[Tensor, "token vocabulary"]:
        """Return the logits of the real tokens of one row, with gradients, if they are on."""
        ...


@runtime_checkable
class LearningTransform(Transform, Protocol):
    """A transform that learns something on the whole network before the first block is transformed.

    Attributes:
        num_passes: calibration rows that pass the network with gradients, counted each time; for the forecast.
    """

    @property
    def num_passes(self) -> int: ...

    def learn(self, network: OpenNetwork, progress: Progress) -> dict[str, Tensor]:
        """Return what was learned, by names of its own."""
        ...

    def with_learned(self, learned: Mapping[str, Tensor]) -> "LearningTransform":
        """Return the transform that applies what `learn` returned."""
        ...


@dataclass(frozen=True)
class CompensationProblem:
    """Everything that a compensator may look at: sums over the tokens at one block (`linalg/least_squares.py`).

    x is what the block reads in the quantised network, y what it gives there, and e, one for each of the compensator's
    targets, what y lacks.

    Attributes:
        where: name of the block; for events only.
        shape: features in and out, and how they lie; its structure is for the compensator to choose.
        folds: sums of the fit rows, each row in one of them.
        held_out: of the held-out rows; None without a split.
        num_weights: quantised weights of the block, against which bytes are weighed; 0 where it is not known.
    """

    where: str
    shape: CompensationShape
    folds: Sequence[RegressionSums]
    held_out: RegressionSums | None = None
    num_weights: int = 0


@dataclass(frozen=True)
class Compensated:
    """What a compensator returns.

    Attributes:
        shape: of the map beside the block; None: none that helps.
        tensors: as `shape` names them.
        diagnostics: plain numbers for the run report.
        events: what the user must be told.
    """

    shape: CompensationShape | None
    tensors: Mapping[str, Tensor]
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = ()


@runtime_checkable
class Compensator(Protocol):
    """Puts a small map beside each block after rounding: QwT.

    Attributes:
        folds: into how many parts the fit rows are divided.
        token_cap: a token of ||x||^2 above this many times the median counts less, by as much.
        scale_free: what only stretches a token counts as no error, because the norms that read it take its size out; of maps
            of pictures, which no norm reads token by token, everything counts.
    """

    folds: ClassVar[int]
    token_cap: float
    scale_free: bool

    @property
    def targets(self) -> tuple[str, ...]:
        """What is measured as lacking: `local`, against the full-precision block on the same x, or `trajectory`."""
        ...

    @property
    def judges_model(self) -> bool:
        """Whether all maps are dropped where the whole model is no better for them on held-out rows."""
        ...

    @property
    def num_solved(self) -> int:
        """How many maps are solved for on each fold, for the forecast."""
        ...

    def largest(self, shape: CompensationShape) -> CompensationShape:
        """Return the largest map that may come out at such a place, for the forecast."""
        ...

    def fit(self, problem: CompensationProblem) -> Compensated:
        """Return the map that predicts the last of the targets best."""
        ...


@runtime_checkable
class Reparameterisation(Protocol):
    """What a learned block solver may train instead of a plain weight."""

    def parameterise(self, weight: Float[Tensor, "out in"], spec: QuantSpec) -> nn.Module:
        """Return a module without input whose output is the current quantised weight, with gradients."""
        ...


# ---------------------------------------------------------------------------------------------- one model
@dataclass(frozen=True)
class TokenBatch:
    """Some calibration rows of one batch.

    Attributes:
        ids: token numbers, padded on the right.
        mask: true where there is a real token; None when every row is full.
        first_position: of the first token of each row; below 0 for tokens in front of a text.
    """

    ids: Int[Tensor, "batch sequence"]
    mask: Tensor | None = None
    first_position: int = 0

    @property
    def num_tokens(self) -> int:
        """How many real tokens."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def num_rows(self) -> int:
        """How many texts, or pieces of them."""
        return self.ids.shape[0]

    @property
    def num_places(self) -> int:
        """How many tokens run, padding among them."""
        return self.ids.numel()

    @property
    def shape(self) -> tuple[int, ...]:
        """Equal for batches whose blocks are called with the same further arguments, unless they are padded."""
        return tuple(self.ids.shape)


@dataclass(frozen=True)
class ImageBatch:
    """Some pictures of one batch, as the model reads them.

    Attributes:
        pixels: resized and normalised.
    """

    pixels: Float[Tensor, "image channel height width"]

    @property
    def mask(self) -> None:
        """Pictures are never padded."""
        return

    @property
    def num_rows(self) -> int:
        """How many pictures."""
        return self.pixels.shape[0]

    @property
    def num_places(self) -> int:
        """How many pictures; how many tokens a block makes of one is for the block to say."""
        return self.pixels.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """As of `TokenBatch`."""
        return tuple(self.pixels.shape)


Batch = TokenBatch | ImageBatch


def tokens_of(batch: Batch) -> TokenBatch:
    """Return a batch that holds tokens.

    Raises:
        RequestError: it holds pictures.
    """
    if not isinstance(batch, TokenBatch):
        raise RequestError("the model reads tokens, but pictures came; give a text")
    return batch


def pixels_of(batch: Batch) -> Float[Tensor, "image channel height width"]:
    """Return the pictures of a batch.

    Raises:
        RequestError: it holds tokens.
    """
    if not isinstance(batch, ImageBatch):
        raise RequestError("the model reads pictures, but tokens came; give a folder of pictures")
    return batch.pixels


@dataclass(frozen=True)
class BlockInputs:
    """What the first block gets, and the further arguments of every block.

    Attributes:
        hidden: input of block 0; of image models, where the first block is the one that reads pictures, the pictures.
        arguments: for each block the positional arguments after the hidden states, and the keyword arguments.
    """

    hidden: Float[Tensor, "batch *features"]
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


@runtime_checkable
class ModelAdapter(Protocol):
    """The only thing that knows an architecture. Blocks live on disk until `load_block`."""

    model: nn.Module
    folder: Path
    config: Any  # of transformers
    dtype: torch.dtype
    block_names: tuple[str, ...]
    embedding_name: str | None  # None where what is read are no tokens
    task: str  # the class of transformers that loads such models
    tower: str | None  # `vision` or `text` where it is a part of a model with two towers
    head_names: tuple[str, ...]  # linear layers behind the last block; none when the head is tied to the embedding
    reads: Literal["tokens", "pictures"]
    first_layer: str | None  # of models that read pictures: the path of the layer that runs first
    idle: tuple[str, ...]  # layers outside the blocks that never run
    row_length: int | None  # places of a row where all rows have as many; None: any number of tokens

    def reopened(self, dtype: torch.dtype) -> "ModelAdapter":
        """Return the same model opened once more, in another dtype."""
        ...

    def load_block(self, index: int) -> nn.Module:
        """Read one block's tensors from the checkpoint and return the block."""
        ...

    def release_block(self, index: int) -> None:
        """Forget one block's tensors."""
        ...

    def few_rows(self) -> Batch:
        """Return a few rows that every model of the kind can read; only the order of layers is read from them."""
        ...

    def sample_inputs(self, index: int, rows: int, length: int) -> tuple[Tensor, BlockInputs]:
        """Return some numbers as a block reads them, of `rows` rows of `length` places, and the arguments of the blocks."""
        ...

    def stream_width(self) -> int:
        """Return how many entries the hidden states have for one place, between the two blocks where they have most."""
        ...

    def describe_block(self, index: int, batch: Batch) -> Block:
        """Run a few tokens through a loaded block and return its sites in execution order."""
        ...

    def wiring_of(self, block: Block, batch: Batch) -> Wiring:
        """Return how the layers of a loaded block hang together; runs it on a few tokens some times."""
        ...

    def prepare_attention_(self) -> None:
        """Let the model attend by a function that can round keys, values and attention.

        Raises:
            ModelError: it attends by itself.
        """
        ...

    def attentions_of(self, block: Block, batch: Batch) -> tuple[AttentionSite, ...]:
        """Return where a loaded block attends; runs it on a few tokens. `prepare_attention_` comes first."""
        ...

    def ends(self, batch: Batch) -> ModelEnds:
        """Return what lies around the blocks; runs it on a few tokens."""
        ...

    def block_inputs(self, batch: Batch) -> BlockInputs:
        """Run everything before the first block."""
        ...

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """Return all stored tensors of a loaded block by full name."""
        ...

    def outside_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all stored tensors that are in no block, each once, by the name under which they are loaded."""
        ...

    def run_block(
        self, index: int, hidden: Float[Tensor, "batch *features"], inputs: BlockInputs
    ) -> Float[Tensor, "batch *made"]:
        """Run one loaded block."""
        ...

    def forward_block(
        self, index: int, hidden: Float[Tensor, "batch *features"], inputs: BlockInputs
    ) -> Float[Tensor, "batch *made"]:
        """Run one loaded block with gradients, if they are on."""
        ...

    def logits(self, hidden: Float[Tensor, "batch *features"], batch: Batch) -> Float[Tensor, "batch *label"]:
        """Run everything after the last block."""
        ...

    def forward_logits(self, hidden: Float[Tensor, "batch *features"], batch: Batch) -> Float[Tensor, "batch *label"]:
        """Run everything after the last block with gradients, if they are on."""
        ...


@runtime_checkable
class CheckpointFormat(Protocol):
    """A file that other tools, or bitmend itself, can read.

    Attributes:
        proof: what an export has shown when `export` returns, as the end of a sentence.
    """

    proof: ClassVar[str]

    def export(self, source: Path, output: Path) -> tuple[Event, ...]:
        """Write the native checkpoint `source` in this format to the new folder `output`."""
        ...


# ---------------------------------------------------------------------------------------------- what was done
@dataclass
class SiteReport:
    """What happened at one site.

    Errors are mean squares of the layer's output, over mean ||W x||^2, x the input in the quantised network, of the
    held-out tokens where there are such, so that a site's errors have one measure. With two
    streams it is ||Q x - W x_fp||^2, the error against the full-precision network; with one it is ||Q x - W x||^2, what
    rounding this layer adds. The two must not be compared with each other; `calibration.two_streams` asks for the former
    everywhere.

    Attributes:
        name: full path in the model.
        spec: the grid, in words.
        solver: which solver the stored codes come from (the base when the candidate was dropped).
        fit_error: of the candidate, on the data it was fitted to; None for data-free runs.
        held_out_error: of the candidate before any refit, on data it never saw; None without a held-out split.
        base_held_out_error: the same for round-to-nearest at the same bits.
        streams: 2 when errors are against the full-precision network, 1 when against the layer's own unrounded output;
            None when nothing was measured.
        chosen_on_held_out: the method made choices of its own on the held-out rows (a strength, say), so that its
            held-out error is a little too good.
        accepted: whether the candidate was kept.
        refitted: whether the stored codes were fitted again on all rows after the candidate had been accepted.
        seconds: time in the solver.
        diagnostics: the solver's own numbers; for a matrix of an expert also `expert_tokens_fit` and
            `expert_tokens_held_out`, the calibration tokens that the quantised network sends there.
    """

    name: str
    spec: str
    solver: str
    fit_error: float | None = None
    held_out_error: float | None = None
    base_held_out_error: float | None = None
    streams: int | None = None
    chosen_on_held_out: bool = False
    accepted: bool = True
    refitted: bool = False
    seconds: float = 0.0
    diagnostics: dict[str, Any] = field(default_factory=dict)


@dataclass
class TransformReport:
    """What the guard found of one transform at one block.

    Errors are those of the block with its weights rounded to nearest at the bits of the recipe, and with all else that the
    finished model rounds, over the size of what the unrounded block adds; on held-out rows.

    Attributes:
        name: of the transform.
        error_without: with the transforms before it alone.
        error_with: with it, too.
        kept: whether it stayed.
        forced: whether it stayed because the recipe forces it.
    """

    name: str
    error_without: float
    error_with: float
    kept: bool
    forced: bool = False


@dataclass
class BlockReport:
    """What happened at one block.

    Attributes:
        name: full path in the model.
        relative_error: mean square of (full-precision stream - quantised stream) after the block, over the mean square
            of the full-precision stream, on the held-out rows (all rows when none are held out); None without streams.
        sites: in execution order.
        seconds: wall time of the whole block.
        transforms: what the guard found, in order; that of a transform of the whole model stands at the first block.
        compensation: the numbers of the map beside the block, and whether it is `kept`; empty without a compensator.
    """

    name: str
    relative_error: float | None = None
    sites: list[SiteReport] = field(default_factory=list)
    seconds: float = 0.0
    transforms: list[TransformReport] = field(default_factory=list)
    compensation: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunReport:
    """Everything that `run.json` says of a run.

    `fingerprint` says what the numbers depend on (`pipeline/fingerprint.py`). Its seconds are those of the process that
    finished the run; before it, earlier processes took `before_resume`, which is a part of `total`. `forecast` is what was
    said of memory, disk and time before it started (`pipeline/forecast.py`).
    """

    model: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    calibration: dict[str, Any]
    blocks: list[BlockReport] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    bits: dict[str, float] = field(default_factory=dict)
    output: str = ""
    fingerprint: dict[str, str] = field(default_factory=dict)
    forecast: dict[str, Any] = field(default_factory=dict)
    status: Literal["running", "done"] = "running"
    tower: str | None = None


# ---------------------------------------------------------------------------------------------- where parts are found
SOLVERS: Registry[Any] = Registry("solver", "bitmend.solvers")
TRANSFORMS: Registry[Any] = Registry("transform", "bitmend.transforms")
REPARAMETERISATIONS: Registry[Any] = Registry("reparameterisation", "bitmend.reparameterisations")
COMPENSATORS: Registry[Any] = Registry("compensator", "bitmend.compensators")
ADAPTERS: Registry[Any] = Registry("model adapter", "bitmend.models")
FORMATS: Registry[Any] = Registry("format", "bitmend.formats")
