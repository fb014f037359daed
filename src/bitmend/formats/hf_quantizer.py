"""Teaches transformers to load bitmend checkpoints; importing this module is all that is needed.

`AutoModelForCausalLM.from_pretrained(folder)` then swaps the quantised modules for packed ones before any weight is
read, checks the files against the manifest, and loads. `save_pretrained` writes the same tensors again, bit for bit.
Rule for checksums: transformers writes config.json before the weights, so a model saved by it carries none; such a
folder is checked by names, types and shapes only.

Experts that transformers packs into one parameter are taken apart as they were when the model was quantised
(`models/experts.py`); none of the conversions by which transformers merges single experts is then applied.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitmend.compensation import BIAS_DTYPE, CHILD, Compensation, attach_compensation_
from bitmend.errors import CheckpointError, ModelError, RecipeError
from bitmend.formats.integrity import check_files
from bitmend.formats.manifest import QUANT_METHOD, Manifest, ManifestEntry
from bitmend.formats.safetensors_file import TensorRecord
from bitmend.linalg.greedy_rotation import BlockRotation
from bitmend.linalg.hadamard import Rotation
from bitmend.linalg.learned_rotation import AnyRotation, LearnedRotation, StreamRotation, learned_size, num_codes
from bitmend.models.attention import attach_attention, hold_prefix_, use_rounding_attention_
from bitmend.models.experts import experts_of, unpack_experts_
from bitmend.numerics.activation_ranges import AnyRounding
from bitmend.numerics.activations import ActivationSpec
from bitmend.online import ROTATION_CODES, InputScheme, PrefixShape, attach_input, attach_output
from bitmend.runtime.conv import QuantConv2d
from bitmend.runtime.embedding import QuantEmbedding, TiedQuantHead
from bitmend.runtime.linear import QuantLinear
from bitmend.runtime.packed import SCALE, WORDS, ZERO_WORDS
from bitmend.sites import LAYER_VIEWS, layer_kind, read_matrix

# Key of `quantization_config`, in memory only, that switches the checksums off; see `BitmendConfig.verify`.
VERIFY = "verify"


@register_quantization_config(QUANT_METHOD)
class BitmendConfig(QuantizationConfigMixin):
    """`quantization_config` of a bitmend checkpoint, as transformers passes it around.

    Attributes:
        manifest: the content.
        verify: whether loading compares the checksums of the files. Not stored. To leave it out, set
            `config.quantization_config["verify"] = False` and pass `config=config` to `from_pretrained`.
    """

    def __init__(self, verify: bool = True, **config: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.verify = verify
        self.manifest = Manifest.from_json(config)

    def to_dict(self) -> dict[str, Any]:
        """Return what `save_pretrained` puts into config.json: everything but the checksums."""
        return self.manifest.with_files({}).to_json()


@register_quantizer(QUANT_METHOD)
class BitmendQuantizer(HfQuantizer):
    """Swaps modules before loading; see the module."""

    requires_calibration = True
    quantization_config: BitmendConfig

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        manifest = self.quantization_config.manifest
        unpack_experts_(model)
        records = None
        if checkpoint_files is not None:
            files = [Path(file) for file in checkpoint_files]
            records = check_files(files, manifest, verify=self.quantization_config.verify)
        swapped = swap_modules_(model, manifest, dtype)
        online = attach_online_(model, manifest)
        attending = attach_attentions_(model, manifest)
        compensated = attach_compensations_(model, manifest, records)
        _forget_ties(model, swapped)
        if records is not None:
            _check_model(model, records)
        self.quantization_config.manifest = Manifest(
            {swapped[name]: entry for name, entry in manifest.modules.items() if name in swapped},
            {swapped[head]: swapped[table] for head, table in manifest.tied.items() if head in swapped},
            manifest.provenance,
            manifest.files,
            {online[name]: _moved(scheme, online) for name, scheme in manifest.inputs.items() if name in online},
            {online[name]: _held_at(one, online) for name, one in manifest.outputs.items() if name in online},
            {attending[name]: scheme for name, scheme in manifest.attentions.items() if name in attending},
            {compensated[name]: one for name, one in manifest.compensations.items() if name in compensated},
        )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Keep packed tensors and scales as stored, whatever dtype the model is asked for in."""
        names = getattr(converter, "target_patterns", ())
        if any(name.rpartition(".")[2] in (WORDS, SCALE, ZERO_WORDS) or f".{CHILD}." in name for name in names):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Leave names and tensors alone where experts are single: our files have both as the model has them."""
        if experts_of(model):
            return []
        updated: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return updated

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def check_empty_model_(model: PreTrainedModel, manifest: Manifest, records: Mapping[str, TensorRecord]) -> None:
    """Compare a checkpoint with the model that its config describes, whose modules are swapped for it.

    Args:
        model: on meta.
        manifest: of the checkpoint.
        records: of all weight files.

    Raises:
        CheckpointError: a module or tensor that is missing, left over, or of another shape or kind.
    """
    _forget_ties(model, swap_modules_(model, manifest, None))
    attach_online_(model, manifest)
    attach_attentions_(model, manifest)
    attach_compensations_(model, manifest, records)
    _check_model(model, records)


def swap_modules_(model: nn.Module, manifest: Manifest, dtype: torch.dtype | None) -> dict[str, str]:
    """Put uninitialised packed modules in place of those that the manifest lists.

    Args:
        model: with its modules on any device (meta, while transformers loads); the new ones are made on the same.
        manifest: from the checkpoint.
        dtype: of biases and of the vectors that an embedding gives.

    Returns:
        Path in the manifest -> path in this model, which lacks the first part when only the inner model is loaded.
        Modules of a head that the model does not have are left out.

    Raises:
        CheckpointError: a module that does not exist, or has another shape or kind than the manifest says.
    """
    modules = dict(model.named_modules())
    swapped = _paths_in(model, manifest.modules, "quantises")
    for name, path in swapped.items():
        _replace(model, path, _packed_module(path, modules[path], manifest.modules[name], dtype))
    for head, table in manifest.tied.items():
        if head not in modules and _prefix_to_drop(model, manifest.modules):
            continue
        if head not in modules or layer_kind(modules[head]) != "linear":
            raise CheckpointError(f"the checkpoint ties {head} to {table}, but {head} is no linear layer of this model")
        embedding = model.get_submodule(swapped[table])
        _replace(model, head, TiedQuantHead(embedding, modules[head].bias))  # type: ignore[arg-type]
        swapped[head] = head
    return swapped


def attach_online_(model: nn.Module, manifest: Manifest) -> dict[str, str]:
    """Rotate and round activations at the modules that the manifest names, whenever the model runs.

    Returns:
        Path in the manifest -> path in this model, as `swap_modules_` does. Modules around the inner model are left out where
        only that is loaded.

    Raises:
        CheckpointError: a module that does not exist, or whose width does not suit what is to be done to it.
    """
    modules = dict(model.named_modules())
    rotations = [*(scheme.rotation for scheme in manifest.inputs.values()), *manifest.outputs.values()]
    holders = {rotation.holder: None for rotation in rotations if isinstance(rotation, LearnedRotation)}
    found = _paths_in(model, [*manifest.inputs, *manifest.outputs, *holders], "changes activations at")
    for name, path in found.items():
        module = modules[path]
        if name in manifest.inputs:
            scheme = manifest.inputs[name]
            _check_width(name, scheme, _features_read(module))
            _check_ranges(name, scheme.activations, 1)
            attach_input(module, replace(scheme, rotation=_with_codes(name, scheme.rotation, modules, found)))
        if name in manifest.outputs:
            _check_width(name, InputScheme(manifest.outputs[name]), _features_given(module))
            rotation = _with_codes(name, manifest.outputs[name], modules, found)
            assert rotation is not None
            assert not isinstance(rotation, BlockRotation)
            attach_output(module, rotation)
    return found


def _with_codes(
    name: str, rotation: AnyRotation | None, modules: Mapping[str, nn.Module], paths: Mapping[str, str]
) -> AnyRotation | None:
    """Return a learned rotation that reads its codes from its holder, where room is made for them; others as they are.

    Raises:
        CheckpointError: a holder that is none of the modules that the manifest names, or that has no weights.
    """
    if not isinstance(rotation, LearnedRotation):
        return rotation
    holder = modules[paths[rotation.holder]] if rotation.holder in paths else None
    held = (
        None
        if holder is None
        else next((one for ones in (holder.parameters(), holder.buffers()) for one in ones), None)
    )
    if holder is None or held is None:
        raise CheckpointError(
            f"the checkpoint looks for the codes of a rotation at {name} in {rotation.holder!r}, which holds none"
        )
    count = num_codes(learned_size(rotation.base))
    if ROTATION_CODES not in holder._buffers:
        holder.register_buffer(ROTATION_CODES, torch.zeros(count, dtype=torch.int16, device=held.device))
    if len(holder.get_buffer(ROTATION_CODES)) != count:
        raise CheckpointError(f"the checkpoint has learned rotations of several sizes in {rotation.holder}")
    return replace(rotation, codes=lambda: holder.get_buffer(ROTATION_CODES), _made={})


def _moved(scheme: InputScheme, paths: Mapping[str, str]) -> InputScheme:
    rotation = scheme.rotation
    return replace(scheme, rotation=_held_at(rotation, paths)) if isinstance(rotation, LearnedRotation) else scheme


def _held_at(rotation: StreamRotation, paths: Mapping[str, str]) -> StreamRotation:
    """Return a learned rotation whose holder is named as in this model, which may lack the first part of a path."""
    return replace(rotation, holder=paths[rotation.holder]) if isinstance(rotation, LearnedRotation) else rotation


def attach_attentions_(model: PreTrainedModel, manifest: Manifest) -> dict[str, str]:
    """Let the modules that the manifest names round what they attend with, whenever the model runs.

    Returns:
        Path in the manifest -> path in this model, as `swap_modules_` does.

    Raises:
        CheckpointError: a module that does not exist, whose heads do not suit what is to be done to them, or a model that
            attends by itself.
    """
    found = _paths_in(model, manifest.attentions, "rounds keys and values at")
    if not found:
        return found
    try:
        use_rounding_attention_(model)
    except ModelError as error:
        raise CheckpointError(f"the checkpoint rounds keys and values, but {error}") from error
    for name, path in found.items():
        module, scheme = model.get_submodule(path), manifest.attentions[name]
        width = getattr(module, "head_dim", None)  # where the module does not say, running it will
        if isinstance(width, int) and scheme.rotation is not None and width % scheme.rotation.size:
            raise CheckpointError(
                f"the checkpoint rotates heads of {scheme.rotation.size} features at {name}, which has {width}"
            )
        for spec in (scheme.queries, scheme.keys, scheme.values):
            if spec is not None and isinstance(width, int):
                _check_groups(name, spec, width)
        heads = getattr(getattr(module, "config", None), "num_key_value_heads", None)
        for spec in (scheme.keys, scheme.values):
            _check_ranges(name, spec, heads)
        if scheme.prefix is not None:
            _check_prefix(name, scheme.prefix, heads, width)
            _hold_empty_prefix_(model, module, scheme.prefix)
        attach_attention(module, scheme)
    return found


def attach_compensations_(
    model: nn.Module, manifest: Manifest, records: Mapping[str, TensorRecord] | None = None
) -> dict[str, str]:
    """Put empty maps beside the blocks that the manifest names, which change what these give, whenever the model runs.

    Returns:
        Path in the manifest -> path in this model, as `swap_modules_` does.

    Raises:
        CheckpointError: a block that does not exist, that would run its children in a row, or whose map is in no file.
    """
    found = _paths_in(model, manifest.compensations, "has a map beside")
    for name, path in found.items():
        block, shape = model.get_submodule(path), manifest.compensations[name]
        if isinstance(block, nn.Sequential) or CHILD in block._modules:
            raise CheckpointError(
                f"the checkpoint has a map beside {name}, where {type(block).__name__} has no place for one"
            )
        device = next((one.device for one in (*block.parameters(), *block.buffers())), torch.device("cpu"))
        tensors = {}
        for key, wanted in shape.shapes.items():
            record = None if records is None else records.get(f"{name}.{CHILD}.{key}")
            if records is not None and record is None:
                raise CheckpointError(f"the checkpoint lacks {name}.{CHILD}.{key}, which its manifest announces")
            if record is not None and tuple(record.shape) != wanted:
                raise CheckpointError(
                    f"{name}.{CHILD}.{key} has the shape {tuple(record.shape)} in the file, but {wanted} by the manifest"
                )
            dtype = BIAS_DTYPE if key == "bias" else torch.bfloat16 if record is None else record.dtype
            if not dtype.is_floating_point:
                raise CheckpointError(f"{name}.{CHILD}.{key} must hold floating numbers, but is {dtype} in the file")
            tensors[key] = torch.zeros(wanted, dtype=dtype, device=device)
        attach_compensation_(block, Compensation(shape, tensors))
    return found


def _check_ranges(name: str, spec: AnyRounding | None, heads: int | None) -> None:
    """Refuse ranges that are neither one for all nor one for each head; `heads` where the module does not say."""
    count = len(spec.ranges) if isinstance(spec, ActivationSpec) and spec.ranges is not None else 1
    if count > 1 and heads is not None and count != heads:
        raise CheckpointError(f"the checkpoint rounds by {count} ranges at {name}, which has {heads}")


def _check_prefix(name: str, prefix: PrefixShape, heads: Any, width: Any) -> None:
    """Refuse a prefix of other heads than the module has; None where the module does not say."""
    for what, found, wanted in (("heads", prefix.heads, heads), ("features of a key", prefix.key_width, width)):
        if isinstance(wanted, int) and found != wanted:
            raise CheckpointError(f"the checkpoint has a prefix of {found} {what} at {name}, which has {wanted}")


def _hold_empty_prefix_(model: PreTrainedModel, module: nn.Module, prefix: PrefixShape) -> None:
    """Make room for the keys and values that the files hold, where the module's weights are."""
    held = next((tensor for tensors in (module.parameters(), module.buffers()) for tensor in tensors), None)
    if held is None:
        raise CheckpointError(
            f"the checkpoint has a prefix at {type(module).__name__}, which holds no layers to attend with"
        )
    tensors = [torch.empty(shape, dtype=model.dtype, device=held.device) for shape in prefix.shapes.values()]
    hold_prefix_(module, *tensors)


