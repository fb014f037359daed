"""What a config says a model is, and whether it is a causal language model."""

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
    if not named or named[0].endswith(CAUSAL_ENDINGS) or named[0] in _class_names(config):
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


def _class_names(config: Any) -> set[str]:
    # A file of the bare base model will do when its head is tied; what is missing is reported tensor by tensor.
    mappings = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING)
    return {mapping[type(config)].__name__ for mapping in mappings if type(config) in mapping}


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
