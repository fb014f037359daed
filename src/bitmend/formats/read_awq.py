"""The AWQ layout for GEMM kernels, as AutoAWQ and GPTQModel write it.

For a module NAME of shape (out, in), 4 bits, g groups a row:

| tensor         | type    | shape        |                                                              |
|----------------|---------|--------------|--------------------------------------------------------------|
| `NAME.qweight` | int32   | (in, out/8)  | unsigned codes, packed along the output, interleaved         |
| `NAME.qzeros`  | int32   | (g, out/8)   | zero points as they are, packed and interleaved likewise     |
| `NAME.scales`  | float16 | (g, out)     |                                                              |

The interleaving is that of `packing/interleaved.py`; the zero points have no quirk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitmend.errors import CheckpointError
from bitmend.formats.affine import SCALE_DTYPES, AffineWeight, finite_scale
from bitmend.formats.read_gptq import CODES, SCALES, ZERO_POINTS
from bitmend.formats.safetensors_file import TensorRecord, expect_record, modules_with
from bitmend.packing.interleaved import unpack_interleaved

_CODES_IN_WORD = 8


@dataclass(frozen=True)
class AwqLayer:
    """One layer; a `PackedLayer`.

    Attributes:
        name: full module path.
        shape: (out, in).
    """

    name: str
    shape: tuple[int, int]

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that hold the weight."""
        return (CODES, ZERO_POINTS, SCALES)

    def read(self, tensors: Mapping[str, Tensor]) -> AffineWeight:
        """Read and unpack the layer; see `PackedLayer`."""
        codes = unpack_interleaved(tensors[f"{self.name}.{CODES}"]).T.contiguous()
        zero_point = unpack_interleaved(tensors[f"{self.name}.{ZERO_POINTS}"]).T.to(torch.int16)
        return AffineWeight(codes, zero_point, finite_scale(tensors, f"{self.name}.{SCALES}").T)


def awq_layers(records: Mapping[str, TensorRecord], config: Mapping[str, Any]) -> dict[str, AwqLayer]:
    """Return the quantised layers of an AWQ checkpoint, judged by config and headers alone.

    Args:
        records: of all weight files.
        config: its `quantization_config`.

    Raises:
        CheckpointError: another layout than GEMM or another width than 4 bits; no quantised layer; or tensors that are
            missing or of impossible types or shapes.
    """
    group_size = _group_size(config)
    layers = {name: _layer(records, name, group_size) for name in modules_with(records, (CODES, ZERO_POINTS))}
    if not layers:
        raise CheckpointError(
            "quantization_config announces AWQ, but no tensor is called qweight; give the complete folder"
        )
    return layers


def _group_size(config: Mapping[str, Any]) -> int:
    version = config.get("version", config.get("checkpoint_format", config.get("format", "gemm")))
    if not isinstance(version, str) or version.lower() != "gemm":
        raise CheckpointError(
            f"version must be gemm in an AWQ checkpoint that bitmend reads; got {version!r:.80}; convert it with the "
            f"tool that wrote it"
        )
    bits = config.get("bits", config.get("w_bit"))
    if type(bits) is not int or bits != 4:
        raise CheckpointError(f"bits must be 4 in an AWQ checkpoint that bitmend reads; got {bits!r:.80}")
    size = config.get("group_size", config.get("q_group_size"))
    if type(size) is not int or (size < 1 and size != -1):
        raise CheckpointError(f"group_size must be a positive number of columns, or -1; got {size!r:.80}")
    return size


def _layer(records: Mapping[str, TensorRecord], name: str, group_size: int) -> AwqLayer:
    columns, words = expect_record(records, f"{name}.{CODES}", (torch.int32,), (None, None)).shape
    size = columns if group_size == -1 else group_size
    if columns % size:
        raise CheckpointError(
            f"{name} has {columns} input channels, which group_size {size} does not divide; download the file again"
        )
    groups, out = columns // size, _CODES_IN_WORD * words
    expect_record(records, f"{name}.{ZERO_POINTS}", (torch.int32,), (groups, words))
    expect_record(records, f"{name}.{SCALES}", SCALE_DTYPES, (groups, out))
    if f"{name}.weight" in records:
        raise CheckpointError(f"the file holds both {name}.{CODES} and {name}.weight; only one can be the weight")
    return AwqLayer(name, (out, columns))