def _prefix_to_drop(model: nn.Module, names: Iterable[str]) -> str:
    """Return what paths of the whole model have in front in this one, if it is the inner model alone; else nothing."""
    modules = dict(model.named_modules())
    whole = any(name in modules for name in names)
    return "" if whole else f"{getattr(model, 'base_model_prefix', '')}."


def _paths_in(model: nn.Module, names: Iterable[str], what: str) -> dict[str, str]:
    """Return path in the manifest -> path in this model; modules around an inner model that is loaded alone are left out.

    Raises:
        CheckpointError: a module that does not exist; says `what` the checkpoint does to it.
    """
    names, modules = list(names), dict(model.named_modules())
    prefix = _prefix_to_drop(model, names)
    found = {}
    for name in names:
        path = name.removeprefix(prefix)
        if path in modules:
            found[name] = path
        elif not prefix or name.startswith(prefix):
            raise CheckpointError(f"the checkpoint {what} {name}, which {type(model).__name__} does not have")
    return found


def _features_read(module: nn.Module) -> int | None:
    """Return how many features, on the last axis, a layer or a norm reads; None when it does not say."""
    if isinstance(module, nn.Conv2d | QuantConv2d):  # its features are the channels
        return None
    if layer_kind(module) is not None:
        return int(read_matrix(module).shape[1])
    features = getattr(module, "in_features", None)
    weight = getattr(module, "weight", None) if features is None else None
    if isinstance(weight, Tensor) and weight.ndim == 1:
        return len(weight)
    shape = getattr(module, "normalized_shape", None)  # of a norm without a weight
    return shape[-1] if features is None and isinstance(shape, tuple) and len(shape) == 1 else features


