"""Refuses a config that asks for more than its weight files could fill, before any memory or time is spent on it.

A config is a few lines from a stranger; with 10^7 layers or a width of 10^9 in it, transformers builds modules for hours or
asks for terabytes. The files bound what an honest config can ask for: a model has few more tensors than they hold, and a
stored byte holds at most a few weights.
"""

import json
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitmend.errors import CheckpointError

# Config classes of transformers make a list with an entry for each layer and a table with one for each label.
COUNTED = ("layer", "label", "block", "expert", "stage", "depth", "head", "group", "beam")
MOST_COUNTED = 100_000

# What a config may ask for beyond what is stored: heads that are not stored, ties, buffers, tables of positions; projections
# that are stored as one tensor and built as several; codes of one bit, eight to the byte.
FREE_TENSORS, TENSORS_PER_STORED = 1000, 4
FREE_VALUES, VALUES_PER_BYTE = 2**26, 16

_LONGEST_HEADER = 100_000_000


def refuse_special_files(folder: Path) -> None:
    """Refuse a model folder with a pipe, a socket or a device in it, or a link to one.

    Whoever opens a pipe waits for ever; /dev/zero has no end; and transformers opens what it finds under a known name.

    Raises:
        CheckpointError: names the file.
    """
    for path in [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]:
        with suppress(OSError, ValueError):  # a link to nowhere, or in a circle, can do no harm
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise CheckpointError(
                    f"{path} is a pipe or a device and no file; do not trust this folder, or remove it"
                )


@dataclass(frozen=True)
class Stored:
    """How much the weight files of a folder hold.

    Attributes:
        folder: where they lie.
        tensors: how many.
        num_bytes: of the files together.
    """

    folder: Path
    tensors: int
    num_bytes: int


def stored(folder: Path) -> Stored:
    """Return how much the safetensors or `.bin` files of a folder hold; headers that cannot be read count as empty.

    Raises:
        CheckpointError: a header that describes a tensor twice; the safetensors package takes the last description.

    Cost: reads headers only.
    """
    tensors = num_bytes = 0
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if path.is_file():
            size = path.stat().st_size
            num_bytes += size
            # In a pickled file, each tensor has a record of more than 60 bytes.
            tensors += _names(path, size) if path.suffix == ".safetensors" else size // 60
    return Stored(folder, tensors, num_bytes)


def check_counts(config: Mapping[str, Any], path: Path) -> None:
    """Refuse numbers in a config, as JSON gives it, that transformers would make endless lists for.

    Raises:
        CheckpointError: names the key.
    """
    rest: list[Any] = [config]
    while rest:
        table = rest.pop()
        rest += [
            value for value in (table.values() if isinstance(table, dict) else table) if isinstance(value, dict | list)
        ]
        for key, value in table.items() if isinstance(table, dict) else ():
            number = isinstance(value, int | float) and not abs(value) <= MOST_COUNTED
            if number and any(word in key.lower() for word in COUNTED):
                raise CheckpointError(
                    f"{path} asks for {key} = {value!r:.30}, at most {MOST_COUNTED} can be meant; give the config.json "
                    "that belongs to these weights"
                )


@contextmanager
def no_more_than(held: Stored) -> Iterator[None]:
    """Refuse, while a model is built inside, the parameter or buffer that makes it more than the files could fill.

    Only names and shapes count; build on the meta device, so that there is nothing to take back.

    Raises:
        CheckpointError: from inside the building.
    """
    original = nn.Module.register_parameter, nn.Module.register_buffer
    most_tensors = FREE_TENSORS + TENSORS_PER_STORED * held.tensors
    most_values = FREE_VALUES + VALUES_PER_BYTE * held.num_bytes
    tensors = values = 0

    def count(tensor: Tensor | None) -> None:
        nonlocal tensors, values
        if tensor is None:
            return
        tensors, values = tensors + 1, values + tensor.numel()
        if tensors > most_tensors or values > most_values:
            raise CheckpointError(
                f"the config.json of {held.folder} asks for a model of {tensors} or more tensors with {values} or more "
                f"values, but the weight files hold {held.tensors} tensors in {held.num_bytes} bytes; give the config.json "
                "that belongs to these weights"
            )

    def register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        count(param)
        original[0](module, name, param)

    def register_buffer(module: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        count(tensor)
        original[1](module, name, tensor, persistent)

    nn.Module.register_parameter, nn.Module.register_buffer = register_parameter, register_buffer  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = original  # type: ignore[method-assign]


def _names(path: Path, size: int) -> int:
    """Return how many entries the header of a file has, or 0 when it is none."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(_LONGEST_HEADER, size):
                return 0
            pairs = json.loads(file.read(length), object_pairs_hook=list)
    except (OSError, ValueError, TypeError, RecursionError, struct.error):
        return 0  # whoever reads the file says what is wrong with it
    names = [pair[0] for pair in pairs if isinstance(pair, tuple)] if isinstance(pairs, list) else []
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise CheckpointError(f"the header of {path} describes {twice!r} twice; copy or download it again")
    return len(names)
