"""From files and data sets to pools of token sequences, and the draw of rows from the pools.

A pool holds streams, of which windows that do not overlap are candidates, and rows, which are candidates as they are.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitmend.errors import CalibrationError, QuantizationError, RequestError, is_whole_text

WHOLE_FILE_BYTES = 8 * 2**20  # up to here a text file is tokenised in one go
PIECE_BYTES = 2**20  # larger files are read in pieces of about this size
POOL_FACTOR = 4  # until the pool holds this many times the tokens that were asked for
SHUFFLE_BUFFER = 1000  # documents of a streamed data set that are held back to be mixed


@dataclass(frozen=True)
class Pool:
    """The candidates of one source.

    Attributes:
        name: the source, as the user named it.
        streams: whole numbers in one dimension each; windows are never taken across two streams.
        rows: whole numbers in one dimension each (or one array of two dimensions).
        coverage: how large a part of the source was read, 0 to 1.
    """

    name: str
    streams: tuple[np.ndarray, ...] = ()
    rows: Sequence[np.ndarray] | np.ndarray = ()
    coverage: float = 1.0

    def num_candidates(self, length: int) -> int:
        """How many windows of `length` and how many rows there are."""
        return sum(len(stream) // length for stream in self.streams) + len(self.rows)

    def candidate(self, index: int, length: int) -> np.ndarray:
        """Return candidate `index` as 64-bit numbers: windows in order, then rows cut to `length`."""
        for stream in self.streams:
            windows = len(stream) // length
            if index < windows:
                return np.array(stream[index * length : (index + 1) * length], dtype=np.int64)
            index -= windows
        return np.array(self.rows[index][:length], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """How many tokens were read."""
        return sum(len(stream) for stream in self.streams) + sum(len(row) for row in self.rows)


def read_source(
    source: str | Path, tokenizer: Any, sequences: int, length: int, seed: int, *, whole_texts: bool = False
) -> Pool:
    """Read one source, by its name (see `data.load_calibration`).

    Text and JSON-lines files up to 8 MiB are read whole. Of a larger one, pieces of about 1 MiB that begin and end at
    line ends are read in an order that the seed gives, until four times the tokens that `sequences` need are there or
    the file is used up; in text, no sequence reaches across two pieces. Data sets are streamed under the same rule.
    Arrays are memory-mapped.

    With `whole_texts` each line of a text file, and each text of a JSON-lines file or a data set, is a row of its own, as
    the tokenizer encodes it by itself and cuts it to `length`.

    Raises:
        CalibrationError: missing, empty, shorter than one sequence, or not what the name says.
        RequestError: an extra is missing.
    """
    name = str(source)
    wanted = POOL_FACTOR * sequences * length
    row_length = length if whole_texts else None
    if name.startswith("hf:"):
        pool = _read_hub(name, _Documents(name, tokenizer, row_length), wanted, seed)
    else:
        path = Path(source)
        _check_file(path)
        if path.suffix == ".npy":
            pool = _read_array(path)
        elif path.suffix == ".jsonl":
            pool = _read_json_lines(path, _Documents(name, tokenizer, row_length), wanted, seed)
        elif whole_texts:
            pool = _read_lines(path, _Documents(name, tokenizer, row_length), wanted, seed)
        else:
            pool = _read_text(path, tokenizer, wanted, seed)
    if pool.num_candidates(length) == 0:
        raise CalibrationError(
            f"{name}: at least one sequence of {length} tokens is required, but there are {pool.num_tokens} tokens; "
            "give a longer text or a smaller --sequence-length"
        )
    return pool


def draw_rows(pools: Sequence[Pool], sequences: int, length: int, seed: int) -> list[list[Tensor]]:
    """Draw `sequences` different rows at random without replacement, from each pool in proportion to its length.

    Returns:
        For each pool its rows, in the order in which they stand in the source.

    Raises:
        CalibrationError: there are fewer different sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [pool.num_candidates(length) for pool in pools]
    weights = [count / pool.coverage for count, pool in zip(counts, pools, strict=True)]
    draws = [iter(torch.randperm(count, generator=generator).tolist()) for count in counts]
    chosen: list[dict[int, Tensor]] = [{} for _ in pools]
    seen: set[bytes] = set()

    def draw(which: int, quota: int) -> None:
        while len(chosen[which]) < quota and (index := next(draws[which], None)) is not None:
            row = pools[which].candidate(index, length)
            digest = hashlib.sha256(row.tobytes()).digest()
            if digest not in seen:  # equal rows could otherwise stand on both sides of the split
                seen.add(digest)
                chosen[which][index] = torch.from_numpy(row)

    for which, quota in enumerate(allocate(counts, weights, sequences)):
        draw(which, quota)
    for which, rows in enumerate(chosen):  # what repeated sequences left open in one source, another may fill
        draw(which, len(rows) + sequences - sum(map(len, chosen)))
    available = sum(map(len, chosen))
    if available < sequences:
        names = ", ".join(pool.name for pool in pools)
        raise CalibrationError(
            f"{names}: {sequences} different sequences of {length} tokens are required, but there are {available}; "
            f"pass --sequences {available}, a smaller --sequence-length or more text"
        )
    return [[rows[index] for index in sorted(rows)] for rows in chosen]


