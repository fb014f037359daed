"""Export to GPTQ version 1, which GPTQModel, vLLM, SGLang and (with GPTQModel installed) transformers read.

The words of the codes are those of bitmend's own layout, transposed (`formats/read_gptq.py` has the table). Scales become
float16, which is the one thing that may change; an event then says by how much, and more than one part in 256 (what a
number loses in bfloat16) is refused. Zero points are stored minus one: one at the lower end of the range would wrap
around, which readers undo differently, so it is refused. Columns keep their natural order.

Before the export counts as done it is read back from the disk by bitmend's own reader, and every weight compared bit for
bit with the source (with the scales as rounded). That no engine misreads it is checked by hand, with
`benchmarks/peers/gptqmodel/check_export.py`.

Source: the files that GPTQModel 7.6 writes and reads (github.com/ModelCloud/GPTQModel).
"""

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int32
from torch import Tensor

from bitmend.errors import ExportError, RequestError
from bitmend.formats.native_source import NativeSource, fusion_events, in_parts, open_native
from bitmend.formats.quantized_folder import OLD_GPTQ_CONFIG, QuantizedFolder, read_quantized
from bitmend.formats.read_gptq import CODES, GPTQ_BITS, GROUPS, SCALES, ZERO_POINTS
from bitmend.formats.writer import CheckpointWriter
from bitmend.numerics.granularity import PerGroup, group_of_column
from bitmend.numerics.qtensor import QuantSpec
from bitmend.packing.bits import pack_codes, unpack_codes
from bitmend.protocols import FORMATS, Event
from bitmend.runtime.packed import SCALE, PackedWeight

MOST_SCALE_CHANGE = 2.0**-8
# What GPTQModel 7.6 accepts beside one group for the whole width.
_READABLE_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)

Scheme = tuple[int, int, bool]  # bits, group size (-1: whole width), symmetric


@FORMATS.register("gptq")
@dataclass(frozen=True)
class GptqFormat:
    """The GPTQ format, version 1, without activation order, for GPTQModel, vLLM and SGLang.

    Attributes:
        overwrite: replace an existing output.
    """

    proof: ClassVar[str] = "read back from the disk, weights agree bit for bit"
    overwrite: bool = False

    def export(self, source: Path, output: Path) -> tuple[Event, ...]:
        """Write the checkpoint `source` to the new folder `output`, read it back and compare.

        Args:
            source: a folder in bitmend's own format.
            output: the folder to be.

        Returns:
            What the user must be told.

        Raises:
            RequestError: something that the format cannot hold, or an output that exists.
            CheckpointError: a source that is cut short, altered or inconsistent.
            ExportError: what was read back is not what the source holds; the output is removed.

        Cost: a few hundred megabytes, or the largest layer a few times in float32.
        """
        checkpoint = open_native(Path(source), "GPTQ")
        for name in checkpoint.exported:
            _check_holds(name, checkpoint)
        events = tuple(_events(checkpoint))
        config = _quantization_config(checkpoint)
        with CheckpointWriter(checkpoint.folder, output, self.overwrite) as writer:
            for number, tensors in enumerate(in_parts(_pieces(checkpoint))):
                writer.add(str(number), tensors)
            writer.finish(config, {OLD_GPTQ_CONFIG: config}, check=lambda folder: _compare(checkpoint, folder))
        return events


