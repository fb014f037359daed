"""A file of tensors and plain values that is either whole or not believed.

It is a safetensors file whose metadata hold a JSON table and a SHA-256 over that table and all tensors. It is written under
another name, brought to the disk and then renamed, so that a killed process leaves either all of it or a `.tmp` file that
nobody reads; what a bad disk or a careless hand does to it later, the checksum tells.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitmend.errors import CheckpointError
from bitmend.formats.safetensors_file import parse_json, read_header, sync, unreadable, write_tensors

TEMPORARY = ".tmp"


def write_record(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a record in one step, in place of an older one of that name.

    Args:
        path: the file to be; its folder must exist.
        tensors: from any device.
        values: what JSON holds, NaN and infinities too.

    Raises:
        OSError: as raised by the file system; an older record stays.

    Cost: one pass over the bytes for the checksum, one to write them, and a wait for the disk.
    """
    text = json.dumps(values)
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)  # of a process that was killed here before
    with _whole_or_not(temporary, path):
        write_tensors(temporary, tensors, {"record": text, "sha256": _digest(tensors, text)})


def read_record(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and values of a record.

    Raises:
        CheckpointError: the file is missing, cut short, altered or no record.
    """
    header = read_header(path)
    text, digest = header.metadata.get("record"), header.metadata.get("sha256")
    if text is None or digest is None:
        raise CheckpointError(f"{path} is a safetensors file, but no record that bitmend wrote")
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: the file may be replaced while its tensors are in use.
            tensors = {name: file.get_tensor(name).clone() for name in header.tensors}
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error
    if _digest(tensors, text) != digest:
        raise CheckpointError(f"the bytes of {path} are not those that were written (its sha256 differs)")
    return tensors, parse_json(text, f"the record in {path}")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON table in one step, in place of an older one.

    Raises:
        OSError: as raised by the file system; an older file stays.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)  # as above; and nothing is written through a link of that name
    with _whole_or_not(temporary, path), temporary.open("xb") as file:
        file.write((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
        sync(file)


@contextmanager
def _whole_or_not(temporary: Path, path: Path) -> Iterator[None]:
    """Give a file that has been written and synced its name; remove it on an error or Ctrl-C."""
    try:
        yield
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk, where the file system can; without it a power cut may cost this one record."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
