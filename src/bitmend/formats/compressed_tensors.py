"""Export to compressed-tensors, format `pack-quantized`, which vLLM, SGLang and transformers read.

The words of bitmend's own layout are that format's words, so codes and zero points are copied, not repacked. What
differs: the shape of each weight is stored as a tensor, the schemes are groups of `config_groups`, and some things have
no place: a one-bit grid without a zero, GPT-2's `Conv1D`, a shorter last group, scales that the model's dtype cannot
hold (its readers cast scales to it). Those are refused in one sentence. A quantised embedding or head is written out in
the model's dtype, with an event, because most readers expect them so.

Experts are written one by one, under the names of the architecture's own checkpoints. An architecture whose checkpoints hold
them packed is refused: no reader looks for single ones.

Before the export counts as done, its logits are compared with those of bitmend's own checkpoint (`formats/reopen.py`).

Source: the format as compressed-tensors 0.20 reads it (github.com/vllm-project/compressed-tensors).
"""

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmend.errors import RequestError
from bitmend.formats.manifest import ManifestEntry
from bitmend.formats.native_source import NativeSource, fusion_events, in_parts, open_native
from bitmend.formats.reopen import compare_logits
from bitmend.formats.writer import CheckpointWriter
from bitmend.numerics.granularity import PerGroup, PerTensor
from bitmend.numerics.qtensor import QuantSpec
from bitmend.packing.bits import pack_codes, unpack_codes
from bitmend.protocols import FORMATS, Event
from bitmend.runtime.packed import SCALE, WORDS, ZERO_WORDS, PackedWeight

FORMAT = "pack-quantized"


@FORMATS.register("compressed-tensors")
@dataclass(frozen=True)
class CompressedTensors:
    """The `pack-quantized` format of compressed-tensors, for vLLM, SGLang and transformers.

    Attributes:
        overwrite: replace an existing output.
    """

    proof: ClassVar[str] = "read back with its own reader, logits agree"
    overwrite: bool = False

    def export(self, source: Path, output: Path) -> tuple[Event, ...]:
        """Write the checkpoint `source` to the new folder `output`, reopen it and compare.

        Args:
            source: a folder in bitmend's own format.
            output: the folder to be.

        Returns:
            What the user must be told.

        Raises:
            RequestError: something that the format cannot hold, an output that exists, or compressed-tensors is not
                installed.
            CheckpointError: a source that is cut short, altered or inconsistent.
            ExportError: the reopened export does not give the logits of the source; the output is removed.

        Cost: a few hundred megabytes while writing; for the comparison the whole model, packed, and then, in another
        process, dense.
        """
        if importlib.util.find_spec("compressed_tensors") is None:
            raise RequestError(
                "an export to compressed-tensors is reopened with that package, which is not installed; "
                "run: pip install 'bitmend[export]'"
            )
        checkpoint = open_native(Path(source), "compressed-tensors")
        for name, entry in checkpoint.exported.items():
            _check_holds(name, entry, checkpoint)
        events = tuple(_events(checkpoint))
        # Rounding an embedding to the model's dtype is no error of the export, so the comparison must run in it.
        dtype = checkpoint.dtype if checkpoint.dequantised else None
        with CheckpointWriter(checkpoint.folder, output, self.overwrite) as writer:
            for number, tensors in enumerate(in_parts(_pieces(checkpoint))):
                writer.add(str(number), tensors)
            config = _quantization_config(checkpoint)
            writer.finish(config, {}, check=lambda folder: compare_logits(checkpoint.folder, folder, dtype))
        return events


def _check_holds(name: str, entry: ManifestEntry, checkpoint: NativeSource) -> None:
    spec, columns = entry.spec, entry.shape[1]
    if entry.kind == "conv1d":
        raise RequestError(f"{name} is a Conv1D of GPT-2, which compressed-tensors cannot hold; keep bitmend's format")
    if entry.kind != "linear":
        raise RequestError(
            f"{name} is a convolution, but an export to compressed-tensors holds linear layers only; keep bitmend's format"
        )
    if spec.grid.is_sign:
        raise RequestError(
            f"{name} has the one-bit grid -scale, +scale, which compressed-tensors cannot hold; keep bitmend's format"
        )
    if isinstance(spec.granularity, PerGroup) and columns % spec.granularity.size:
        raise RequestError(
            f"{name} has {columns} input channels in groups of {spec.granularity.size}; compressed-tensors cannot hold "
            f"a shorter last group; quantise with a group_size that divides the width"
        )
    scale = checkpoint.tensors[f"{name}.{SCALE}"]
    if not torch.equal(scale.to(checkpoint.dtype).float(), scale.float()):
        raise RequestError(
            f"{name} has scales in {spec.scale_dtype} that change when cast to {checkpoint.dtype}, the model's dtype, "
            f"as readers of compressed-tensors do; quantise with scales in the model's dtype"
        )


