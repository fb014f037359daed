"""From a name to a folder, from a folder to a config, from a config to a model without weights."""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from bitmend.errors import ModelError, QuantizationError, is_whole_text
from bitmend.models import cifar_resnet as _registers_its_classes  # noqa: F401
from bitmend.models.bounds import Stored, check_counts, no_more_than, refuse_special_files

CONFIG_FILE = "config.json"
CAUSAL_LM, IMAGE_CLASSIFIER = "AutoModelForCausalLM", "AutoModelForImageClassification"
AUTO_MODEL = "AutoModel"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
POOLING_FILE = "1_Pooling/config.json"  # of sentence-transformers: how states of tokens become one of a text
HUB_FILES = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken"]


def resolve_model(name: str | Path) -> Path:
    """Return the local folder of a model, downloading it from the hub when `name` is a hub name.

    Raises:
        ModelError: there is no such folder, or the download failed.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{name} is a file, need the folder of a model; give the folder that holds {CONFIG_FILE}")
    if isinstance(name, Path) or not HUB_NAME.fullmatch(name):
        raise ModelError(f"the model folder {name} does not exist; give an existing folder or a hub name like org/name")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # only hub names need it

    try:
        # A second copy of the weights in a subfolder (original/, onnx/) is not wanted.
        snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"])
        return Path(snapshot_download(name, allow_patterns=[POOLING_FILE]))
    except Exception as error:  # the hub client's errors have no common root; the user needs one sentence of each
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{name} is no local folder and could not be fetched from the hub ({reason}); "
            "check the name, the network and your login, or give a local folder"
        ) from error


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a model folder.

    Raises:
        ModelError: there is no config, it is broken, or transformers does not know its model type.
        CheckpointError: it asks for numbers of layers, heads or labels that cannot be meant, or something in the folder is
            no file.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelError(f"{folder} has no {CONFIG_FILE}; give the folder of a model as save_pretrained writes it")
    refuse_special_files(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, need a JSON object; copy it again")
    if not is_whole_text(content):
        raise ModelError(f"{path} is not readable JSON (half of a character stands in it); copy it again")
    check_counts(content, path)
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # config classes and code that comes with a model raise whatever they like
        raise ModelError(_config_sentence(path, content, trust_remote_code, error)) from error


def _config_sentence(path: Path, content: dict[str, Any], trust_remote_code: bool, error: Exception) -> str:
    model_type = content.get("model_type")
    if content.get("auto_map") and not trust_remote_code:
        return f"{path} (model_type {model_type!r}) needs code that comes with the model; {TRUST_HINT}"
    if model_type is None:
        return f"{path} has no model_type, so its architecture is unknown; give a model that transformers can load"
    reason = " ".join(str(error).split())
    return f"transformers {transformers.__version__} cannot read {path} (model_type {model_type!r}): {reason}"


TRUST_HINT = "read that code, and allow it with trust_remote_code if you trust it"


def empty_model(
    config: Any,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    held: Stored | None = None,
    *,
    task: str = CAUSAL_LM,
) -> nn.Module:
    """Return the model of `config` for one task with parameters on the meta device and real buffers.

    Costs neither memory nor time, whatever the size of the model. Tied weights are not tied yet.

    Args:
        config: of transformers; not changed.
        dtype: of parameters and computed buffers; None for the config's own.
        trust_remote_code: allow code that comes with the model.
        held: how much the weight files hold; None does not bound the model.
        task: a class of transformers: an Auto class, or a model's own.

    Raises:
        ModelError: transformers cannot build the model.
        CheckpointError: the config asks for more than the files could fill.
    """
    config = copy.deepcopy(config)
    options = {} if dtype is None else {"dtype": dtype}
    if held is not None:
        _build_nothing(task, config, trust_remote_code, held)
    try:
        with no_init_weights(), _parameters_on_meta():
            model = build(task, config, trust_remote_code, **options)
    except Exception as error:  # as above
        if task in (getattr(config, "auto_map", None) or {}) and not trust_remote_code:
            raise ModelError(f"the model needs code that comes with it; {TRUST_HINT}") from error
        reason = " ".join(str(error).split())
        raise ModelError(
            f"transformers cannot build the model from its config ({reason}); check config.json"
        ) from error
    return model.eval()


def build(task: str, config: Any, trust_remote_code: bool = False, **options: Any) -> nn.Module:
    """Return a new model of a class of transformers, an Auto class or a model's own; `config` becomes its config."""
    maker = getattr(transformers, task)
    model: nn.Module
    if hasattr(maker, "from_config"):
        model = maker.from_config(config, trust_remote_code=trust_remote_code, **options)
    else:
        model = maker._from_config(config, **options)
    return model


def _build_nothing(task: str, config: Any, trust_remote_code: bool, held: Stored) -> None:
    """Build the model without any memory, buffers neither, to see what it asks for.

    What else may go wrong is for the real building to tell.
    """
    try:
        with no_init_weights(), torch.device("meta"), no_more_than(held):
            build(task, copy.deepcopy(config), trust_remote_code)
    except QuantizationError:
        raise
    except Exception:  # code of a model that cannot be built on meta
        return


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to meta as it is registered.

    Under `torch.device("meta")` the buffers (rotary frequencies, embedding scales) would be lost as well, and nothing
    in a checkpoint brings them back. Memory that is only allocated and never written costs no pages.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        stored = module._parameters[name]
        if stored is not None:
            module._parameters[name] = nn.Parameter(stored.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
