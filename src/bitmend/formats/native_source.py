"""bitmend's own checkpoint as what an export starts from: opened, checked, and handed on in bounded pieces."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from bitmend.errors import CheckpointError, QuantizationError, RequestError
from bitmend.formats.hf_quantizer import check_empty_model_
from bitmend.formats.integrity import check_files, read_config, weight_files
from bitmend.formats.manifest import QUANT_METHOD, Manifest, ManifestEntry
from bitmend.formats.native import read_packed
from bitmend.formats.safetensors_file import StoredTensors
from bitmend.models import loading as models
from bitmend.models.architecture import why_not_causal
from bitmend.models.bounds import no_more_than, stored
from bitmend.models.experts import experts_of, router_paths, stored_names, unpack_experts_
from bitmend.models.tensor_source import checkpoint_names
from bitmend.protocols import Event
from bitmend.runtime.packed import SCALE, WORDS, ZERO_WORDS, PackedWeight

# vLLM computes these projections as one matrix, which has one scheme.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_EXPERT = re.compile(r"(.*experts)\.\d+\.")
_PART_BYTES = 256 << 20


@dataclass(frozen=True)
class NativeSource:
    """The source, opened.

    Attributes:
        folder: where it lies.
        dtype: of the model.
        tensors: all that the files hold.
        exported: modules that stay quantised.
        dequantised: embedding and head, when they are quantised.
        unquantised: linear layers and routers that are not exported as quantised.
        has_experts: whether it is a mixture of experts, whose experts are stored one by one.
        renamed: gives a tensor's name in the checkpoints of this architecture, which readers of exports look for.
    """

    folder: Path
    dtype: torch.dtype
    tensors: StoredTensors
    exported: Mapping[str, ManifestEntry]
    dequantised: Mapping[str, ManifestEntry]
    unquantised: tuple[str, ...]
    has_experts: bool = False
    renamed: Callable[[str], str] = str

    def name_outside(self, module: str) -> str:
        """Return what a module is called in the export."""
        return self.renamed(f"{module}.weight").removesuffix(".weight")

    def packed(self, name: str) -> PackedWeight:
        """Return the packed weight of an exported module."""
        return read_packed(self.tensors, name, self.exported[name])

    def other_tensors(self) -> Iterator[dict[str, Tensor]]:
        """Yield, one at a time, the tensors of everything that is not exported as quantised, as the export has them."""
        for name, entry in self.dequantised.items():
            yield {f"{name}.weight": read_packed(self.tensors, name, entry).dequantize(self.dtype)}
        quantised = {*self.exported, *self.dequantised}
        for name in self.tensors:
            module, _, leaf = name.rpartition(".")
            if module not in quantised or leaf not in (WORDS, SCALE, ZERO_WORDS):
                yield {self.renamed(name): self.tensors[name]}

    def dequantised_events(self) -> Iterator[Event]:
        """Yield what the user must be told of a quantised embedding or head."""
        for name in self.dequantised:
            yield Event("dequantised", name, f"{name} is written in {self.dtype}: readers expect it unquantised")


def open_native(folder: Path, target: str) -> NativeSource:
    """Check a checkpoint in bitmend's own format and open it for an export.

    Args:
        folder: the checkpoint.
        target: the format that it will be written in, for the error sentences.

    Raises:
        RequestError: not bitmend's own format, no causal language model, or nothing that the target could hold.
        CheckpointError: files that are cut short, altered or inconsistent.

    Cost: reads every byte once, for the checksums.
    """
    quantization = read_config(folder).get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise RequestError(f"{folder} is not in bitmend's own format; only such a checkpoint can be exported")
    manifest = Manifest.from_json(quantization)
    if manifest.compensations:
        raise RequestError(
            f"{folder} has maps beside its blocks (at {next(iter(manifest.compensations))}, for one), which an export to "
            f"{target} does not hold; keep bitmend's format"
        )
    changed = {**manifest.inputs, **manifest.outputs, **manifest.attentions}
    if changed:
        where = next(iter(changed))
        raise RequestError(
            f"{folder} rotates or rounds activations while it runs (at {where}, for one), which an export to {target} "
            "does not hold yet; keep bitmend's format"
        )
    files = weight_files(folder)
    records = check_files(files, manifest)
    model = _empty_model(folder, target)
    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    outside = {name for name, module in model.named_modules() if module is head}
    dequantised = {
        name: entry for name, entry in manifest.modules.items() if entry.kind == "embedding" or name in outside
    }
    exported = {name: entry for name, entry in manifest.modules.items() if name not in dequantised}
    if not exported:
        raise RequestError(f"{folder} has no quantised layer that {target} could hold")
    unquantised = tuple(name for name in dict.fromkeys((*linears, *router_paths(model))) if name not in exported)
    has_experts = bool(experts_of(model))
    if has_experts and stored_names(model) is None:
        raise RequestError(
            f"{folder} is {type(model).__name__}, whose checkpoints hold all experts of a layer in one tensor, so that no "
            f"reader of {target} looks for them one by one; keep bitmend's format"
        )
    renamed = checkpoint_names(model) if has_experts else str
    dtype = model.dtype
    check_empty_model_(model, manifest, records)
    tensors = StoredTensors(files)
    return NativeSource(folder, dtype, tensors, exported, dequantised, unquantised, has_experts, renamed)


def in_parts(pieces: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the same tensors in dictionaries of a bounded number of bytes."""
    part: dict[str, Tensor] = {}
    for tensors in pieces:
        part |= tensors
        if sum(tensor.nbytes for tensor in part.values()) >= _PART_BYTES:
            yield part
            part = {}
    if part:
        yield part


def fusion_events(schemes: Mapping[str, object], unquantised: Iterable[str]) -> Iterator[Event]:
    """Yield an event for matrices that vLLM computes as one and that do not share one scheme: projections, and experts.

    Args:
        schemes: of the quantised modules; anything that can be compared.
        unquantised: the linear layers without a scheme.
    """
    present = {*schemes, *unquantised}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in schemes):
        for leaves in _FUSED:
            names = [f"{parent}.{leaf}" for leaf in leaves if f"{parent}.{leaf}" in present]
            if len({schemes.get(name) for name in names}) > 1:
                yield Event(
                    "vllm_fusion",
                    parent,
                    f"{', '.join(leaves)} of {parent} have different schemes; vLLM computes them as one and refuses",
                )
    experts: dict[str, set[object]] = {}
    for name in present:
        if found := _EXPERT.match(name):
            experts.setdefault(found[1], set()).add(schemes.get(name))
    for parent in sorted(parent for parent, used in experts.items() if len(used) > 1):
        message = f"the experts of {parent} have different schemes; vLLM computes them as one and refuses"
        yield Event("vllm_fusion", parent, message)


def _empty_model(folder: Path, target: str) -> transformers.PreTrainedModel:
    config = models.read_config(folder)
    reason = why_not_causal(config)
    if reason is not None:
        raise RequestError(
            f"only causal language models are exported to {target}; {folder} is {type(config).__name__}: {reason}"
        )
    del config.quantization_config
    try:
        with torch.device("meta"), no_more_than(stored(folder)):
            model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    except QuantizationError:
        raise
    except Exception as error:  # model classes raise whatever they like
        reason = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"transformers cannot build the model that {folder / 'config.json'} describes ({reason}); copy it again"
        ) from error
    unpack_experts_(model)
    return model
