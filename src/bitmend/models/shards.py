"""The tensors of a model folder, read one at a time.

The list of tensors comes from the headers of the files, so that a file that is cut short or does not match its index is
refused before any work starts, whatever the size of the model.
"""

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitmend.errors import CheckpointError, ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor.

    Attributes:
        file: that holds it.
        shape: of the tensor.
        dtype: of the tensor.
        start: first byte of its values in a safetensors file; meaningless for others.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def part(self, index: int) -> "StoredTensor":
        """Return one part along the first dimension."""
        one = replace(self, shape=self.shape[1:])
        return replace(one, start=self.start + index * one.num_bytes)


class ShardedWeights:
    """The tensors of `model.safetensors`, of indexed shards, or of `pytorch_model.bin`.

    Nothing is held in memory but the headers (and, for a `.bin` file, its memory map).
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            ModelError: the folder holds no weights that can be read.
            CheckpointError: a file is missing, cut short or at odds with the index.
        """
        self.folder = folder
        self._mapped: dict[str, Tensor] = {}
        if (folder / INDEX_FILE).is_file():
            self._table = _read_index(folder)
        elif (folder / SINGLE_FILE).is_file():
            self._table = _read_header(folder / SINGLE_FILE)
        elif (folder / PICKLED_FILE).is_file():
            self._mapped = _map_pickled(folder / PICKLED_FILE)
            self._table = {
                name: StoredTensor(folder / PICKLED_FILE, tuple(tensor.shape), tensor.dtype)
                for name, tensor in self._mapped.items()
            }
        else:
            raise ModelError(
                f"{folder} holds no weights: need {SINGLE_FILE}, {INDEX_FILE} with its shards, or {PICKLED_FILE}; "
                "give a folder written by save_pretrained"
            )

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors, as in the files."""
        return tuple(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __len__(self) -> int:
        return len(self._table)

    def get(self, name: str, part: int | None = None) -> Tensor:
        """Read one tensor, or one part along its first dimension.

        That of a `.bin` file shares memory with the file: see `shares_memory`.
        """
        stored = self._entry(name)
        if name in self._mapped:
            return self._mapped[name] if part is None else self._mapped[name][part]
        try:
            return _read_values(stored if part is None else stored.part(part))
        except OSError as error:
            raise CheckpointError(
                f"{stored.file} could not be read at tensor {name} ({error}); copy it again"
            ) from error

    @property
    def shares_memory(self) -> bool:
        """Whether `get` hands out parts of a mapped file, to be copied before they are changed."""
        return bool(self._mapped)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the header states."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that the header states."""
        return self._entry(name).dtype

    @property
    def floating_dtype(self) -> torch.dtype:
        """The dtype in which most of the model's values are stored, float32 when there are none."""
        totals: dict[torch.dtype, int] = {}
        for stored in self._table.values():
            # torch cannot compute in the 8-bit types, so they are no dtype for a model
            if stored.dtype.is_floating_point and stored.dtype.itemsize > 1:
                totals[stored.dtype] = totals.get(stored.dtype, 0) + stored.num_bytes
        return max(totals, key=lambda dtype: totals[dtype], default=torch.float32)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together, headers apart."""
        return sum(stored.num_bytes for stored in self._table.values())

    def _entry(self, name: str) -> StoredTensor:
        if name not in self._table:
            raise CheckpointError(f"{self.folder} holds no tensor called {name}; give the complete model")
        return self._table[name]


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (the handle is no dict)
            starts = _starts(path)
            return {name: _stored(path, name, piece, starts[name]) for name, piece in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it may be cut short, so copy or download it again"
        ) from error


def _starts(path: Path) -> dict[str, int]:
    """Return where the values of each tensor begin, of a file that safetensors has found to be whole."""
    with path.open("rb") as file:
        length: int = struct.unpack("<Q", file.read(8))[0]
        table = json.loads(file.read(length))
    return {name: 8 + length + item["data_offsets"][0] for name, item in table.items() if name != "__metadata__"}


def _read_values(stored: StoredTensor) -> Tensor:
    """Read straight into the tensor's own memory.

    Not through `safe_open`, which parses the whole header again for each tensor (quadratic in the number of tensors) and
    maps the file, so that what has been read counts as memory of this process for as long as the map lives.
    """
    raw = torch.empty(stored.num_bytes, dtype=torch.uint8)
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.start)
        into, done = raw.numpy().data, 0
        while done < len(into):
            count = file.readinto(into[done:])
            if not count:
                raise OSError(f"the file ends {len(into) - done} bytes too early")
            done += count
    return raw.view(stored.dtype).reshape(stored.shape)


def _stored(path: Path, name: str, piece: Any, start: int) -> StoredTensor:
    code = piece.get_dtype()
    if code not in DTYPES:
        raise CheckpointError(
            f"tensor {name} in {path} is of type {code}, need one of {', '.join(DTYPES)}; give a bf16 model"
        )
    return StoredTensor(path, tuple(piece.get_shape()), DTYPES[code], start)


def check_index(folder: Path) -> None:
    """Check that an index, where there is one, names files of its own folder only.

    For readers other than this one: transformers opens whatever the index names.

    Raises:
        CheckpointError: it does not, or it is no index.
    """
    if (folder / INDEX_FILE).is_file():
        for shard in set(_weight_map(folder / INDEX_FILE).values()):
            _shard_path(folder, shard)


def _read_index(folder: Path) -> dict[str, StoredTensor]:
    weight_map = _weight_map(folder / INDEX_FILE)
    headers = {shard: _read_header(_shard_path(folder, shard)) for shard in dict.fromkeys(weight_map.values())}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{INDEX_FILE} says that {name} is in {shard}, but that file does not hold it; "
                f"copy {shard} again or give the index that belongs to it"
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); copy it again") from error
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()) or not found:
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names; copy it again")
    return found


def _shard_path(folder: Path, shard: str) -> Path:
    # The index comes from a stranger: it may name files of its own folder and nothing else.
    relative = PurePosixPath(shard)
    if relative.is_absolute() or ".." in relative.parts or "\\" in shard or ":" in shard:
        raise CheckpointError(
            f"{INDEX_FILE} names the shard {shard!r}, need a path inside {folder}; do not trust this folder"
        )
    if relative.suffix != ".safetensors":
        raise CheckpointError(f"{INDEX_FILE} names the shard {shard!r}, need a .safetensors file; copy the index again")
    path = folder / relative
    try:
        missing = not path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        missing = True
    if missing:
        raise CheckpointError(
            f"{INDEX_FILE} names the shard {shard}, which is missing from {folder}; download it again"
        )
    return path


def _map_pickled(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load fails with anything from EOFError to UnpicklingError
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} could not be read as plain tensors ({reason}); convert the model to safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise CheckpointError(f"{path} is not a flat dictionary of tensors; convert the model to safetensors")
    return loaded
