"""The calibration rows of a run: texts for models that read tokens, pictures for those that read pictures."""

from collections.abc import Sequence
from pathlib import Path

from bitmend.calibrate.data import CalibrationSet, Split, load_calibration
from bitmend.calibrate.images import ImageSet, load_images
from bitmend.errors import RequestError
from bitmend.models.architecture import context_of
from bitmend.models.image_processor import channels_of, load_processor
from bitmend.models.loading import CAUSAL_LM
from bitmend.models.tokenizer import load_tokenizer
from bitmend.pipeline.forecast import BatchShape
from bitmend.pipeline.plan import asked_batches, rows_per_batch
from bitmend.pipeline.recipe import Recipe
from bitmend.protocols import Batch, ModelAdapter, Progress

LONGEST_DEFAULT_SEQUENCE = 2048

Rows = CalibrationSet | ImageSet


def draw_calibration(
    recipe: Recipe, adapter: ModelAdapter, sources: Sequence[str | Path] | Rows, progress: Progress
) -> Rows | None:
    """Return the rows that the recipe asks for, or None without sources; rows drawn before are taken as they are.

    Raises:
        RequestError: rows longer than the model's context, or rows that the model cannot read.
        CalibrationError: a source is missing, empty, too short or not what its name says.
    """
    drawn = isinstance(sources, (CalibrationSet, ImageSet))
    if not drawn and not sources:
        return None
    if adapter.reads == "pictures":
        return _pictures(recipe, adapter, sources, progress)
    if isinstance(sources, ImageSet):
        raise RequestError("the model reads tokens, but pictures came; give a text")
    length = row_length(recipe, adapter, sources if isinstance(sources, CalibrationSet) else None)
    if isinstance(sources, CalibrationSet):
        return sources
    wanted = recipe.calibration
    rows = load_calibration(
        sources,
        load_tokenizer(adapter.folder),
        sequences=wanted.sequences,
        sequence_length=length,
        held_out=wanted.held_out,
        seed=wanted.seed,
        whole_texts=adapter.task != CAUSAL_LM,
    )
    progress.say(
        f"calibration: {len(rows)} sequences, {rows.num_tokens} tokens, {rows.num_held_out} sequences held out, "
        f"sha256 {rows.fingerprint[:12]}"
    )
    return rows


def _pictures(
    recipe: Recipe, adapter: ModelAdapter, sources: Sequence[str | Path] | Rows, progress: Progress
) -> ImageSet:
    if isinstance(sources, ImageSet):
        return sources
    if isinstance(sources, CalibrationSet):
        raise RequestError("the model reads pictures, but tokens came; give a folder of pictures")
    wanted = recipe.calibration
    if wanted.sequence_length is not None:
        raise RequestError("pictures have no sequence_length; leave it out (--sequences is the number of pictures)")
    pictures = load_images(
        sources,
        load_processor(adapter.folder, channels_of(adapter.model.config)),
        images=wanted.sequences,
        held_out=wanted.held_out,
        seed=wanted.seed,
    )
    progress.say(
        f"calibration: {len(pictures)} pictures, {pictures.num_held_out} held out, sha256 {pictures.fingerprint[:12]}"
    )
    return pictures


def batches_of(rows: Rows | None, adapter: ModelAdapter) -> list[tuple[Batch, bool]]:
    """Return the rows in batches, and of each whether it is held out."""
    if rows is None:
        return []
    longest = 1 if isinstance(rows, ImageSet) else max(row.numel() for row in rows.rows)
    size = rows_per_batch(adapter, longest)
    splits = rows.split_of_batch(size)
    batches: Sequence[Batch] = rows.batches(size)
    return [(batch, split is Split.HELD_OUT) for batch, split in zip(batches, splits, strict=True)]


def expected_batches(recipe: Recipe, adapter: ModelAdapter) -> list[BatchShape]:
    """Return the shapes of the batches that the recipe asks for, before any row has been drawn."""
    wanted = recipe.calibration
    length = 1 if adapter.reads == "pictures" else row_length(recipe, adapter)
    return asked_batches(wanted.sequences, length, wanted.held_out, rows_per_batch(adapter, length))


def row_length(recipe: Recipe, adapter: ModelAdapter, rows: CalibrationSet | None = None) -> int:
    """Return the tokens of a full row: of `rows`, or as the recipe asks.

    Raises:
        RequestError: more than the model's context.
    """
    context = context_of(adapter.model) or LONGEST_DEFAULT_SEQUENCE
    in_front = 0 if recipe.prefix is None else recipe.prefix.most_tokens
    if in_front >= context:
        raise RequestError(
            f"a prefix of {in_front} tokens leaves nothing of the model's context of {context} tokens; name fewer in "
            "prefix.tokens, or lower prefix.max_tokens"
        )
    context -= in_front
    length = recipe.calibration.sequence_length or min(LONGEST_DEFAULT_SEQUENCE, context)
    if rows is not None:
        length = max(row.numel() for row in rows.rows)
    if length > context:
        behind = f", of which a prefix may take {in_front}" if in_front else ""
        raise RequestError(
            f"sequence_length must be at most the model's context of {context + in_front} tokens{behind}; got {length}"
        )
    return length
