"""The bit ledger: where every byte of the weight files goes, from the files alone.

Counted in bits, because a code of 3 bits has no whole number of bytes. Two totals are always given, since papers mean
one or the other: the quantised layers only (their codes, padding, scales, zero points and side tensors, over the number
of their weights; biases are not weights), and the whole model with embeddings, head, norms and biases (all tensors,
over the number of the model's original parameters). The header of a file is counted apart.
"""

import json
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bitmend.compensation import CHILD
from bitmend.errors import CheckpointError
from bitmend.formats import read_gptq
from bitmend.formats.manifest import QUANT_METHOD, Manifest
from bitmend.formats.read_awq import awq_layers
from bitmend.formats.read_compressed_tensors import GROUPS, SHAPE, bits_of
from bitmend.formats.safetensors_file import Header, TensorRecord, copy_chunks, expect_record, parse_json, read_header
from bitmend.online import InputScheme
from bitmend.runtime.packed import SCALE, WORDS, ZERO_WORDS

# Of quantised modules, then of the rest, then of the file. `masks`, `indices` and `side` belong to layouts with more
# than codes and scales.
QUANTISED = ("codes", "padding", "scales", "zero_points", "masks", "indices", "side", "shapes")
PLAIN = ("embeddings", "head", "norms", "biases", "layers", "other")
CATEGORIES = (*QUANTISED, *PLAIN, "header")

# Where the tensors of a quantised module are booked. Words of codes and zero points may end in padding.
_PARTS = {
    WORDS: "codes", ZERO_WORDS: "zero_points", SCALE: "scales", SHAPE: "shapes", GROUPS: "indices",
    read_gptq.CODES: "codes", read_gptq.ZERO_POINTS: "zero_points", read_gptq.SCALES: "scales",
    read_gptq.GROUPS: "indices",
}  # fmt: skip


@dataclass(frozen=True)
class LedgerRow:
    """One module.

    Attributes:
        name: full path.
        weights: how many original parameters it has.
        bits: category -> bits in the file.
        code_bits: width of its codes, or None when it is not quantised.
    """

    name: str
    weights: int
    bits: Mapping[str, int]
    code_bits: int | None

    @property
    def bits_per_weight(self) -> float:
        """All bits of the weight over the number of weights; 0 of a map beside a block, which stands for no weights."""
        if not self.weights:
            return 0.0
        quantised = sum(self.bits.get(category, 0) for category in QUANTISED)
        return (quantised if self.code_bits is not None else sum(self.bits.values())) / max(1, self.weights)


@dataclass(frozen=True)
class Ledger:
    """The whole account.

    Attributes:
        rows: modules in the order of the files.
        bits: category -> bits; together exactly 8 times `file_bytes`.
        file_bytes: all weight files.
        parameters: of the original model.
        quantised_weights: parameters in quantised modules, without biases.
        format: what config.json calls it: `bitmend`, `gptq`, `gptq_v2`, `awq`, `compressed-tensors` or another tool's
            name; `unquantised` when it calls it nothing.
        online: what is done to activations while the model runs, in words -> at how many modules.
        rotation_bytes: what config.json takes for rotations that are more than a size and a seed; no part of `file_bytes`,
            but counted in the bits per weight.
    """

    rows: tuple[LedgerRow, ...]
    bits: Mapping[str, int]
    file_bytes: int
    parameters: int
    quantised_weights: int
    format: str = "unquantised"
    online: Mapping[str, int] = field(default_factory=dict)
    rotation_bytes: int = 0

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantised layers only; None when there are none."""
        if not self.quantised_weights:
            return None
        stored = sum(self.bits[category] for category in QUANTISED)
        return (stored + 8 * self.rotation_bytes) / self.quantised_weights

    @property
    def bits_per_weight_model(self) -> float:
        """Of the whole model, embeddings and head included, without the header of the file."""
        return (8 * (self.file_bytes + self.rotation_bytes) - self.bits["header"]) / max(1, self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Return the content of ledger.json."""
        return {
            "format": self.format,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_weight_model": self.bits_per_weight_model,
            "file_bytes": self.file_bytes,
            "parameters": self.parameters,
            "quantised_weights": self.quantised_weights,
            "bits": dict(self.bits),
            "online": dict(self.online),
            "rotation_bytes": self.rotation_bytes,
            "modules": [
                {
                    "name": row.name,
                    "weights": row.weights,
                    "code_bits": row.code_bits,
                    "bits_per_weight": row.bits_per_weight,
                    "bits": dict(row.bits),
                }
                for row in self.rows
            ],
        }


