"""bitmend's own checkpoint: which tensors hold a quantised module, and how they are read back.

Layout `uniform`, for a module NAME of shape (out, in), b bits, g groups a row; rows = out, or 1 when one scale serves
the whole matrix:

| tensor                   | type       | shape                    |                                               |
|--------------------------|------------|--------------------------|-----------------------------------------------|
| `NAME.weight_packed`     | int32      | (out, ceil(in*b/32))     | codes plus 2^(b-1), densely, see packing/bits |
| `NAME.weight_scale`      | scale_dtype| (rows, g)                | exactly the scales that the codes were chosen for |
| `NAME.weight_zero_point` | int32      | (ceil(rows*b/32), g)     | asymmetric only; packed along the rows        |

The map beside a block NAME (`compensation.py`) lies in `NAME.compensation.weight` (out, in), or `down` (rank, in) and `up`
(out, rank), or `scale` (out), in a floating type of 16 or 32 bits, and `NAME.compensation.bias` (out), float32.

Everything else of the model lies beside them under its usual name. The manifest (`formats/manifest.py`) says which
modules are quantised and how; no other file is needed to rebuild the model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from bitmend.compensation import BIAS_DTYPE, CHILD, Compensation, CompensationShape
from bitmend.errors import CheckpointError
from bitmend.formats.manifest import ManifestEntry, quantization_config, spec_from_json, spec_to_json
from bitmend.numerics.qtensor import QTensor
from bitmend.runtime.packed import SCALE, WORDS, ZERO_WORDS, PackedWeight, pack, packed_shapes

__all__ = [
    "ManifestEntry",
    "compensation_tensors",
    "quantization_config",
    "read_compensation",
    "read_packed",
    "read_site",
    "site_shapes",
    "site_tensors",
    "spec_from_json",
    "spec_to_json",
]

COMPENSATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def site_tensors(name: str, qtensor: QTensor) -> dict[str, Tensor]:
    """Return the tensors that hold the quantised weight of module `name`, under their names in the file.

    Raises:
        RequestError: scales that their storage type cannot hold exactly, or zero points outside the grid.
    """
    packed = pack(qtensor)
    tensors = {f"{name}.{WORDS}": packed.words, f"{name}.{SCALE}": packed.scale}
    if packed.zero_words is not None:
        tensors[f"{name}.{ZERO_WORDS}"] = packed.zero_words
    return tensors


def site_shapes(name: str, entry: ManifestEntry) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of each tensor that `site_tensors` makes for such a module."""
    return {f"{name}.{key}": value for key, value in packed_shapes(entry.shape, entry.spec).items()}


def read_packed(tensors: Mapping[str, Tensor], name: str, entry: ManifestEntry) -> PackedWeight:
    """Return the packed weight of module `name`.

    Args:
        tensors: anything that gives a tensor for its name; only the needed ones are read.
        name: full module path.
        entry: what the manifest says of it.

    Raises:
        CheckpointError: a tensor that is missing or has another type or shape than the manifest says.
    """
    found = {}
    for key, (dtype, shape) in site_shapes(name, entry).items():
        if key not in tensors:
            raise CheckpointError(f"the checkpoint lacks {key}, which its manifest announces")
        tensor = tensors[key]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{key} must be {dtype} of shape {shape} by the manifest; got {tensor.dtype} of {tuple(tensor.shape)}"
            )
        found[key.removeprefix(f"{name}.")] = tensor
    return PackedWeight(found[WORDS], found[SCALE], found.get(ZERO_WORDS), entry.spec, entry.shape)


def read_site(tensors: Mapping[str, Tensor], name: str, entry: ManifestEntry) -> QTensor:
    """Return the quantised weight of module `name`, equal to what `site_tensors` was given; see `read_packed`."""
    return read_packed(tensors, name, entry).unpack()


def compensation_tensors(block: str, compensation: Compensation) -> dict[str, Tensor]:
    """Return the tensors of the map beside a block, under their names in the file."""
    return {f"{block}.{CHILD}.{name}": compensation.get_buffer(name) for name in compensation.shape.shapes}


def read_compensation(tensors: Mapping[str, Tensor], block: str, shape: CompensationShape) -> Compensation:
    """Return the map beside a block.

    Raises:
        CheckpointError: a tensor that is missing or has another type or shape than the manifest says.
    """
    found = {}
    for name, wanted in shape.shapes.items():
        key = f"{block}.{CHILD}.{name}"
        if key not in tensors:
            raise CheckpointError(f"the checkpoint lacks {key}, which its manifest announces")
        tensor = tensors[key]
        right = tensor.dtype == BIAS_DTYPE if name == "bias" else tensor.dtype in COMPENSATION_DTYPES
        if not right or tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"{key} must be a floating tensor of shape {wanted} by the manifest; got {tensor.dtype} of "
                f"{tuple(tensor.shape)}"
            )
        found[name] = tensor
    return Compensation(shape, found)
