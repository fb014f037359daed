"""Writes a complete model folder piece by piece, in bounded memory, so that it is either whole or not there.

Work lives in `OUTPUT.partial/`: each finished block goes at once to `parts/NNNN.safetensors`, and `finish` puts the
shards together in `model/`, adds the files that make a folder a model, writes config.json last and renames `model/` to
OUTPUT. Until that rename nothing exists under the name OUTPUT (or the old OUTPUT is untouched), and the parts are all
there, so that a run which is killed at any moment can be gone on with. The partial folder is locked: a second run on the
same output is refused.
"""

import errno
import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmend.errors import CheckpointError, OutputError, RequestError
from bitmend.formats.folder_lock import FolderLock
from bitmend.formats.ledger import ledger_of
from bitmend.formats.record import write_record
from bitmend.formats.safetensors_file import (
    TensorRecord,
    copy_chunks,
    header_text,
    parse_json,
    read_header,
    sync,
    write_hashed,
)

MAX_SHARD_BYTES = 5_000_000_000
PARTIAL_SUFFIX = ".partial"
PARTS = "parts"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What makes a folder a usable model beside its weights. A list of what is wanted, not of what is not: a source folder
# may hold weights of any name.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "vocab.bpe", "encoder.json", "merges.txt", "bpe.codes", "*.model", "*.tiktoken", "chat_template.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
    "2_Dense/config.json", "2_Dense/model.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class _Piece:
    """One tensor in one part file."""

    name: str
    path: Path
    record: TensorRecord