@dataclass(frozen=True)
class _Codes:
    """What has to be known of a quantised module: width of a code, (out, in)."""

    bits: int
    shape: tuple[int, int]

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass
class _Account:
    """A row being filled; `extra` counts the parameters that are not weights, such as the bias of a quantised layer."""

    weights: int = 0
    extra: int = 0
    bits: dict[str, int] = field(default_factory=dict)

    def book(self, category: str, bits: int) -> None:
        if bits:
            self.bits[category] = self.bits.get(category, 0) + bits


def ledger(folder: Path) -> Ledger:
    """Return the ledger of a model folder: bitmend's own, plain, compressed-tensors, GPTQ or AWQ.

    Cost: reads headers only (and 16 bytes a module of compressed-tensors).

    Raises:
        CheckpointError: no config.json or weight file, or a file that is cut short or altered.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no model folder: it has no config.json")
    headers = {found.name: read_header(found) for found in sorted(folder.glob("*.safetensors"))}
    if not headers:
        raise CheckpointError(f"{folder} has no weights in safetensors files")
    return ledger_of(headers, parse_json(path.read_bytes(), str(path)), folder)


def ledger_of(headers: Mapping[str, Header], config: Mapping[str, Any], folder: Path) -> Ledger:
    """Return the ledger of files in `folder` whose headers and config have been read already; see `ledger`."""
    described = config.get("quantization_config") or {}
    if not isinstance(described, dict):
        raise CheckpointError(f"quantization_config of {folder} must be a table; got {described!r:.80}")
    quantised = _quantised_modules(headers, described, folder)
    records = {name: record for header in headers.values() for name, record in header.tensors.items()}
    beside = _maps_beside(described)
    accounts = {name: _Account(weights=codes.weights) for name, codes in quantised.items()}
    for name, record in records.items():
        module, _, leaf = name.rpartition(".")
        account = accounts.setdefault(module, _Account())
        bits = 8 * record.num_bytes
        if module in beside:  # no parameter of the original model
            account.book("side", bits)
        elif module not in quantised:
            account.weights += record.numel
            account.book(_category(name, record), bits)
        elif leaf in _PARTS:
            used = _used_bits(_PARTS[leaf], module, quantised[module], records, bits)
            account.book(_PARTS[leaf], used)
            account.book("padding", bits - used)
        else:
            account.extra += record.numel
            account.book(_category(name, record), bits)
    account_of_all = _closed(accounts, quantised, headers)
    rotations = described.get("rotations")
    return replace(
        account_of_all,
        format=_format_name(described),
        online=_online(described),
        rotation_bytes=len(json.dumps(rotations)) if rotations else 0,
    )


def _maps_beside(config: Mapping[str, Any]) -> set[str]:
    """Return the modules that are maps beside blocks."""
    if config.get("quant_method") != QUANT_METHOD:
        return set()
    return {f"{block}.{CHILD}" for block in Manifest.from_json(config).compensations}


def _used_bits(category: str, module: str, codes: _Codes, records: Mapping[str, TensorRecord], stored: int) -> int:
    """Return how many of the stored bits mean something; the rest is padding."""
    if category == "codes":
        return codes.weights * codes.bits
    if category == "zero_points":  # as many as there are scales
        scale = records.get(f"{module}.{SCALE}") or records.get(f"{module}.{read_gptq.SCALES}")
        if scale is None:
            raise CheckpointError(f"{module} has zero points but no scales; download the file again")
        return scale.numel * codes.bits
    return stored


def _closed(accounts: Mapping[str, _Account], quantised: Mapping[str, _Codes], headers: Mapping[str, Header]) -> Ledger:
    bits = dict.fromkeys(CATEGORIES, 0)
    for account in accounts.values():
        for category, amount in account.bits.items():
            bits[category] += amount
    bits["header"] = sum(8 * header.header_bytes for header in headers.values())
    rows = tuple(
        LedgerRow(name, account.weights, account.bits, quantised[name].bits if name in quantised else None)
        for name, account in sorted(accounts.items(), key=lambda item: _natural(item[0]))
    )
    return Ledger(
        rows=rows,
        bits=bits,
        file_bytes=sum(header.file_bytes for header in headers.values()),
        parameters=sum(account.weights + account.extra for account in accounts.values()),
        quantised_weights=sum(codes.weights for codes in quantised.values()),
    )


def _format_name(config: Mapping[str, Any]) -> str:
    method = str(config.get("quant_method", "unquantised"))
    version = config.get("checkpoint_format", config.get("format"))
    return "gptq_v2" if method == "gptq" and version == "gptq_v2" else method


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 10 after layer 9."""
    return [(int(part), "") if _is_number(part) else (-1, part) for part in name.split(".")]


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10