def allocate(counts: Sequence[int], weights: Sequence[float], wanted: int) -> list[int]:
    """Divide `wanted` in proportion to `weights` (largest remainder first), giving nobody more than its count.

    Example:
        >>> allocate([10, 10], [3.0, 1.0], 8)
        [6, 2]
        >>> allocate([1, 10], [3.0, 1.0], 8)
        [1, 7]
    """
    total = sum(weights)
    shares = [wanted * weight / total for weight in weights]
    quotas = [min(int(share), count) for share, count in zip(shares, counts, strict=True)]
    while sum(quotas) < min(wanted, sum(counts)):
        open_pools = [which for which, count in enumerate(counts) if quotas[which] < count]
        quotas[max(open_pools, key=lambda which: shares[which] - quotas[which])] += 1
    return quotas


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """Return the token numbers of `text`, without special tokens."""
    # verbose=False: that a text is longer than the model's context is no news here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int64)


def decode_utf8(raw: bytes, name: str, offset: int = 0) -> str:
    """Return the text of `raw`, which stands at byte `offset` of the file `name`.

    Raises:
        CalibrationError: it is not UTF-8; the sentence names the byte.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{name}: UTF-8 text is required, but byte {offset + error.start} is not ({error.reason}); "
            "convert the file to UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


# ------------------------------------------------------------------------------------------------------- kinds of files
def _check_file(path: Path) -> None:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing"
        raise CalibrationError(f"{path}: a calibration file is required, but there is {what}; check the path")
    if path.stat().st_size == 0:
        raise CalibrationError(f"{path}: a calibration file with text is required, but it is empty; give another file")


def _read_text(path: Path, tokenizer: Any, wanted: int, seed: int) -> Pool:
    streams: list[np.ndarray] = []
    coverage = 0.0
    for offset, raw, share in _pieces(path, seed, PIECE_BYTES):
        streams.append(encode(tokenizer, decode_utf8(raw, str(path), offset)))
        coverage += share
        if sum(map(len, streams)) >= wanted:
            break
    return Pool(str(path), tuple(streams), coverage=coverage)


def _read_json_lines(path: Path, documents: "_Documents", wanted: int, seed: int) -> Pool:
    return _read_lines(path, documents, wanted, seed, _parse_json)


def _read_lines(
    path: Path, documents: "_Documents", wanted: int, seed: int, parse: Callable[[str, str], Any] = lambda text, _: text
) -> Pool:
    """Collect what `parse` makes of each line that is not empty; it gets the line and where that stands."""
    coverage = 0.0
    for offset, raw, share in _pieces(path, seed, -1):
        position = offset
        for line in raw.splitlines(keepends=True):
            text = decode_utf8(line, str(path), position).strip()
            where = f"{path}, the line at byte {position}"
            position += len(line)
            if text:
                documents.add(parse(text, where), where)
        coverage += share
        if documents.num_tokens >= wanted:
            break
    return documents.pool(coverage)


def _parse_json(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise CalibrationError(
            f"{where}: one JSON value a line is required, but this is none ({reason}); "
            "mend the line, or name the file .txt if it is plain text"
        ) from error
    if not is_whole_text(value):
        raise CalibrationError(f"{where}: text is required, but half of a character stands in it; mend the line")
    return value


def _read_array(path: Path) -> Pool:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise CalibrationError(
            f"{path}: a .npy file of whole numbers is required, but it cannot be read without pickle ({error}); "
            "save it with numpy.save from an integer array"
        ) from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise CalibrationError(
            f"{path}: whole numbers in one dimension (a stream) or two (rows) are required, but it holds "
            f"{array.dtype} in {array.ndim} dimensions; save token numbers as int32 or int64"
        )
    if array.size == 0:
        raise CalibrationError(f"{path}: at least one token is required, but the array is empty; give another file")
    return Pool(str(path), streams=(array,)) if array.ndim == 1 else Pool(str(path), rows=array)


def _read_hub(name: str, documents: "_Documents", wanted: int, seed: int) -> Pool:
    for number, document in enumerate(_hub_rows(name, seed)):
        documents.add(document, f"{name}, row {number}")
        if documents.num_tokens >= wanted:
            break
    return documents.pool(1.0)


def _hub_rows(name: str, seed: int) -> Iterator[Any]:
    try:
        import datasets
    except ImportError as error:
        raise RequestError(
            f"{name}: the extra `datasets` is required to read a hub data set, but it is not installed; "
            "run pip install 'bitmend[datasets]'"
        ) from error
    dataset, configuration, split, *rest = [*name.removeprefix("hf:").split(":"), "", ""]
    if not dataset or any(rest):
        raise RequestError(f"{name}: hf:NAME[:CONFIG][:SPLIT] is required; give for example hf:Salesforce/wikitext")
    try:
        rows = datasets.load_dataset(dataset, configuration or None, split=split or "train", streaming=True)
        yield from rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    except QuantizationError:
        raise
    except Exception as error:  # the library raises whatever its readers, file systems and network stacks raise
        raise CalibrationError(
            f"{name}: a data set that can be read is required, but reading failed ({type(error).__name__}: {error}); "
            "check name, configuration, split and network"
        ) from error


class _Documents:
    """Collects documents: texts and conversations packed into one stream, token rows as they are.

    With a `row_length` each text is a row, too, at most that long.
    """

    def __init__(self, name: str, tokenizer: Any, row_length: int | None = None) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.row_length = row_length
        self.texts: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []
        self.num_tokens = 0

    def add(self, document: Any, where: str) -> None:
        """Encode one document; `where` names it in error sentences."""
        if isinstance(document, dict) and isinstance(document.get("text"), str):
            document = document["text"]
        if isinstance(document, str) and self.row_length is not None:
            row = self.tokenizer(document, truncation=True, max_length=self.row_length, verbose=False)["input_ids"]
            self._add_row(np.asarray(row, dtype=np.int64))
            return
        if isinstance(document, str):
            ids = self._close(self.tokenizer(document, verbose=False)["input_ids"])
        elif isinstance(document, dict) and isinstance(document.get("messages"), list):
            ids = self._conversation(document["messages"], where)
        elif isinstance(document, dict) and "input_ids" in document:
            self._add_row(_token_row(document["input_ids"], where))
            return
        else:
            keys = sorted(map(str, document)) if isinstance(document, dict) else type(document).__name__
            raise CalibrationError(
                f"{where}: a string or an object with `text`, `messages` or `input_ids` is required, but {keys} came; "
                "rename the field that holds the text to `text`"
            )
        self.texts.append(np.asarray(ids, dtype=np.int64))
        self.num_tokens += len(ids)

    def _add_row(self, row: np.ndarray) -> None:
        if len(row):  # a tokenizer without special tokens makes nothing of a text that it does not know
            self.rows.append(row)
            self.num_tokens += len(row)

    def pool(self, coverage: float) -> Pool:
        """Return everything added so far."""
        streams = (np.concatenate(self.texts),) if self.texts else ()
        return Pool(self.name, streams, self.rows, coverage)

    def _close(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or not ids or ids[-1] == end else [*ids, end]

    def _conversation(self, messages: list[Any], where: str) -> list[int]:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            reason = str(error).partition("\n")[0]
            raise CalibrationError(
                f"{where}: messages need a chat template that accepts them, but applying the tokenizer's failed "
                f"({reason}); give `text` instead, or a model with a chat template"
            ) from error


def _token_row(values: Any, where: str) -> np.ndarray:
    whole = isinstance(values, list) and all(type(value) is int and abs(value) < 2**63 for value in values)
    if not whole or not values:
        raise CalibrationError(
            f"{where}: `input_ids` must be a list of at least one whole number, but {str(values)[:40]} came; "
            "mend the row"
        )
    return np.array(values, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------- large files
def _pieces(path: Path, seed: int, line_limit: int) -> Iterator[tuple[int, bytes, float]]:
    """Yield (byte offset, bytes, share of the file): a small file at once, a large one in pieces in a seeded order."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            yield 0, file.read(), 1.0
            return
        starts = range(0, size, PIECE_BYTES)
        for index in torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed)).tolist():
            offset, raw = _read_piece(file, starts[index], min(starts[index] + PIECE_BYTES, size), line_limit)
            yield offset, raw, 1 / len(starts)