# ---------------------------------------------------------------------------------------------- what cannot be held
def _check_holds(name: str, checkpoint: NativeSource) -> None:
    entry = checkpoint.exported[name]
    spec, (out, columns) = entry.spec, entry.shape
    if entry.kind == "conv1d":
        raise RequestError(f"{name} is a Conv1D of GPT-2, which bitmend does not write as GPTQ; keep bitmend's format")
    if entry.kind != "linear":
        raise RequestError(f"{name} is a convolution, but GPTQ holds linear layers only; keep bitmend's format")
    if spec.grid.bits not in GPTQ_BITS:
        raise RequestError(
            f"{name} has {spec.grid.bits} bits, but GPTQ holds 2, 3, 4 or 8; quantise with one of these, or export to "
            f"compressed-tensors"
        )
    step = 32 if spec.grid.bits == 3 else 32 // spec.grid.bits
    if out % step or columns % step:
        raise RequestError(
            f"{name} has {out} output and {columns} input channels, but at {spec.grid.bits} bits GPTQ needs multiples of "
            f"{step}; keep bitmend's format, or skip this layer when you quantise"
        )
    if isinstance(spec.granularity, PerGroup) and columns % spec.granularity.size:
        raise RequestError(
            f"{name} has {columns} input channels in groups of {spec.granularity.size}; readers of GPTQ do not expect a "
            f"shorter last group; quantise with a group_size that divides the width"
        )
    _check_scales(name, checkpoint.tensors[f"{name}.{SCALE}"])
    if not spec.grid.symmetric:
        _check_zero_points(name, checkpoint.packed(name))


def _check_scales(name: str, scale: Tensor) -> None:
    change = _scale_change(scale)
    if not change <= MOST_SCALE_CHANGE:  # written so that infinity and NaN fail
        raise RequestError(
            f"{name} has scales from {scale.min().item():.2e} to {scale.max().item():.2e}, which float16, the type of "
            f"GPTQ's scales, changes by up to {change:.1%}; export to compressed-tensors, which keeps their type"
        )


def _check_zero_points(name: str, packed: PackedWeight) -> None:
    if bool((_zero_points(packed) == packed.spec.grid.min_code).any()):
        raise RequestError(
            f"{name} has zero points at the lower end of the range, which GPTQ version 1, storing them minus one, "
            f"cannot hold; quantise with weights.symmetric = true, or export to compressed-tensors"
        )


def _scale_change(scale: Tensor) -> float:
    """Return the largest relative change of a scale when it is rounded to float16."""
    exact = scale.double()
    change = (exact.to(torch.float16).double() - exact).abs() / exact.abs()
    return float(torch.where(exact == 0, 0.0, change).max())


# ---------------------------------------------------------------------------------------------- what is told
def _events(checkpoint: NativeSource) -> Iterator[Event]:
    yield from checkpoint.dequantised_events()
    yield from _scale_events(checkpoint)
    schemes = _schemes(checkpoint)
    if not all(symmetric for _, _, symmetric in schemes.values()):
        yield Event(
            "reader_limit",
            "zero points",
            "GPTQModel 7.6 loads asymmetric files of GPTQ version 1 only of its own making, vLLM's Marlin kernels none; "
            "quantise with weights.symmetric = true for them",
        )
    odd = sorted({size for _, size, _ in schemes.values()} - {-1, *_READABLE_GROUP_SIZES})
    if odd:
        readable = ", ".join(map(str, _READABLE_GROUP_SIZES))
        yield Event(
            "reader_limit", "group size", f"GPTQModel 7.6 reads groups of {readable} or -1; these have {odd[0]}"
        )
    if _overrides(checkpoint):
        yield Event(
            "reader_limit",
            "dynamic",
            "layers of another scheme, or left unquantised, are told apart by `dynamic`, which not every reader knows",
        )
    yield from fusion_events(schemes, checkpoint.unquantised)


def _scale_events(checkpoint: NativeSource) -> Iterator[Event]:
    changes = {name: _scale_change(checkpoint.tensors[f"{name}.{SCALE}"]) for name in checkpoint.exported}
    changed = [name for name in changes if changes[name] > 0]
    if changed:
        worst = max(changed, key=lambda name: changes[name])
        yield Event(
            "scales_rounded",
            worst,
            f"scales of {len(changed)} of {len(changes)} layers were rounded to float16, the type of GPTQ's scales; "
            f"they and the weights change by at most {changes[worst]:.1e} of their value",
        )


# ---------------------------------------------------------------------------------------------- what is written
def _pieces(checkpoint: NativeSource) -> Iterator[dict[str, Tensor]]:
    for name in checkpoint.exported:
        yield _module_tensors(checkpoint.name_outside(name), checkpoint.packed(name))
    yield from checkpoint.other_tensors()