def _features_given(module: nn.Module) -> int | None:
    """Return how many features an embedding gives, None when it does not say."""
    width = getattr(module, "embedding_dim", None)
    return width if isinstance(width, int) else None


def _check_width(name: str, scheme: InputScheme, width: int | None) -> None:
    spec = scheme.activations
    if width is None and scheme.rotation is None and spec is not None and _has_one_range(spec):
        return
    if width is None:
        raise CheckpointError(
            f"the checkpoint changes activations at {name}, which is no layer, norm or embedding with its features on the "
            "last axis"
        )
    whole = isinstance(scheme.rotation, (BlockRotation, LearnedRotation))
    exactly = whole or (isinstance(scheme.rotation, Rotation) and scheme.rotation.keeps_mean)
    inner = 1 if scheme.rotation is None else scheme.rotation.inner
    size = 0 if scheme.rotation is None else scheme.rotation.size * inner
    if size and (width != size if exactly else width % size):
        raise CheckpointError(f"the checkpoint rotates {size // inner} x {inner} features at {name}, which has {width}")
    if spec is not None:
        _check_groups(name, spec, width)


def _has_one_range(spec: AnyRounding) -> bool:
    """Return whether all values are rounded alike, wherever their features are."""
    return not isinstance(spec, ActivationSpec) or (spec.ranges is not None and len(spec.ranges) == 1)