def _events(checkpoint: NativeSource) -> Iterator[Event]:
    yield from checkpoint.dequantised_events()
    if checkpoint.has_experts:
        yield Event("reader_limit", "experts", _how_experts_load(checkpoint))
    elif any(not entry.spec.grid.symmetric for entry in checkpoint.exported.values()):
        how = "only with CompressedTensorsConfig(dequantize=True)" if len(_groups(checkpoint)) == 1 else "not at all"
        yield Event(
            "reader_limit", "zero points", f"transformers 5.23 with compressed-tensors 0.20 loads zero points {how}"
        )
    schemes = {name: _scheme(entry.spec) for name, entry in checkpoint.exported.items()}
    yield from fusion_events(schemes, checkpoint.unquantised)


def _how_experts_load(checkpoint: NativeSource) -> str:
    whole = not any(".experts." in name for name in checkpoint.unquantised)
    symmetric = all(entry.spec.grid.symmetric for entry in checkpoint.exported.values())
    how = "not at all"
    if whole and symmetric and len(_groups(checkpoint)) == 1:
        how = "only with CompressedTensorsConfig(dequantize=True)"
    return f"transformers 5.23 with compressed-tensors 0.20 loads a mixture of experts like this one {how}"


def _pieces(checkpoint: NativeSource) -> Iterator[dict[str, Tensor]]:
    """Yield all tensors of the export, module by module."""
    for name in checkpoint.exported:
        yield _module_tensors(checkpoint.name_outside(name), checkpoint.packed(name), checkpoint.dtype)
    yield from checkpoint.other_tensors()


def _module_tensors(name: str, packed: PackedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    out = packed.shape[0]
    scale, zero_words = packed.scale, packed.zero_words
    if isinstance(packed.spec.granularity, PerTensor):  # as one equal scale per output channel, which is the same
        bits = packed.spec.grid.bits
        scale = scale.expand(out, 1)
        if zero_words is not None:
            zero_words = pack_codes(unpack_codes(zero_words.T, bits, 1).expand(1, out), bits).T
    if scale.dtype.itemsize > dtype.itemsize:
        scale = scale.to(dtype)  # exact, as checked
    tensors = {WORDS: packed.words, SCALE: scale.contiguous(), "weight_shape": torch.tensor(packed.shape)}
    if zero_words is not None:
        tensors[ZERO_WORDS] = zero_words.contiguous()
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def _scheme(spec: QuantSpec) -> tuple[int, bool, int | None]:
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else None
    return spec.grid.bits, spec.grid.symmetric, size


def _groups(checkpoint: NativeSource) -> dict[tuple[int, bool, int | None], list[str]]:
    groups: dict[tuple[int, bool, int | None], list[str]] = {}
    for name, entry in checkpoint.exported.items():
        groups.setdefault(_scheme(entry.spec), []).append(name)
    return groups


def _quantization_config(checkpoint: NativeSource) -> dict[str, Any]:
    groups = _groups(checkpoint)
    config_groups = {}
    for number, ((bits, symmetric, size), names) in enumerate(groups.items()):
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "actorder": None}
        weights |= {"strategy": "channel" if size is None else "group", "group_size": size}
        config_groups[f"group_{number}"] = {
            # With one scheme for all, the class is enough, and every reader understands it.
            "targets": ["Linear"] if len(groups) == 1 else [checkpoint.name_outside(name) for name in names],
            "format": FORMAT,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": [checkpoint.name_outside(name) for name in checkpoint.unquantised],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": importlib.metadata.version("compressed-tensors"),
    }
