"""The GPTQ layout, as GPTQModel, AutoGPTQ and AutoRound write it.

For a module NAME of shape (out, in), b bits, g groups a row:

| tensor         | type    | shape            |                                                                     |
|----------------|---------|------------------|---------------------------------------------------------------------|
| `NAME.qweight` | int32   | (in*b/32, out)   | unsigned codes, packed densely along the input                      |
| `NAME.qzeros`  | int32   | (g, out*b/32)    | zero points, packed along the output; in version 1 one too small    |
| `NAME.scales`  | float16 | (g, out)         | may be negative                                                     |
| `NAME.g_idx`   | int32   | (in,)            | group of each column; may be missing where groups are neighbours    |

At 3 bits, 32 codes fill 3 words and two of them straddle a border, which is the same as one string of bits. Which of the
two versions of the zero points a file has is judged in `formats/gptq_zero_points.py`.

Source: the files that GPTQModel 7.6 writes (github.com/ModelCloud/GPTQModel).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int16
from torch import Tensor

from bitmend.errors import CheckpointError
from bitmend.formats.affine import SCALE_DTYPES, AffineWeight, finite_scale, group_tensor_or_none, valid_groups
from bitmend.formats.safetensors_file import TensorRecord, expect_record, modules_with
from bitmend.packing.bits import unpack_codes

GPTQ_BITS = (2, 3, 4, 8)
CODES, ZERO_POINTS, SCALES, GROUPS = "qweight", "qzeros", "scales", "g_idx"

# A one in every field of a word. At 3 bits fields straddle words, so there is no such constant.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class GptqConfig:
    """What `quantization_config` says.

    Attributes:
        bits: width of a code.
        group_size: columns that share a scale; -1 for all.
        symmetric: whether it promises one zero point for all, or None when it does not say.
        act_order: whether columns were rounded, and may be grouped, in another order.
        overrides: whether some layers differ (`dynamic`), so that each layer's own shapes decide.
        version: of the zero points, 1 or 2, or None when it does not say.
    """

    bits: int
    group_size: int
    symmetric: bool | None
    act_order: bool
    overrides: bool
    version: int | None


@dataclass(frozen=True)
class GptqLayer:
    """One layer; a `PackedLayer`.

    Attributes:
        name: full module path.
        bits: width of a code.
        shape: (out, in).
        groups: how many a row has.
        has_groups: whether the file says which group each column has.
        version: of the zero points.
    """

    name: str
    bits: int
    shape: tuple[int, int]
    groups: int
    has_groups: bool
    version: int = 1

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that hold the weight."""
        return (CODES, ZERO_POINTS, SCALES, *([GROUPS] if self.has_groups else []))

    def read(self, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """Read and unpack the layer; see `PackedLayer`."""
        group = self.group_of_column(tensors)
        scale = finite_scale(tensors, f"{self.name}.{SCALES}").T
        codes = unpack_codes(tensors[f"{self.name}.{CODES}"].T, self.bits, self.shape[1])
        return AffineWeight(codes, self.zero_point(tensors), scale, group)

    def group_of_column(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return the group of each column, or None when neighbours share a group."""
        if not self.has_groups:
            return None
        return group_tensor_or_none(valid_groups(tensors, f"{self.name}.{GROUPS}", self.groups), self.groups)

    def zero_point(self, tensors: Mapping[str, Tensor]) -> Int16[Tensor, "out groups"]:
        """Return the zero points as signed codes."""
        words = tensors[f"{self.name}.{ZERO_POINTS}"]
        half = 2 ** (self.bits - 1)
        if self.version == 1 and self.bits in _ONES:
            # Over whole words, as GPTQModel subtracts: a zero point of 0 has then borrowed from its neighbour.
            words = words + _ONES[self.bits]
        stored = unpack_codes(words, self.bits, self.shape[0]).T.to(torch.int16)
        if self.version == 1 and self.bits not in _ONES:
            stored = (stored + half + 1) % (2 * half) - half
        return stored

    def stored_zero_point(self, tensors: Mapping[str, Tensor]) -> Int16[Tensor, "out groups"]:
        """Return the unsigned zero points exactly as the file has them."""
        words = tensors[f"{self.name}.{ZERO_POINTS}"]
        signed = unpack_codes(words, self.bits, self.shape[0]).T.to(torch.int16)
        return signed + 2 ** (self.bits - 1)


def gptq_config(config: Mapping[str, Any]) -> GptqConfig:
    """Return what a GPTQ `quantization_config` says.

    Raises:
        CheckpointError: a key that is missing, has the wrong type, or asks for what this reader does not know.
    """
    claim = config.get("checkpoint_format", config.get("format"))
    versions = {None: None, "gptq": 1, "gptq_v2": 2}
    if not isinstance(claim, str | None) or claim not in versions or config.get("is_marlin_format"):
        raise CheckpointError(
            f"checkpoint_format must be gptq or gptq_v2 in a GPTQ checkpoint that bitmend reads; got "
            f"{'marlin' if config.get('is_marlin_format') else claim!r:.80}; convert it with the tool that wrote it"
        )
    bits, group_size = config.get("bits"), config.get("group_size", -1)
    if type(bits) is not int or bits not in GPTQ_BITS:
        raise CheckpointError(f"bits must be 2, 3, 4 or 8 in a GPTQ checkpoint that bitmend reads; got {bits!r:.80}")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise CheckpointError(f"group_size must be a positive number of columns, or -1; got {group_size!r:.80}")
    symmetric, act_order = config.get("sym"), config.get("desc_act", False)
    if not isinstance(symmetric, bool | None) or not isinstance(act_order, bool):
        raise CheckpointError(f"sym and desc_act must be true or false; got {symmetric!r:.80} and {act_order!r:.80}")
    return GptqConfig(bits, group_size, symmetric, act_order, bool(config.get("dynamic")), versions[claim])


def gptq_layers(records: Mapping[str, TensorRecord], config: GptqConfig) -> dict[str, GptqLayer]:
    """Return the quantised layers of a GPTQ checkpoint, judged by the headers alone.

    Raises:
        CheckpointError: no such layer, or tensors that are missing, left over or of impossible types or shapes.
    """
    layers = {name: _layer(records, name, config) for name in modules_with(records, (CODES, ZERO_POINTS))}
    if not layers:
        raise CheckpointError(
            "quantization_config announces GPTQ, but no tensor is called qweight; give the complete folder"
        )
    return layers


def _layer(records: Mapping[str, TensorRecord], name: str, config: GptqConfig) -> GptqLayer:
    words_in, out = expect_record(records, f"{name}.{CODES}", (torch.int32,), (None, None)).shape
    groups, words_out = expect_record(records, f"{name}.{ZERO_POINTS}", (torch.int32,), (None, None)).shape
    expect_record(records, f"{name}.{SCALES}", SCALE_DTYPES, (groups, out))
    if f"{name}.weight" in records:
        raise CheckpointError(f"the file holds both {name}.{CODES} and {name}.weight; only one can be the weight")
    bits, columns = _width(name, words_out, out, words_in, config)
    has_groups = f"{name}.{GROUPS}" in records
    if has_groups:
        expect_record(records, f"{name}.{GROUPS}", (torch.int32,), (columns,))
    elif config.act_order:
        raise CheckpointError(
            f"the checkpoint lacks the tensor {name}.{GROUPS}, which desc_act = true needs; download it again"
        )
    _check_groups(name, columns, groups, has_groups, config)
    return GptqLayer(name, bits, (out, columns), groups, has_groups)


def _width(name: str, words_out: int, out: int, words_in: int, config: GptqConfig) -> tuple[int, int]:
    """Return the width of a code and the number of input channels."""
    bits, rest = divmod(32 * words_out, out)
    if rest or bits not in GPTQ_BITS or 32 * words_in % bits or (bits != config.bits and not config.overrides):
        raise CheckpointError(
            f"the shapes of {name}.{CODES} ({words_in}, {out}) and {name}.{ZERO_POINTS} (groups, {words_out}) do not "
            f"belong to codes of {config.bits} bits; download the file again"
        )
    return bits, 32 * words_in // bits


def _check_groups(name: str, columns: int, groups: int, has_groups: bool, config: GptqConfig) -> None:
    expected = 1 if config.group_size == -1 else -(-columns // config.group_size)
    regular = columns % groups == 0
    if (not config.overrides and groups != expected) or groups > columns or not (has_groups or regular):
        raise CheckpointError(
            f"{name} has {columns} input channels and scales for {groups} groups, which does not fit group_size "
            f"{config.group_size}; download the file again"
        )