class CheckpointWriter:
    """Writes one output folder; see the module.

    Use it as a context manager: leaving the `with` block ends the lock, and by an error removes the partial folder,
    unless the writer is resumable.
    """

    def __init__(
        self,
        source_folder: Path,
        output: Path,
        overwrite: bool = False,
        *,
        resumable: bool = False,
        resume: bool = False,
    ) -> None:
        """Check the request, make the partial folder and lock it.

        Args:
            source_folder: the model whose config.json, tokenizer and so on are taken over.
            output: the folder to be.
            overwrite: replace an existing OUTPUT (at the very end) and an abandoned partial folder (now).
            resumable: errors leave the partial folder, for a later run to go on with; `abort` removes it.
            resume: keep the parts of an abandoned partial folder, to be taken over by `adopt`. Whether they belong to this
                run is for the caller to check.

        Raises:
            RequestError: no config.json in the source; OUTPUT or its partial folder exists without `overwrite` or
                `resume`, or is no model folder; OUTPUT and the source lie inside each other; the parent cannot be written;
                another run is writing the same output.
        """
        self.source, self.output = Path(source_folder), Path(output).resolve()
        self.partial = partial_folder(self.output)
        self._resumable = resumable
        self._names: set[str] = set()
        self._parts: list[Path] = []
        self._max_shard_bytes = MAX_SHARD_BYTES
        check_output(self.source, self.output, overwrite, resumable=resumable, resume=resume)
        self._lock = self._make_partial(keep=resume)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None and not self._resumable:
            self.abort()
        self._lock.release()

    @property
    def next_part(self) -> Path:
        """Where the next part lies, or will lie."""
        return self.partial / PARTS / f"{len(self._parts):04d}.safetensors"

    def add(self, name_of_part: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None = None) -> None:
        """Write one part (a block, or the tensors outside the blocks) to disk now, in one step.

        Args:
            name_of_part: kept in the part as `part`.
            tensors: under their names in the final file.
            values: what else to keep in the part; JSON.

        Raises:
            ValueError: a tensor name that an earlier part has used.
            OutputError: the disk is full or fails; the partial folder is removed, unless the writer is resumable.
        """
        taken = sorted(self._names.intersection(tensors))
        if taken:
            raise ValueError(f"part {name_of_part!r} repeats the tensor {taken[0]!r}")
        path = self.next_part
        with self._telling_what_failed():
            write_record(path, tensors, {"part": name_of_part, **(values or {})})
        self._names.update(tensors)
        self._parts.append(path)

    def adopt(self) -> None:
        """Take over the part at `next_part`, which an earlier run has written and the caller has read and checked.

        Raises:
            CheckpointError: the part is malformed.
        """
        self._names.update(read_header(self.next_part).tensors)
        self._parts.append(self.next_part)

    def finish(
        self,
        quantization_config: Mapping[str, Any] | None,
        documents: Mapping[str, str | Mapping[str, Any]],
        *,
        base: Mapping[str, Any] | None = None,
        config_changes: Mapping[str, Any] | None = None,
        check: Callable[[Path], object] | None = None,
        without: Container[str] = (),
    ) -> Path:
        """Assemble the folder and rename it to OUTPUT.

        Args:
            quantization_config: goes into config.json; in bitmend's own format `files` is filled with checksums. None
                removes the source's one.
            documents: further files, name -> text or JSON, such as run.json and recipe.toml. ledger.json is made here.
            base: config.json of the model, where it is only a part of the source; None for the source's own.
            config_changes: other keys of config.json to set.
            check: called with the complete folder just before the rename; what it raises ends the write.
            without: names of tensors that are left out after all.

        Returns:
            The output folder.

        Raises:
            OutputError: the disk is full or fails; the partial folder is removed, unless the writer is resumable.

        Cost: the tensors are on disk twice until the rename; a few megabytes of memory.
        """
        with self._telling_what_failed():
            shutil.rmtree(self._model, ignore_errors=True)  # half of it, by a run that was killed in here
            self._model.mkdir()
            digests = self._write_shards(without)
            config = self._final_config(quantization_config, digests, base, config_changes or {})
            self._copy_companions()
            for name, content in documents.items():
                self._write_document(name, content)
            headers = {name: read_header(self._model / name) for name in digests}
            self._write_document("ledger.json", ledger_of(headers, config, self._model).to_json())
            self._write_document("config.json", config)
            if check is not None:
                check(self._model)
            self._rename()
        self.abort()  # OUTPUT is there; what is left is in nobody's way
        return self.output

    def abort(self) -> None:
        """Remove the partial folder; OUTPUT stays as it is.

        The journal goes last: whoever is killed in here leaves a folder that still says which run it belongs to.
        """
        for folder in (self._model, self.partial / PARTS):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for path in self.partial.glob("*/*.safetensors*"):
                path.unlink()
        shutil.rmtree(self.partial, ignore_errors=True)

    @property
    def _model(self) -> Path:
        return self.partial / "model"

    # ------------------------------------------------------------------------------------------ before the first byte
    def _make_partial(self, keep: bool) -> FolderLock:
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self.partial)
            for path in [] if keep else list(self.partial.iterdir()):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            (self.partial / PARTS).mkdir(exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise RequestError(f"the output folder {self.partial} cannot be made: {reason}; choose another") from error
        return lock

    # ------------------------------------------------------------------------------------------ shards
    def _write_shards(self, without: Container[str] = ()) -> dict[str, str]:
        pieces = (piece for piece in self._pieces() if piece.name not in without)
        shards = list(_split(pieces, self._max_shard_bytes))
        digests: dict[str, str] = {}
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            digests[name] = write_hashed(self._model / name, _shard_bytes(shard))
            weight_map |= dict.fromkeys((piece.name for piece in shard), name)
        if len(shards) > 1:
            total = sum(piece.record.num_bytes for shard in shards for piece in shard)
            self._write_document(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return digests

    def _pieces(self) -> Iterator[_Piece]:
        for path in self._parts:
            for name, record in read_header(path).tensors.items():
                yield _Piece(name, path, record)

    # ------------------------------------------------------------------------------------------ the other files
    def _final_config(
        self,
        quantization_config: Mapping[str, Any] | None,
        digests: Mapping[str, str],
        base: Mapping[str, Any] | None,
        changes: Mapping[str, Any],
    ) -> dict[str, Any]:
        path = self.source / "config.json"
        config = parse_json(path.read_bytes(), str(path)) if base is None else dict(base)
        config.pop("quantization_config", None)
        config |= changes
        if quantization_config is not None:
            config["quantization_config"] = dict(quantization_config)
            if "files" in quantization_config:
                config["quantization_config"]["files"] = dict(digests)
        return config

    def _copy_companions(self) -> None:
        for found in companions(self.source):
            target = self._model / found.relative_to(self.source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(found, target)  # follows links: a hub cache holds nothing else

    def _write_document(self, name: str, content: str | Mapping[str, Any]) -> None:
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        with (self._model / name).open("wb") as file:
            file.write(text.encode())
            sync(file)

    # ------------------------------------------------------------------------------------------ the end
    def _rename(self) -> None:
        if not self.output.exists():
            self._model.replace(self.output)
            return
        # A folder cannot be replaced in one step; the old one is put aside, and back when the second step fails.
        aside = replaced_folder(self.output)
        shutil.rmtree(aside, ignore_errors=True)
        self.output.replace(aside)
        try:
            self._model.replace(self.output)
        except BaseException:  # Ctrl-C, too
            aside.replace(self.output)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _telling_what_failed(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._resumable:
                self.abort()
            if isinstance(error, OSError):
                raise output_error(self.output, error) from error
            raise


def output_error(output: Path, error: OSError) -> OutputError:
    """Return the sentence for a file system that refuses to write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk of {output} is full; free some space and run again")
    return OutputError(f"writing {output} failed: {error.strerror or error}")


def replaced_folder(output: Path) -> Path:
    """Return where the model that `output` was before lies while it is replaced."""
    return output.with_name(output.name + ".replaced")


def partial_folder(output: Path) -> Path:
    """Return where the work on `output` lives until it is whole."""
    return output.with_name(output.name + PARTIAL_SUFFIX)


def companions(source: Path) -> Iterator[Path]:
    """Yield the files of a model folder, beside weights and config, that a checkpoint takes over."""
    for pattern in COMPANIONS:
        for found in sorted(source.glob(pattern)):
            if found.is_file():
                yield found


def check_output(
    source_folder: Path, output: Path, overwrite: bool, *, resumable: bool = False, resume: bool = False
) -> None:
    """Check whether a checkpoint could be written, without writing anything.

    Args:
        source_folder: the model that is read.
        output: the folder to be.
        overwrite: replace an existing OUTPUT and an abandoned partial folder.
        resumable: the sentences may offer `--resume`.
        resume: go on with an abandoned partial folder, or find OUTPUT finished.

    Raises:
        RequestError: as the constructor of `CheckpointWriter`, apart from a parent that cannot be written.
    """
    if not (source_folder / "config.json").is_file():
        raise RequestError(f"the model folder {source_folder} has no config.json")
    source, output = source_folder.resolve(), output.resolve()
    partial = partial_folder(output)
    for folder in (output, partial):
        if source == folder or source in folder.parents or folder in source.parents:
            raise RequestError(f"the output {folder} must lie outside the model folder {source}; choose another")
    if resume and overwrite:
        raise RequestError("--resume goes on with a run and --overwrite replaces it; pass one of them")
    for folder in (output, partial):
        if folder.exists() and not folder.is_dir():
            raise RequestError(f"the output {folder} is a file; choose another name")
    for folder in (output, partial):
        if folder.exists() and not overwrite and not resume:
            what = "exists" if folder == output else "exists, left by a stopped run or in use by one under way"
            ways = "pass --resume to go on with it, or --overwrite" if resumable else "or pass --overwrite"
            raise RequestError(f"{folder} {what}; choose another output, {ways} to replace it")
    # A slip of the finger must not delete somebody's home folder.
    if output.exists() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise RequestError(f"{output} is not empty and holds no model, so it is not replaced; choose another")


def _split(pieces: Iterable[_Piece], limit: int) -> Iterator[list[_Piece]]:
    """Yield the pieces of each shard; a single tensor above the limit gets a shard of its own."""
    shard: list[_Piece] = []
    size = 0
    for piece in pieces:
        if shard and size + piece.record.num_bytes > limit:
            yield _widest_first(shard)
            shard, size = [], 0
        shard.append(piece)
        size += piece.record.num_bytes
    if not shard:
        raise CheckpointError("a checkpoint needs at least one tensor; no part was added")
    yield _widest_first(shard)


def _widest_first(shard: list[_Piece]) -> list[_Piece]:
    return sorted(shard, key=lambda piece: -piece.record.dtype.itemsize)


def _shard_bytes(shard: list[_Piece]) -> Iterator[bytes]:
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        piece.name: (piece.record.dtype, piece.record.shape) for piece in shard
    }
    yield header_text(plan, {"format": "pt"})
    for piece in shard:
        yield from copy_chunks(piece.path, piece.record.start, piece.record.stop)
