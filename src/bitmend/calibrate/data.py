"""The calibration rows, and which of them are held out.

Every repair is fitted on one part of the rows (`Split.FIT`) and judged on the other (`Split.HELD_OUT`). A row is a
whole sequence and lies in one part; `load_calibration` draws each sequence once, so that none is in both. The
fingerprint names the rows and the split: two runs with one fingerprint saw the same data.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from bitmend.calibrate.sources import Pool, draw_rows, read_source
from bitmend.errors import CalibrationError, RequestError
from bitmend.protocols import TokenBatch


class Split(StrEnum):
    """The two parts of the rows."""

    FIT = "fit"
    HELD_OUT = "held_out"


@dataclass(frozen=True)
class CalibrationSet:
    """Rows of token numbers and their split.

    Attributes:
        rows: one sequence each; lengths may differ.
        held_out: for each row whether it is kept back for the proof.
        seed: what the rows and the split were drawn with.
        source: where the rows come from, in words.

    Raises:
        CalibrationError: there is no row to fit on, or a row is empty.
    """

    rows: Sequence[Int64[Tensor, "_"]]
    held_out: Bool[Tensor, "rows"]
    seed: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        check_split(len(self.rows), self.held_out)
        empty = [index for index, row in enumerate(self.rows) if row.numel() == 0]
        if empty:
            raise CalibrationError(
                f"calibration set: every row needs at least one token, but row {empty[0]} is empty; leave it out"
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """How many tokens all rows hold together."""
        return sum(row.numel() for row in self.rows)

    @property
    def num_held_out(self) -> int:
        """How many rows are held out."""
        return int(self.held_out.sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the rows and the split, in order: any changed token, length, order or mark changes it."""
        digest = hashlib.sha256()
        for row, held_out in zip(self.rows, self.held_out.tolist(), strict=True):
            digest.update(row.numel().to_bytes(8, "little"))
            digest.update(b"\x01" if held_out else b"\x00")
            digest.update(row.cpu().contiguous().numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return what a run report says of the rows, as plain values."""
        return {
            "source": self.source,
            "sequences": len(self.rows),
            "held_out": self.num_held_out,
            "tokens": self.num_tokens,
            "longest_sequence": max(row.numel() for row in self.rows),
            "seed": self.seed,
            "sha256": self.fingerprint,
        }

    def batches(self, batch_size: int, *, pad_id: int = 0) -> list[TokenBatch]:
        """Return all rows in batches of one split each: first the rows to fit on, then the held-out rows.

        Rows of the full length (that of the longest row) come first in their order, without a mask. Shorter rows
        follow, shortest first, padded on the right to the longest of their batch.

        Args:
            batch_size: rows in a batch, at most.
            pad_id: the token number that fills the end of short rows; masked, so that its value must only be valid.
        """
        return [self._batch(indices, pad_id) for _, indices in self._plan(batch_size)]

    def split_of_batch(self, batch_size: int) -> list[Split]:
        """Return which part each batch of `batches(batch_size)` belongs to."""
        return [split for split, _ in self._plan(batch_size)]

    def _plan(self, batch_size: int) -> list[tuple[Split, list[int]]]:
        full_length = max(row.numel() for row in self.rows)

        def by_length(members: list[int]) -> tuple[list[int], list[int]]:
            full = [index for index in members if self.rows[index].numel() == full_length]
            ragged = sorted(set(members) - set(full), key=lambda index: (self.rows[index].numel(), index))
            return full, ragged

        return plan_batches(self.held_out, batch_size, by_length)

    def _batch(self, indices: list[int], pad_id: int) -> TokenBatch:
        rows = [self.rows[index] for index in indices]
        longest = max(row.numel() for row in rows)
        ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for target, marks, row in zip(ids, mask, rows, strict=True):
            target[: row.numel()] = row
            marks[: row.numel()] = True
        return TokenBatch(ids, None if bool(mask.all()) else mask)


def check_split(num_rows: int, held_out: Bool[Tensor, "_"]) -> None:
    """Refuse a split that does not have one mark a row, or leaves no row to fit on.

    Raises:
        CalibrationError: as above.
    """
    if num_rows != len(held_out):
        raise CalibrationError(
            f"calibration set: one held-out mark a row is required, but {len(held_out)} marks came for {num_rows} rows; "
            "give as many marks as rows"
        )
    if bool(held_out.all()):
        raise CalibrationError(
            f"calibration set: at least one row to fit on is required, but all {num_rows} rows are held out; give more rows "
            "or hold fewer out"
        )


def plan_batches(
    held_out: Bool[Tensor, "rows"],
    batch_size: int,
    groups: Callable[[list[int]], Iterable[list[int]]] = lambda members: (members,),
) -> list[tuple[Split, list[int]]]:
    """Divide rows into batches of one split each: first those to fit on, then the held-out ones.

    Args:
        held_out: for each row whether it is held out.
        batch_size: rows in a batch, at most.
        groups: divides the rows of a split further; no batch has rows of two groups.

    Returns:
        For each batch its split and its rows.

    Raises:
        RequestError: a batch would have no row.
    """
    if batch_size < 1:
        raise RequestError(f"calibration batches: at least one row a batch is required, not {batch_size}")
    plan = []
    for split, wanted in ((Split.FIT, False), (Split.HELD_OUT, True)):
        members = [index for index, mark in enumerate(held_out.tolist()) if mark is wanted]
        for group in groups(members):
            plan += [(split, group[start : start + batch_size]) for start in range(0, len(group), batch_size)]
    return plan


def choose_held_out(num_rows: int, share: float, seed: int) -> Bool[Tensor, "rows"]:
    """Mark `share` of the rows as held out, evenly spread over their order from a place that the seed gives.

    Rows stand in the order of their sources, so an even spread holds out the same share of every source. A share
    above 0 marks at least one row, and at least one row stays unmarked.

    Raises:
        RequestError: the share is not in [0, 1).
        CalibrationError: a split is asked of a single row.
    """
    if not 0 <= share < 1:
        raise RequestError(f"held_out: a share of the sequences, 0 <= x < 1, is required, but {share} came; give 0.25")
    marks = torch.zeros(num_rows, dtype=torch.bool)
    if share == 0:
        return marks
    if num_rows < 2:
        raise CalibrationError(
            f"held_out: a share of {share} needs at least 2 sequences, but there is {num_rows}; "
            "give more sequences or set held_out to 0"
        )
    count = min(max(1, round(share * num_rows)), num_rows - 1)
    # Whole numbers, so that no rounding can make two places fall together.
    offset = int(torch.randint(num_rows, (1,), generator=torch.Generator().manual_seed(seed)))
    marks[[(index * num_rows + offset) // count for index in range(count)]] = True
    return marks


def load_calibration(
    sources: Sequence[str | Path],
    tokenizer: Any,
    *,
    sequences: int,
    sequence_length: int,
    held_out: float,
    seed: int,
    whole_texts: bool = False,
) -> CalibrationSet:
    """Read calibration rows from files or from a hub data set.

    What a source is read as depends on its name:

    - `*.jsonl`: each line is a string, or an object with `text`, `messages` (through the tokenizer's chat template) or
      `input_ids`. Texts are packed into one stream, each as the tokenizer encodes it by itself and closed by the
      end-of-text token where there is one; `input_ids` stay rows of their own, cut to `sequence_length`.
    - `*.npy`: whole numbers; one dimension is a stream, two dimensions are rows.
    - `hf:NAME[:CONFIG][:SPLIT]`: the rows of a data set, read like JSON lines; the split is `train` unless given
      (`hf:NAME::test` gives it without a configuration). Needs the extra `datasets`.
    - anything else: UTF-8 text, tokenised as one stream without special tokens.

    Streams are cut into windows of `sequence_length` that do not overlap. Windows and rows are drawn at random without
    replacement, from each source in proportion to its length, and each sequence at most once. See `sources.read_source`
    for how much of a very large file is read.

    Args:
        sources: files or `hf:` names.
        tokenizer: a transformers tokenizer.
        sequences: how many rows.
        sequence_length: tokens in a full row.
        held_out: share of the rows kept back, 0 <= x < 1.
        seed: of the draw and the split.
        whole_texts: make each text a row, with the tokenizer's special tokens, cut to `sequence_length`; in text files each
            line is a text. For encoders, which read one text at a time.

    Raises:
        RequestError: a number is out of range, or an extra is missing.
        CalibrationError: a source is missing, empty, too short or not what its name says.
    """
    for name, value in (("sequences", sequences), ("sequence_length", sequence_length)):
        if value < 1:
            raise RequestError(f"calibration: {name} must be at least 1, but {value} came; give a positive number")
    if not sources:
        raise CalibrationError("calibration: at least one file is required, but none came; pass --calibration FILE")
    special = tokenizer.num_special_tokens_to_add() if whole_texts else 0
    if sequence_length <= special:
        raise RequestError(
            f"calibration: rows of more than the {special} special tokens that the tokenizer adds are required, but "
            f"sequence_length is {sequence_length}; give a larger one"
        )
    marks = choose_held_out(sequences, held_out, seed)
    pools = [
        read_source(source, tokenizer, sequences, sequence_length, seed, whole_texts=whole_texts) for source in sources
    ]
    drawn = draw_rows(pools, sequences, sequence_length, seed)
    _check_vocabulary(pools, drawn, len(tokenizer))
    parts = (f"{pool.name} ({len(rows)})" for pool, rows in zip(pools, drawn, strict=True))
    rows = [row for rows in drawn for row in rows]
    return CalibrationSet(rows, marks, seed, ", ".join(parts))


def _check_vocabulary(pools: Sequence[Pool], drawn: Sequence[Sequence[Tensor]], vocabulary: int) -> None:
    for pool, rows in zip(pools, drawn, strict=True):
        for row in rows:
            low, high = int(row.min()), int(row.max())
            if low < 0 or high >= vocabulary:
                raise CalibrationError(
                    f"{pool.name}: token numbers must be in 0..{vocabulary - 1}, the vocabulary of the model's "
                    f"tokenizer, but {low if low < 0 else high} came; tokenise the text with this model's tokenizer"
                )
