"""Tensors of reference models, kept on disk between evaluations.

An entry is one safetensors file, named by a digest of everything that its content depends on, written under another
name first and then renamed. The folder is bounded: entries used longest ago are removed first. The cache is a
convenience: whatever goes wrong with it is said, and the work is done without it.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

LIMIT_BYTES = 4 * 2**30
STALE_SECONDS = 24 * 3600


def default_folder() -> Path:
    """Return `$BITMEND_CACHE`, else `$XDG_CACHE_HOME/bitmend`, else `~/.cache/bitmend`."""
    if own := os.environ.get("BITMEND_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "bitmend"


def digest_of(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ReferenceCache:
    """The entries of one folder.

    Attributes:
        folder: where they lie; made when the first is stored.
        say: gets a line when an entry is damaged or cannot be stored.
        limit_bytes: the most that all entries may take together.
    """

    folder: Path
    say: Callable[[str], None]
    limit_bytes: int = LIMIT_BYTES

    def load(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors stored under `key`, or None when there are none or their checksum is wrong."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the handle is no dict)
                expected = (file.metadata() or {}).get("sha256")
            os.utime(path)
        except (SafetensorError, OSError, ValueError) as error:
            self.say(f"the cached reference {path} cannot be read ({error}) and is computed again")
            return None
        if checksum(tensors) != expected:
            self.say(f"the cached reference {path} is damaged and is computed again")
            return None
        return tensors

    def store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under `key`, and remove old entries beyond the limit."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.limit_bytes:
            self.say(f"the reference's {size:,} bytes are not cached: the limit is {self.limit_bytes:,} bytes")
            return
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(plain, temporary, metadata={"sha256": checksum(plain)})
            temporary.replace(path)
            self._shrink(keep=path)
        except (SafetensorError, OSError) as error:
            with suppress(OSError):
                temporary.unlink()
            self.say(f"the reference is not cached: {self.folder} cannot be written ({error})")

    def _path(self, key: str) -> Path:
        return self.folder / f"reference-{key}.safetensors"

    def _shrink(self, keep: Path) -> None:
        for path in self.folder.glob("reference-*.tmp"):  # left by killed processes; a fresh one may be in use
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)
        entries = [(path, path.stat()) for path in self.folder.glob("reference-*.safetensors") if path != keep]
        total = keep.stat().st_size + sum(status.st_size for _, status in entries)
        for path, status in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
            if total <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            total -= status.st_size


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
