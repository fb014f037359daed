"""Judges a checkpoint before a single tensor of it is allocated.

In the order of cost: the files are well-formed safetensors of the announced length; the tensors of every quantised
module are there, with the types and shapes that the manifest implies, and no stray ones; the bytes have the checksums
that the manifest gives (left out with `verify=False`, or when the manifest has none because transformers saved the
model again).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitmend.errors import CheckpointError
from bitmend.formats.manifest import QUANT_METHOD, Manifest
from bitmend.formats.native import site_shapes
from bitmend.formats.safetensors_file import TensorRecord, parse_json, read_header, sha256_of
from bitmend.formats.writer import INDEX_FILE, SINGLE_FILE
from bitmend.models.bounds import refuse_special_files
from bitmend.runtime.packed import SCALE, WORDS, ZERO_WORDS


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder.

    Raises:
        CheckpointError: no such folder, no (valid) config.json in it, or something that is no file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no finished model folder: it has no config.json")
    refuse_special_files(folder)
    return parse_json(path.read_bytes(), str(path))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder: the single one, or those that the index names.

    Raises:
        CheckpointError: none, an index that is broken, or one that names a file outside the folder or a missing one.
    """
    folder = Path(folder)
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = parse_json(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} must map tensor names to file names in weight_map")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != folder or not _is_file(file):
            raise CheckpointError(f"{index} names the weight file {file.name!r}, which is not in {folder}")
    records = read_records(files)
    strays = sorted(set(weight_map) ^ set(records))
    if strays:
        raise CheckpointError(f"{index} and the weight files disagree about {strays[0]!r}")
    return files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def read_records(files: Iterable[Path]) -> dict[str, TensorRecord]:
    """Return where every tensor of some weight files lies.

    Raises:
        CheckpointError: a file that is malformed, or a tensor that is in two files.
    """
    records: dict[str, TensorRecord] = {}
    for file in files:
        header = read_header(file)
        twice = sorted(set(records).intersection(header.tensors))
        if twice:
            raise CheckpointError(f"{file} repeats the tensor {twice[0]!r} of another weight file")
        records |= header.tensors
    return records


def check_folder(folder: Path) -> None:
    """Judge a whole model folder: in bitmend's own format everything, in another that the files are well-formed.

    Raises:
        CheckpointError: as `check_files`, or packed codes without a description of them.

    Cost: reads every byte of a bitmend checkpoint, for the checksums.
    """
    config, files = read_config(folder), weight_files(folder)
    described = config.get("quantization_config")
    if isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD:
        check_files(files, Manifest.from_json(described))
        return
    packed = [name for name in read_records(files) if name.endswith(f".{WORDS}")]
    if packed and not described:
        raise CheckpointError(
            f"{folder} holds packed codes ({packed[0]}), but its config.json has no quantization_config that says how to "
            "read them; copy config.json again"
        )


def check_files(files: Iterable[Path], manifest: Manifest, *, verify: bool = True) -> dict[str, TensorRecord]:
    """Check weight files against their manifest and return where every tensor lies.

    Args:
        files: all weight files of the checkpoint.
        manifest: from its config.json.
        verify: compare checksums too, which reads every byte.

    Raises:
        CheckpointError: anything that does not agree; one sentence, the first found.
    """
    files = list(files)
    records = read_records(files)
    _check_tensors(records, manifest)
    if manifest.files:
        _check_names(files, manifest)
        if verify:
            for file in files:
                if sha256_of(file) != manifest.files[file.name]:
                    raise CheckpointError(
                        f"the bytes of {file} are not those that were written (sha256 differs from config.json); "
                        f"copy or download the file again"
                    )
    return records


def _check_tensors(records: Mapping[str, TensorRecord], manifest: Manifest) -> None:
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, entry in manifest.modules.items():
        if f"{name}.weight" in records:
            raise CheckpointError(f"{name} is quantised by the manifest, but the file also holds {name}.weight")
        expected |= site_shapes(name, entry)
    for key, (dtype, shape) in expected.items():
        record = records.get(key)
        if record is None:
            raise CheckpointError(f"the checkpoint lacks {key}, which its manifest announces")
        if (record.dtype, record.shape) != (dtype, shape):
            raise CheckpointError(
                f"{key} must be {dtype} of shape {shape} by the manifest; the file has {record.dtype} of {record.shape}"
            )
    for key in records:
        if key.rpartition(".")[2] in (WORDS, SCALE, ZERO_WORDS) and key not in expected:
            raise CheckpointError(f"the file holds {key}, which its manifest does not announce")


def _check_names(files: Iterable[Path], manifest: Manifest) -> None:
    differing = sorted({file.name for file in files} ^ set(manifest.files))
    if differing:
        raise CheckpointError(f"the manifest and the folder disagree about the weight file {differing[0]!r}")
