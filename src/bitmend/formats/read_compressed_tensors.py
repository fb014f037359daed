"""The `pack-quantized` layout of compressed-tensors, as llm-compressor and bitmend's own export write it.

For a module NAME of shape (out, in), b bits, g groups a row:

| tensor                   | type  | shape                  |                                                         |
|--------------------------|-------|------------------------|---------------------------------------------------------|
| `NAME.weight_packed`     | int32 | (out, ceil(in*b/32))   | signed codes plus 2^(b-1), densely along the input      |
| `NAME.weight_scale`      | float | (out, g)               |                                                         |
| `NAME.weight_zero_point` | int32 | (ceil(out*b/32), g)    | asymmetric only; signed, packed along the output        |
| `NAME.weight_shape`      | int64 | (2,)                   | out and in                                              |
| `NAME.weight_g_idx`      | int32 | (in,)                  | group of each column; only with activation order        |

Which scheme a layer has is said by `config_groups`: exact names go before patterns, patterns before classes.

Source: compressed-tensors 0.20 (github.com/vllm-project/compressed-tensors).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitmend.errors import CheckpointError
from bitmend.formats.affine import SCALE_DTYPES, AffineWeight, finite_scale, group_tensor_or_none, valid_groups
from bitmend.formats.safetensors_file import TensorRecord, expect_record, modules_with
from bitmend.packing.bits import num_words, unpack_codes
from bitmend.runtime.packed import SCALE, WORDS, ZERO_WORDS

FORMAT = "pack-quantized"
# Patterns come from a stranger, and Python's take exponential time with repeats in repeats. One repeat after the other takes
# at most the length of the name to the power of their number.
_QUANTIFIED_GROUP = re.compile(r"\)[*+{]")
_OPEN_ENDED = re.compile(r"[*+{]")
_MOST_OPEN_ENDED, _LONGEST = 4, 200

SHAPE, GROUPS = "weight_shape", "weight_g_idx"


@dataclass(frozen=True)
class CompressedTensorsLayer:
    """One layer; a `PackedLayer`.

    Attributes:
        name: full module path.
        bits: width of a code.
        shape: (out, in).
        groups: how many a row has.
        symmetric: whether there are no zero points.
        has_groups: whether the file says which group each column has.
    """

    name: str
    bits: int
    shape: tuple[int, int]
    groups: int
    symmetric: bool
    has_groups: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that hold the weight."""
        optional = [] if self.symmetric else [ZERO_WORDS]
        return (WORDS, SCALE, SHAPE, *optional, *([GROUPS] if self.has_groups else []))

    def read(self, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """Read and unpack the layer; see `PackedLayer`."""
        group = zero_point = None
        if self.has_groups:
            group = group_tensor_or_none(valid_groups(tensors, f"{self.name}.{GROUPS}", self.groups), self.groups)
        if not self.symmetric:
            words = tensors[f"{self.name}.{ZERO_WORDS}"]
            zero_point = unpack_codes(words.T, self.bits, self.shape[0]).T.to(torch.int16)
        codes = unpack_codes(tensors[f"{self.name}.{WORDS}"], self.bits, self.shape[1])
        return AffineWeight(codes, zero_point, finite_scale(tensors, f"{self.name}.{SCALE}"), group)


def compressed_tensors_layers(
    records: Mapping[str, TensorRecord], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, CompressedTensorsLayer]:
    """Return the quantised layers of a compressed-tensors checkpoint.

    Args:
        records: of all weight files.
        config: its `quantization_config`.
        tensors: gives the stored shape of each layer; nothing else is read.

    Raises:
        CheckpointError: another format than `pack-quantized`; no quantised layer, one that no scheme targets, or
            tensors that are missing or of impossible types or shapes.
    """
    if config.get("transform_config") or config.get("sparsity_config"):
        raise CheckpointError(
            "transform_config and sparsity_config must be empty in a compressed-tensors checkpoint that bitmend reads: "
            "with them the stored weights alone are not the model's; got some"
        )
    layers = {
        name: _layer(records, name, scheme_of(name, config), tensors)
        for name in modules_with(records, (WORDS, ZERO_WORDS))
    }
    if not layers:
        raise CheckpointError(
            f"quantization_config announces compressed-tensors, but no tensor is called {WORDS}; bitmend reads the "
            f"format {FORMAT} only, got {config.get('format')!r:.80}"
        )
    return layers


def scheme_of(module: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of `config_groups` that targets a module.

    Raises:
        CheckpointError: none does, or the entries are malformed.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise CheckpointError(f"quantization_config.config_groups must be a table; got {groups!r:.80}")
    best, found = 0, None
    for group in groups.values():
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(f"each of config_groups must be a table with a list of targets; got {group!r:.80}")
        rank = max((_rank(target, module) for target in targets), default=0)
        if rank > best:
            best, found = rank, {"format": config.get("format"), **group}
    if found is None:
        raise CheckpointError(f"no group of quantization_config.config_groups targets the quantised module {module}")
    return found


def bits_of(module: str, config: Mapping[str, Any]) -> int:
    """Return the code width of a module.

    Raises:
        CheckpointError: as `scheme_of`, or a width that is none.
    """
    weights = scheme_of(module, config).get("weights")
    bits = weights.get("num_bits") if isinstance(weights, dict) else None
    if type(bits) is not int or not 1 <= bits <= 8:
        raise CheckpointError(f"num_bits of {module} must be a whole number from 1 to 8; got {bits!r:.80}")
    return bits


def _rank(target: str, module: str) -> int:
    if target == module:
        return 3
    if target.startswith("re:"):
        if (
            _QUANTIFIED_GROUP.search(target)
            or len(_OPEN_ENDED.findall(target)) > _MOST_OPEN_ENDED
            or len(module) > _LONGEST
        ):
            raise CheckpointError(
                f"the target {target!r:.80} of config_groups could take for ever to match {module!r:.80}: at most "
                f"{_MOST_OPEN_ENDED} repeats, none of them of a group, and names of at most {_LONGEST} letters are read; "
                "write the names out"
            )
        try:
            return 2 if re.match(target[3:], module) else 0
        except re.error as error:
            raise CheckpointError(f"the target {target!r:.80} of config_groups is no valid pattern: {error}") from error
    return 1 if target in ("Linear", "Embedding") else 0


def _layer(
    records: Mapping[str, TensorRecord], name: str, scheme: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> CompressedTensorsLayer:
    bits = bits_of(name, {"config_groups": {"": {**scheme, "targets": [name]}}})
    symmetric, size = _weights_of(name, scheme)
    words = expect_record(records, f"{name}.{WORDS}", (torch.int32,), (None, None)).shape
    expect_record(records, f"{name}.{SHAPE}", (torch.int64,), (2,))
    out, columns = tensors[f"{name}.{SHAPE}"].tolist()
    if out < 1 or columns < 1 or words != (out, num_words(columns, bits)):
        raise CheckpointError(
            f"{name}.{SHAPE} says ({out}, {columns}), which at {bits} bits does not fit {name}.{WORDS} of shape {words}; "
            f"download the file again"
        )
    if size is not None and columns % size:
        raise CheckpointError(
            f"{name} has {columns} input channels, which group_size {size} does not divide; download the file again"
        )
    groups = 1 if size is None else columns // size
    expect_record(records, f"{name}.{SCALE}", SCALE_DTYPES, (out, groups))
    if not symmetric:
        expect_record(records, f"{name}.{ZERO_WORDS}", (torch.int32,), (num_words(out, bits), groups))
    has_groups = f"{name}.{GROUPS}" in records
    if has_groups:
        expect_record(records, f"{name}.{GROUPS}", (torch.int32,), (columns,))
    if f"{name}.weight" in records:
        raise CheckpointError(f"the file holds both {name}.{WORDS} and {name}.weight; only one can be the weight")
    return CompressedTensorsLayer(name, bits, (out, columns), groups, symmetric, has_groups)


def _weights_of(name: str, scheme: Mapping[str, Any]) -> tuple[bool, int | None]:
    """Return whether a scheme is symmetric, and its group size (None for one group)."""
    weights = scheme["weights"]
    symmetric, strategy, size = weights.get("symmetric", True), weights.get("strategy"), weights.get("group_size")
    stored = scheme.get("format") or FORMAT
    if stored not in (FORMAT, "mixed-precision") or weights.get("type", "int") != "int":
        raise CheckpointError(
            f"{name} must hold whole numbers in the format {FORMAT}; got type {weights.get('type')!r:.80} in "
            f"{stored!r:.80}"
        )
    if not isinstance(symmetric, bool) or strategy not in ("group", "channel"):
        raise CheckpointError(
            f"the scheme of {name} must say symmetric true or false and strategy group or channel; got "
            f"{symmetric!r:.80} and {strategy!r:.80}"
        )
    if strategy == "channel":
        return symmetric, None
    if type(size) is not int or size < 1:
        raise CheckpointError(f"group_size of {name} must be a positive number of columns; got {size!r:.80}")
    return symmetric, size
