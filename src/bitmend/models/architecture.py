"""What a config says a model is: a causal language model, an image classifier, or an encoder of text or pictures."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from bitmend.errors import ModelError
from bitmend.models.loading import IMAGE_CLASSIFIER

CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
ENCODER_ENDINGS = ("TextModel", "VisionModel", "ModelWithProjection")
TOWERS = ("vision", "text")
KEYS_OF = {"tokens": ("vocab_size",), "pictures": ("num_channels", "image_size")}


def architecture_name(config: Any) -> str:
    """Return the class that wrote the model, or its model type when the config names no class."""
    named = _named(config)
    return named[0] if named else str(getattr(config, "model_type", "unknown"))


def _named(config: Any) -> list[str]:
    """Return the classes that the config names, none when it names them wrongly."""
    named = getattr(config, "architectures", None)
    return named if isinstance(named, list) and all(isinstance(name, str) for name in named) else []


def refuse_quantised(config: Any, folder: Path) -> None:
    """Raise for weights that are codes already.

    Raises:
        ModelError: the config has a quantization_config.
    """
    found = getattr(config, "quantization_config", None)
    if not found:
        return
    method = found.get("quant_method", "unknown") if isinstance(found, dict) else type(found).__name__
    raise ModelError(
        f"{folder} is quantised already (quant_method {method!r}), need full-precision weights; "
        "give the model it was made from, or dequantise it first"
    )


def why_not_causal(config: Any) -> str | None:
    """Return why `config` does not describe a causal language model, or None when it does."""
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return "it is not a causal language model"
    named = _named(config)
    if named and named[0].endswith(CAUSAL_ENDINGS):
        return None
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return "it reads text in both directions"
    if not named or named[0] in _class_names(config):
        return None
    return "it is not a causal language model"


def why_no_image_classifier(config: Any) -> str | None:
    """Return why `config` does not describe an image classifier, or None when it does."""
    if IMAGE_CLASSIFIER in (getattr(config, "auto_map", None) or {}):
        return None
    mapping = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        return "it is not an image classifier"
    classes = mapping[type(config)]
    known = {one.__name__ for one in (classes if isinstance(classes, tuple) else (classes,))}
    named = _named(config)
    if not named or named[0] in known:
        return None
    return f"it is {named[0]} and not an image classifier"


def encoder_class(config: Any, reads: str) -> str | None:
    """Return the class of transformers that builds an encoder of `tokens` or `pictures`; None where it is none."""
    if two_towers(config) or getattr(config, "is_encoder_decoder", False) or why_not_causal(config) is None:
        return None
    if not any(hasattr(config, key) for key in KEYS_OF[reads]) or (
        reads == "pictures" and hasattr(config, "vocab_size")
    ):
        return None
    named = _named(config)
    base = transformers.MODEL_MAPPING[type(config)].__name__ if type(config) in transformers.MODEL_MAPPING else None
    if not named:
        return base
    kind = getattr(transformers, named[0], None)
    own = getattr(kind, "config_class", None) is type(config)
    return named[0] if named[0] == base or (own and named[0].endswith(ENCODER_ENDINGS)) else None


def two_towers(config: Any) -> bool:
    """Return whether a model is made of one encoder for text and another for pictures, as CLIP is."""
    parts = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    return None not in parts and all(tower_class(config, tower) for tower in TOWERS)


def tower_class(config: Any, tower: str) -> str | None:
    """Return the class of transformers that is one tower of a model with two, and reads its tensors by the same names."""
    stem = architecture_name(config).removesuffix("Model")
    name = f"{stem}{tower.capitalize()}ModelWithProjection"
    kind, part = getattr(transformers, name, None), getattr(config, f"{tower}_config", None)
    return name if kind is not None and getattr(kind, "config_class", None) is type(part) else None


def tower_config(config: Any, tower: str) -> Any:
    """Return the config of one tower, which names the class that reads it.

    Raises:
        ModelError: the model has no two towers.
    """
    if tower not in TOWERS:
        raise ModelError(f"a tower is {' or '.join(TOWERS)}, but {tower!r} came; give one of them")
    if not two_towers(config):
        raise ModelError(
            f"a model with a vision and a text tower, such as CLIPModel, is required to take its {tower} tower, but it is "
            f"{architecture_name(config)}; leave the tower out"
        )
    part = copy.deepcopy(getattr(config, f"{tower}_config"))
    part.architectures = [tower_class(config, tower)]
    for key in ("dtype", "projection_dim"):  # what stands in the whole config holds for its parts
        if getattr(config, key, None) is not None:
            setattr(part, key, getattr(config, key))
    return part


def _class_names(config: Any) -> set[str]:
    # A file of the bare base model will do when its head is tied; what is missing is reported tensor by tensor.
    mappings = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING)
    return {mapping[type(config)].__name__ for mapping in mappings if type(config) in mapping}


def context_of(model: Any) -> int | None:
    """Return how many tokens a model can read at once; None where its config does not say.

    Where positions are counted from behind the padding token's number, as RoBERTa's are, the first of them are never used.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        return None
    words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    tables = (part for part in model.modules() if isinstance(part, nn.Embedding) and part is not words)
    unused = [
        part.padding_idx + 1 for part in tables if part.num_embeddings == longest and part.padding_idx is not None
    ]
    return longest - max(unused, default=0)


def module_lists(model: nn.Module) -> str:
    """Return the outermost module lists of a model in words: `model.layers (2 x LlamaDecoderLayer)`."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            counts = Counter(type(item).__name__ for item in module)
            found[name] = f"{name} ({', '.join(f'{count} x {kind}' for kind, count in counts.items())})"
    return ", ".join(found.values()) if found else "no module list"


def modules_found(config: Any) -> str:
    """Return what the architecture is made of, in words, without its weights."""
    kind = getattr(transformers, architecture_name(config), None)
    if kind is None or not hasattr(kind, "_from_config"):
        return "its modules are unknown to transformers"
    try:
        with no_init_weights(), torch.device("meta"):
            return f"found {module_lists(kind._from_config(copy.deepcopy(config)))}"
    except Exception:  # only the ornament of an error sentence; the sentence itself must come through
        return "its modules could not be listed"