def _check_groups(name: str, spec: AnyRounding, width: int) -> None:
    try:
        if isinstance(spec, ActivationSpec):
            spec.check_width(width)
    except RecipeError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _packed_module(path: str, module: nn.Module, entry: ManifestEntry, dtype: torch.dtype | None) -> nn.Module:
    kind = "embedding" if type(module) is nn.Embedding else layer_kind(module)
    if kind != entry.kind:
        raise CheckpointError(
            f"{path} is of kind {entry.kind!r} in the checkpoint, but {type(module).__name__} in the model"
        )
    weight = module.get_parameter("weight")
    shape = tuple((LAYER_VIEWS[kind].read(module) if kind in LAYER_VIEWS else weight).shape)
    if shape != entry.shape:
        raise CheckpointError(f"{path} has the shape {entry.shape} in the checkpoint, but {shape} in the model")
    dtype = dtype or weight.dtype
    if isinstance(module, nn.Embedding):
        padding = module.padding_idx
        return QuantEmbedding(*shape, entry.spec, padding_idx=padding, dtype=dtype, device=weight.device)
    if isinstance(module, nn.Conv2d):
        return QuantConv2d(module, entry.spec, dtype=dtype)
    bias = getattr(module, "bias", None) is not None
    return QuantLinear(shape[1], shape[0], entry.spec, bias=bias, dtype=dtype, device=weight.device)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent).register_module(leaf, module)