def _read_piece(file: BufferedIOBase, start: int, stop: int, line_limit: int) -> tuple[int, bytes]:
    """Return the lines that begin in `start..stop` and their byte offset, so that pieces hold each line once.

    Where no line ends within `line_limit` bytes (-1: no limit), the cut falls between two characters instead.
    """
    offset = start
    if start > 0:
        file.seek(start - 1)
        skipped = _rest_of_line(file, line_limit)
        offset = start - 1 + len(skipped) if skipped else start
    if offset >= stop:
        return offset, b""
    file.seek(offset)
    raw = file.read(stop - offset)
    if not raw.endswith(b"\n"):
        # One byte less than where the next piece looks, which begins a byte earlier: both must see the same line end.
        raw += _rest_of_line(file, line_limit - 1)
    if offset == start > 0:
        cut = len(raw) - len(raw.lstrip(_CONTINUATION))
        offset, raw = offset + cut, raw[cut:]
    return offset, raw if line_limit < 0 else without_cut_character(raw)


def _rest_of_line(file: BufferedIOBase, limit: int) -> bytes:
    """Return the bytes up to the next line end or the end of the file; none when it is more than `limit` bytes off."""
    line = file.readline(limit)
    return line if limit < 0 or len(line) < limit or line.endswith(b"\n") else b""


_CONTINUATION = bytes(range(0x80, 0xC0))  # the bytes of a UTF-8 character after its first


def without_cut_character(raw: bytes) -> bytes:
    """Drop an unfinished UTF-8 character from the end."""
    for length in range(1, min(4, len(raw)) + 1):
        lead = raw[-length]
        if lead & 0xC0 != 0x80:
            needed = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return raw[:-length] if needed > length else raw
    return raw
