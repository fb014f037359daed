"""What the numbers of a run depend on: under an equal fingerprint two runs write the same tensors, bit for bit.

Recipe, model and calibration rows decide what is computed; versions, device and thread count decide in which order sums
are taken, hence the last bits, hence now and then a code.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bitmend.calibrate.data import CalibrationSet
from bitmend.calibrate.images import ImageSet
from bitmend.formats.writer import INDEX_FILE, companions
from bitmend.models.fingerprint import model_fingerprint
from bitmend.numerics import products
from bitmend.pipeline.recipe import Recipe

# In the words of the sentence that says what differs, in this order.
PARTS = ("recipe", "model", "calibration rows", "versions", "device kind", "thread count")
DIGESTS = PARTS[:3]


def fingerprint_of(
    recipe: Recipe,
    folder: Path,
    rows: CalibrationSet | ImageSet | None,
    versions: Mapping[str, str],
    device: torch.device,
    tower: str | None = None,
) -> dict[str, str]:
    """Return the fingerprint of a run, a short text for each of `PARTS`.

    Args:
        recipe: what is to be done.
        folder: the model; of weights above 2 GB only names, shapes, sizes and times of change count.
        rows: the calibration rows; None without.
        versions: of all packages that have a part in the result.
        device: where blocks run.
        tower: which part of a model with two towers; None for a whole model.

    Cost: reads weights of up to 2 GB once, about a second a gigabyte.
    """
    values = (
        _sha256(recipe.model_dump(mode="json", exclude_none=True)),
        _model(folder) + (f" {tower}" if tower else ""),
        "none" if rows is None else rows.fingerprint,
        ", ".join(f"{package} {versions[package]}" for package in sorted(versions)),
        _device_kind(device),
        str(torch.get_num_threads()),
    )
    return dict(zip(PARTS, values, strict=True))


def differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Return which parts of two fingerprints differ, in words; empty when they are equal."""
    return [
        _difference(part, found.get(part, "unknown"), wanted[part]) for part in PARTS if found.get(part) != wanted[part]
    ]


def _difference(part: str, found: str, wanted: str) -> str:
    if part in DIGESTS:
        return part
    here, now = found.split(", "), wanted.split(", ")
    old = ", ".join(item for item in here if item not in now) or "fewer"
    new = ", ".join(item for item in now if item not in here) or "fewer"
    return f"{part} ({old}, now {new})"


def _model(folder: Path) -> str:
    """Return a digest of all files that an output is made of: weights, config, index, tokenizer and so on."""
    digest = hashlib.sha256(model_fingerprint(folder).encode())
    index = folder / INDEX_FILE
    for path in [*([index] if index.is_file() else []), *companions(folder)]:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _device_kind(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}, products in {products.kind()}"


def _sha256(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