def _module_tensors(name: str, packed: PackedWeight) -> dict[str, Tensor]:
    out, columns = packed.shape
    bits = packed.spec.grid.bits
    scale = packed.scale.to(torch.float16).expand(out, -1)
    stored = _zero_points(packed).expand(out, -1) - 1
    tensors = {
        CODES: packed.words.T,
        ZERO_POINTS: pack_codes(stored.T.to(torch.int8), bits),
        SCALES: scale.T,
        GROUPS: _group(packed.spec, columns),
    }
    return {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}


def _zero_points(packed: PackedWeight) -> Tensor:
    """Return the zero points as signed codes, (rows, groups)."""
    rows, groups = packed.scale.shape
    if packed.zero_words is None:
        return torch.zeros(rows, groups, dtype=torch.int8)
    return unpack_codes(packed.zero_words.T, packed.spec.grid.bits, rows).T


def _group(spec: QuantSpec, columns: int) -> Int32[Tensor, " columns"]:
    return group_of_column(spec.granularity, columns).to(torch.int32)


def _schemes(checkpoint: NativeSource) -> dict[str, Scheme]:
    schemes = {}
    for name, entry in checkpoint.exported.items():
        spec = entry.spec
        size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else -1
        schemes[name] = (spec.grid.bits, size, spec.grid.symmetric)
    return schemes


def _main_scheme(checkpoint: NativeSource) -> Scheme:
    return Counter(_schemes(checkpoint).values()).most_common(1)[0][0]


def _overrides(checkpoint: NativeSource) -> dict[str, dict[str, Any]]:
    """Return `dynamic`: patterns of layers that differ from the main scheme (`+:`) or are not quantised (`-:`)."""
    main = _main_scheme(checkpoint)
    overrides: dict[str, dict[str, Any]] = {}
    for name, (bits, size, symmetric) in _schemes(checkpoint).items():
        if (bits, size, symmetric) != main:
            overrides[f"+:^{re.escape(checkpoint.name_outside(name))}$"] = {
                "bits": bits,
                "group_size": size,
                "sym": symmetric,
            }
    # A layer outside the blocks, such as the head, is left alone by readers unless it is asked for.
    blocks = {_block_list(name) for name in checkpoint.exported}
    for name in checkpoint.unquantised:
        if _block_list(name) in blocks:
            overrides[f"-:^{re.escape(checkpoint.name_outside(name))}$"] = {}
    return overrides


def _block_list(name: str) -> str | None:
    """Return what stands before the first number in a path, which is the list of blocks; None when there is none."""
    found = re.search(r"\.\d+\.", name)
    return name[: found.start()] if found else None


def _quantization_config(checkpoint: NativeSource) -> dict[str, Any]:
    bits, size, symmetric = _main_scheme(checkpoint)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"bitmend:{importlib.metadata.version('bitmend')}"]},
    }
    overrides = _overrides(checkpoint)
    return config | ({"dynamic": overrides} if overrides else {})


# ---------------------------------------------------------------------------------------------- what is proved
def _compare(checkpoint: NativeSource, folder: Path) -> None:
    """Compare what was written with the source, tensor by tensor.

    Raises:
        ExportError: a tensor is missing, left over or differs.
    """
    export = read_quantized(folder)
    if export.format != "gptq":
        raise ExportError(f"read back, the export is of format {export.format}, not gptq; it was removed")
    for name in checkpoint.exported:
        packed = checkpoint.packed(name)
        expected = replace(packed, scale=packed.scale.to(torch.float16)).dequantize()
        outside = checkpoint.name_outside(name)
        if outside not in export.layers or not torch.equal(export.dense(outside), expected):
            raise ExportError(f"read back, the weight of {name} is not that of the source; the export was removed")
    _compare_others(checkpoint, export)


def _compare_others(checkpoint: NativeSource, export: QuantizedFolder) -> None:
    left = set(export.unquantised)
    for piece in checkpoint.other_tensors():
        for name, tensor in piece.items():
            if name not in left or not torch.equal(export.stored(name), tensor):
                raise ExportError(f"read back, {name} is not that of the source; the export was removed")
            left.remove(name)
    if left:
        raise ExportError(f"read back, the export also holds {min(left)}; it was removed")
