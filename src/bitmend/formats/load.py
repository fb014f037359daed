"""`bitmend.load(path)`: check a folder, then load it with transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from bitmend.errors import CheckpointError, QuantizationError
from bitmend.formats.hf_quantizer import VERIFY
from bitmend.formats.integrity import check_files, read_config, read_records, weight_files
from bitmend.formats.manifest import QUANT_METHOD, Manifest
from bitmend.models.bounds import check_counts, no_more_than, stored


def load(path: str | Path, *, verify: bool = True, **kwargs: Any) -> PreTrainedModel:
    """Return the model in a folder, quantised modules packed.

    Args:
        path: folder with config.json; bitmend's own format, or anything that transformers loads.
        verify: compare the checksums of the weight files, which reads every byte.
        **kwargs: for `from_pretrained`, for example `dtype` or `device_map`.

    Raises:
        CheckpointError: a missing or unfinished folder, a file that is cut short or altered, a manifest that does not
            agree with the files or the model, or a tensor that is missing or left over.
    """
    folder = Path(path)
    config = read_config(folder)
    quantization = config.get("quantization_config") or {}
    files = weight_files(folder)
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        records = check_files(files, Manifest.from_json(quantization), verify=verify)
    else:
        records = read_records(files)
    _check_depth(config, len(records))
    check_counts(config, folder / "config.json")
    try:
        parsed = transformers.AutoConfig.from_pretrained(folder)
        if getattr(parsed, "quantization_config", None) and quantization.get("quant_method") == QUANT_METHOD:
            parsed.quantization_config[VERIFY] = False  # done above, once
        model_class = _model_class(config, parsed)
        with no_more_than(stored(folder)):
            model, info = model_class.from_pretrained(folder, config=parsed, output_loading_info=True, **kwargs)
    except QuantizationError:
        raise
    except Exception as error:  # whatever transformers makes of a config that does not fit
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"transformers cannot load {folder}: {reason or type(error).__name__}") from error
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            word, first = key.removesuffix("_keys"), min(map(str, info[key]))
            raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {word} tensor {first}")
    return model


def _model_class(config: Mapping[str, Any], parsed: Any) -> Any:
    """Return the class that the checkpoint was saved from; when that is unknown, an image classifier or a language model."""
    names = config.get("architectures") or []
    known = [getattr(transformers, name, None) for name in names if isinstance(name, str)]
    if bool(known) and isinstance(known[0], type) and issubclass(known[0], PreTrainedModel):
        return known[0]
    pictures = type(parsed) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return transformers.AutoModelForImageClassification if pictures else transformers.AutoModelForCausalLM


def _check_depth(config: Mapping[str, Any], num_tensors: int) -> None:
    """Refuse a number of layers that the file cannot fill, before transformers builds a module for each."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_depth(value, num_tensors)
        elif "layer" in key and type(value) is int and value > num_tensors:
            raise CheckpointError(f"config.json asks for {key} = {value}, but the checkpoint has {num_tensors} tensors")
