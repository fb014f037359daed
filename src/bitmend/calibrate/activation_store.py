"""Activations of the calibration rows, one tensor a batch, in memory or on disk.

On disk each tensor is one file of raw bytes, written with plain writes and read through a private memory map: the pages
belong to the file, so the kernel can drop them, and the process holds no memory of its own for them. Writing through a
map would be shorter, but a full disk would then kill the process (SIGBUS) where a write gives an error.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from bitmend.errors import OutputError

WRITE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class _Stored:
    """Where one tensor is: `values` in memory, or the file at `path`."""

    shape: torch.Size
    dtype: torch.dtype
    values: Tensor | None
    path: Path | None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        if self.values is not None:
            return self.values
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        # Private: a reader that writes to the tensor in error changes its own copy of the page, not the store.
        raw = torch.from_file(str(self.path), shared=False, size=self.nbytes, dtype=torch.uint8)
        return raw.view(self.dtype).reshape(self.shape)


class ActivationStore:
    """A list of tensors of any floating or integer dtype, kept bit for bit.

    Tensors that it hands out are on the CPU and must be treated as read-only; `replace_` changes one. As a context
    manager it closes itself at the end.

    Cost: in memory the tensors' own bytes. On disk the same bytes in files; a read maps the file and copies nothing.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """Make an empty store.

        Args:
            directory: where to keep the tensors, made if it is missing; several stores may share it. None: in memory.

        Raises:
            OutputError: the directory cannot be written.
        """
        self._stored: list[_Stored] = []
        self._folder: Path | None = None
        self._closed = False
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=directory))
            except OSError as error:
                raise OutputError(
                    f"activation store: a folder that can be written is required, but {directory} is not "
                    f"({error.strerror}); give another folder"
                ) from error
            # Also runs when the store is dropped or the interpreter ends, after Ctrl-C for instance.
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    @property
    def where(self) -> Literal["memory", "disk"]:
        """Where the tensors are kept."""
        return "memory" if self._folder is None else "disk"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the store."""
        return sum(stored.nbytes for stored in self._stored)

    def append(self, tensor: Tensor) -> None:
        """Add a copy of `tensor`, from any device.

        Raises:
            OutputError: the disk is full or fails.
        """
        self._check_open()
        self._stored.append(self._store(len(self._stored), tensor))

    def replace_(self, index: int, tensor: Tensor) -> None:
        """Put a copy of `tensor` in place of the tensor at `index`; its shape and dtype may differ.

        Tensors handed out before keep their values. When the write fails, the old tensor stays.

        Raises:
            OutputError: the disk is full or fails.
        """
        self._check_open()
        position = range(len(self._stored))[index]
        self._stored[position] = self._store(position, tensor)

    def close(self) -> None:
        """Forget all tensors and delete their files; may be called twice."""
        self._stored.clear()
        self._closed = True
        if self._folder is not None:
            self._remove()

    def _store(self, position: int, tensor: Tensor) -> _Stored:
        if self._folder is None:
            # A copy, so that neither a later write to `tensor` nor a large storage behind a small view comes along.
            values = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            return _Stored(tensor.shape, tensor.dtype, values, None)
        path = self._folder / f"{position:06d}"
        _write_and_rename(path, tensor.detach())
        return _Stored(tensor.shape, tensor.dtype, None, path)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the activation store is closed")

    def __getitem__(self, index: int) -> Tensor:
        self._check_open()
        return self._stored[index].read()

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(len(self)):
            yield self[index]

    def __len__(self) -> int:
        return len(self._stored)

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write_and_rename(path: Path, tensor: Tensor) -> None:
    temporary = path.with_suffix(".tmp")
    raw = tensor.contiguous().flatten().view(torch.uint8)
    try:
        with temporary.open("wb") as file:
            for piece in torch.split(raw, WRITE_BYTES):
                file.write(piece.cpu().numpy().data)
        # The old file lives on for tensors that still map it.
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"activation store: {raw.numel():,} more bytes are required in {path.parent}, but writing failed "
            f"({error.strerror}); free some space, or give a folder on another disk"
        ) from error