def _category(name: str, record: TensorRecord) -> str:
    """Return where an unquantised tensor is booked; names are all that a file tells."""
    module, _, leaf = name.rpartition(".")
    if re.search(r"norm|(^|\.)ln_?\w*$", module, re.IGNORECASE):
        return "norms"
    if leaf == "bias":
        return "biases"
    if re.search(r"embed|(^|\.)wt?pe$|(^|\.)wte$", module, re.IGNORECASE):
        return "embeddings"
    if re.search(r"(^|\.)(lm_head|embed_out|classifier|score|head|output)$", module):
        return "head"
    return "layers" if leaf == "weight" and len(record.shape) >= 2 else "other"


def _quantised_modules(headers: Mapping[str, Header], config: Mapping[str, Any], folder: Path) -> dict[str, _Codes]:
    if config.get("quant_method") == QUANT_METHOD:
        manifest = Manifest.from_json(config)
        return {name: _Codes(entry.spec.grid.bits, entry.shape) for name, entry in manifest.modules.items()}
    records = {name: record for header in headers.values() for name, record in header.tensors.items()}
    if config.get("quant_method") == "gptq":
        layers = read_gptq.gptq_layers(records, read_gptq.gptq_config(config))
        return {name: _Codes(layer.bits, layer.shape) for name, layer in layers.items()}
    if config.get("quant_method") == "awq":
        return {name: _Codes(layer.bits, layer.shape) for name, layer in awq_layers(records, config).items()}
    if config.get("quant_method") == "compressed-tensors":
        return _compressed_tensors_modules(headers, config, folder)
    return {}


def _online(config: Mapping[str, Any]) -> dict[str, int]:
    if config.get("quant_method") != QUANT_METHOD:
        return {}
    manifest = Manifest.from_json(config)
    schemes = [*manifest.inputs.values(), *(InputScheme(rotation) for rotation in manifest.outputs.values())]
    steps = [str(step) for scheme in schemes for step in (scheme.rotation, scheme.activations) if step is not None]
    return dict(Counter(steps + [step for scheme in manifest.attentions.values() for step in scheme.steps()]))


def _compressed_tensors_modules(
    headers: Mapping[str, Header], config: Mapping[str, Any], folder: Path
) -> dict[str, _Codes]:
    modules = {}
    for file, header in headers.items():
        for name, record in header.tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == SHAPE and f"{module}.{WORDS}" in header.tensors:
                expect_record(header.tensors, name, (torch.int64,), (2,))
                data = b"".join(copy_chunks(folder / file, record.start, record.stop))
                modules[module] = _Codes(bits_of(module, config), struct.unpack("<2q", data))
    return modules
