"""safetensors files, byte by byte: 8 bytes of length, a JSON header, the tensors.

The `safetensors` package is used for reading tensors. This file exists because a checkpoint has to be put together
without ever holding more than a few megabytes of it, hashed while it is written, and judged by its header alone.
"""

import hashlib
import json
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitmend.errors import CheckpointError, is_whole_text
from bitmend.models.shards import DTYPES

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package itself
_CHUNK_BYTES = 4 << 20
# More sides than any tensor has, and longer than any: their product could not be computed in reasonable time.
_MOST_SIDES = 64
_LONGEST_SIDE = 2**63 - 1

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies in a file.

    Attributes:
        dtype: its type.
        shape: its shape.
        start: first byte, counted from the start of the file.
        stop: byte after the last one.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """How many bytes the tensor takes."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """How many entries the tensor has."""
        count = 1
        for side in self.shape:
            count *= side
        return count


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        tensors: name -> where it lies.
        header_bytes: length, header and padding: all that is not tensor.
        file_bytes: the whole file.
        metadata: the free text table.
    """

    tensors: Mapping[str, TensorRecord]
    header_bytes: int
    file_bytes: int
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Return the header of a file; no tensor is read.

    Raises:
        CheckpointError: anything but a well-formed file of exactly the announced length, without holes, overlaps or
            names that occur twice.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device be read for ever
            raise CheckpointError(f"{path} cannot be read: it is no regular file; copy or download it again")
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path} is no safetensors file, or is cut short: {file_bytes} bytes, bad header length"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    table = parse_json(_header_json(text, path), f"the header of {path}")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"the header of {path} has metadata that are not text")
    start = 8 + length
    tensors = {name: _record(path, name, item, start) for name, item in table.items()}
    _check_contiguous(path, tensors, start, file_bytes)
    return Header(tensors, start, file_bytes, metadata)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of some files under their names, each read when it is asked for.

    Raises:
        CheckpointError: a file is malformed.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = {name: file for file in files for name in read_header(file).tensors}
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            return self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def modules_with(records: Mapping[str, TensorRecord], leaves: Collection[str]) -> list[str]:
    """Return the modules that have a tensor of one of these names, each once, in the order of the files."""
    split = (key.rpartition(".") for key in records)
    return list(dict.fromkeys(module for module, _, leaf in split if leaf in leaves))


def expect_record(
    records: Mapping[str, TensorRecord], name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]
) -> TensorRecord:
    """Return the record of a tensor that must be there.

    Args:
        records: of all files.
        name: of the tensor.
        dtypes: the types that it may have.
        shape: the shape that it must have; None for a side of any length above 0.

    Raises:
        CheckpointError: it is missing, or has another type or shape.
    """
    record = records.get(name)
    if record is None:
        raise CheckpointError(f"the checkpoint lacks the tensor {name}; download it again")
    fits = len(record.shape) == len(shape) and all(
        side > 0 if wanted is None else side == wanted for side, wanted in zip(record.shape, shape, strict=True)
    )
    if record.dtype not in dtypes or not fits:
        types = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        sides = ", ".join("any" if side is None else str(side) for side in shape)
        raise CheckpointError(
            f"{name} must be {types} of shape ({sides}); got {str(record.dtype).removeprefix('torch.')} of shape "
            f"{record.shape}"
        )
    return record


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Return a JSON table.

    Raises:
        CheckpointError: not JSON, not a table, a key that occurs twice, or text that no file could hold again; the sentence
            begins with `what`.
    """

    def table_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key occurs twice")
        return table

    try:
        table = json.loads(text, object_pairs_hook=table_of)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{what} must be a JSON table; got {type(table).__name__}")
    if not is_whole_text(table):
        raise CheckpointError(f"{what} is not valid JSON: half of a character (a lone surrogate) stands in it")
    return table


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a new file. Memory: none beyond the tensors, when they are contiguous and on the host.

    Raises:
        OSError: as raised by the file system.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
    with path.open("xb") as file:
        file.write(header_text(plan, metadata))
        for tensor in ordered.values():
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            file.write(flat.numpy().data)
        sync(file)


def header_text(plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return length and header of a file with these tensors in this order.

    Readers view the data in place, so each tensor has to start on a multiple of its element size. The plan must
    therefore begin with the widest type; then the padding of the header to 8 bytes is all that is needed.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in plan.items():
        record = TensorRecord(dtype, shape, 0, 0)
        stop = offset + record.numel * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_hashed(path: Path, chunks: Iterable[bytes]) -> str:
    """Write chunks to a new file and return its sha256.

    Raises:
        OSError: as raised by the file system.
    """
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        sync(file)
    return digest.hexdigest()


def copy_chunks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes `start:stop` of a file, a few megabytes at a time.

    Raises:
        OSError: as raised by the file system, or when the file has become shorter.
    """
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            chunk = file.read(min(_CHUNK_BYTES, stop - start))
            if not chunk:
                raise OSError(f"{path} has become shorter while it was read")
            start += len(chunk)
            yield chunk


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file. Cost: reads all of it.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def sync(file: BinaryIO) -> None:
    """Make sure that what was written is on the disk, so that a rename never shows a file without its contents."""
    file.flush()
    os.fsync(file.fileno())


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Return the sentence for a file that the safetensors package does not read."""
    return CheckpointError(f"{path} cannot be read as safetensors ({error}); copy or download it again")


def _header_json(text: bytes, path: Path) -> str:
    """Return the header as text, as strictly as the safetensors package: UTF-8, and nothing before the first brace."""
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the header of {path} is not UTF-8; copy or download it again") from error
    if not decoded.startswith("{"):
        raise CheckpointError(f"the header of {path} does not begin with a brace; copy or download it again")
    return decoded


def _record(path: Path, name: str, item: Any, start: int) -> TensorRecord:
    match item:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(last)], **rest} if not rest:
            pass
        case _:
            raise CheckpointError(f"the header of {path} describes {name!r} wrongly: {item!r:.120}")
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} in {path} has the type {dtype!r}; known: {', '.join(DTYPES)}")
    if len(shape) > _MOST_SIDES or not all(type(side) is int and 0 <= side <= _LONGEST_SIDE for side in shape):
        raise CheckpointError(f"{name} in {path} has an impossible shape: {shape!r:.120}")
    record = TensorRecord(DTYPES[dtype], tuple(shape), start + first, start + last)
    if not 0 <= first <= last <= _LONGEST_SIDE:
        raise CheckpointError(f"{name} in {path} lies at impossible offsets: {[first, last]!r:.120}")
    if record.num_bytes != record.numel * record.dtype.itemsize:
        raise CheckpointError(
            f"{name} in {path} has {record.num_bytes} bytes, but {dtype} of shape {shape!r:.120} takes "
            f"{record.numel * record.dtype.itemsize}"
        )
    return record


def _check_contiguous(path: Path, tensors: Mapping[str, TensorRecord], start: int, file_bytes: int) -> None:
    position = start
    for name, record in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if record.start != position:
            raise CheckpointError(f"{name} in {path} starts at byte {record.start} instead of {position}")
        position = record.stop
    if position != file_bytes:
        raise CheckpointError(
            f"{path} has {file_bytes} bytes, its header announces {position}; it is cut short or altered"
        )