def _forget_ties(model: PreTrainedModel, swapped: Mapping[str, str]) -> None:
    """Drop the ties of weights that no longer exist; `TiedQuantHead` shares the table by itself."""
    gone = {f"{path}.weight" for path in swapped.values()}

    def alive(ties: Mapping[str, str]) -> dict[str, str]:
        return {target: source for target, source in ties.items() if not gone & {target, source}}

    model.all_tied_weights_keys = alive(model.all_tied_weights_keys)
    for name, module in model.named_modules():
        ties = getattr(module, "_tied_weights_keys", None)
        if isinstance(module, PreTrainedModel) and isinstance(ties, dict):
            start = f"{name}." if name else ""
            kept = alive({start + target: start + source for target, source in ties.items()})
            if len(kept) < len(ties):
                module._tied_weights_keys = {
                    target.removeprefix(start): source.removeprefix(start) for target, source in kept.items()
                } or None


def _check_model(model: PreTrainedModel, records: Mapping[str, TensorRecord]) -> None:
    """Compare names, shapes and kinds of number of all tensors with those of the model.

    A tensor that is missing would be initialised at random, with no more than a warning of transformers. Classes other
    than the saved one may have another head; names that transformers converts while loading cannot be judged here.
    """
    wanted: dict[str, Tensor] = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    present = {}
    for name, record in records.items():
        match = next((key for key in (name, prefix + name, name.removeprefix(prefix)) if key in wanted), None)
        if match is not None:
            present[match] = record
    for name, record in present.items():
        if tuple(wanted[name].shape) != record.shape:
            shape = tuple(wanted[name].shape)
            raise CheckpointError(f"{name} has the shape {record.shape} in the file, but {shape} in the model")
        if name.endswith(f".{ROTATION_CODES}") and record.dtype != torch.int16:
            raise CheckpointError(f"{name} must be of 16-bit whole numbers, but is {record.dtype} in the file")
        if wanted[name].dtype.is_floating_point != record.dtype.is_floating_point:
            raise CheckpointError(f"{name} is {record.dtype} in the file, but {wanted[name].dtype} in the model")
    codes = {name for name in wanted if name.rpartition(".")[2] == ROTATION_CODES and name not in present}
    if codes:
        raise CheckpointError(f"the checkpoint lacks {min(codes)}, without which a rotation is nothing")
    saved = getattr(model.config, "architectures", None) or []
    if type(model).__name__ not in saved or _converts(model):
        return
    missing = set(wanted) - set(present) - _filled_by_ties(model, present)
    missing = {name for name in missing if not _ignored(name, model._keys_to_ignore_on_load_missing)}
    if missing:
        raise CheckpointError(f"the checkpoint lacks {min(missing)}, which {type(model).__name__} needs")


def _filled_by_ties(model: PreTrainedModel, present: Mapping[str, TensorRecord]) -> set[str]:
    pairs = model.all_tied_weights_keys.items()
    return {target for target, source in pairs if source in present} | {
        source for target, source in pairs if target in present
    }


def _ignored(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _converts(model: PreTrainedModel) -> bool:
    from transformers.conversion_mapping import get_model_conversion_mapping

    if experts_of(model):
        return False
    return bool(get_model_conversion_mapping(model, add_legacy=False))
