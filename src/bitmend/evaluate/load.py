"""A model folder as a network that can be scored, or a sentence that says why not.

transformers skips what it does not know: an unknown quantisation method, a missing tensor (which then is random), a
tensor too many. Each of these gives numbers that look like a bad model, so each is refused here.
"""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from bitmend.errors import CheckpointError, QuantizationError, RequestError
from bitmend.models.architecture import encoder_class, tower_config, two_towers, why_no_image_classifier
from bitmend.models.bounds import no_more_than, stored
from bitmend.models.image_processor import PixelsOf, channels_of, load_processor
from bitmend.models.loading import AUTO_MODEL, CAUSAL_LM, CONFIG_FILE, IMAGE_CLASSIFIER, read_config, resolve_model
from bitmend.models.shards import check_index
from bitmend.models.tokenizer import load_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, an image classifier or an encoder in memory, in evaluation mode.

    Attributes:
        name: what reports call it.
        model: of transformers, or alike: `model(input_ids=..., use_cache=False).logits`, `config`, `device`; of an image
            classifier `model(pixel_values=...).logits`.
        tokenizer: of transformers; None of a model of pictures.
        processor: makes pixels of pictures; None of a model of texts.
        gives: what comes out of it.
        folder: where it comes from; None of a model that was made in memory.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    processor: PixelsOf | None = None
    gives: Literal["logits", "embeddings"] = "logits"
    folder: Path | None = None

    @property
    def reads(self) -> Literal["tokens", "pictures"]:
        """What it reads."""
        return "tokens" if self.processor is None else "pictures"


def register_formats() -> None:
    """Make bitmend's own checkpoint format known to transformers."""
    importlib.import_module("bitmend.formats.hf_quantizer")


def load_model(
    source: str | Path, device: str | torch.device, dtype: torch.dtype, tower: str | None = None
) -> LoadedModel:
    """Load a model and its tokenizer, or, if it reads pictures, its processor, from a folder or by a hub name.

    Args:
        source: folder or hub name.
        device: where the network goes.
        dtype: of weights that are not quantised and of all activations.
        tower: which part of a model with two towers; of no meaning for other models.

    Raises:
        ModelError: no such model, transformers does not know its architecture, or it has no tokenizer.
        CheckpointError: the weights do not belong to the config, are cut short, or are quantised in a way that this
            installation cannot read.
    """
    register_formats()
    folder = resolve_model(source)
    config = read_config(folder)
    _check_quantization(folder)
    check_index(folder)
    both = tower is not None and two_towers(config)
    task, pictures = _task_of(config)
    if both:
        task, pictures = AUTO_MODEL, tower == "vision"
    tokenizer = None if pictures else load_tokenizer(folder)
    processor = load_processor(folder, channels_of(config)) if pictures else None
    maker = getattr(transformers, task)
    try:
        with _without_progress_bars(), no_more_than(stored(folder)):
            model, loading = maker.from_pretrained(folder, config=config, dtype=dtype, output_loading_info=True)
    except QuantizationError:
        raise
    except Exception as error:  # readers of shards, quantisers and missing packages: all sorts of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{folder}: a complete checkpoint that transformers can load is required, but loading failed ({reason}); "
            "copy the model again, or install what the message asks for"
        ) from error
    _check_loading(folder, loading)
    if both and tower is not None:
        model = TowerOf(model.eval(), tower)
    gives: Literal["logits", "embeddings"] = "logits" if task in (CAUSAL_LM, IMAGE_CLASSIFIER) else "embeddings"
    return LoadedModel(str(source), model.to(device).eval(), tokenizer, processor, gives, folder)


class TowerOf(nn.Module):
    """One tower of a model with two, which is loaded whole, because one file may describe how both are quantised.

    Attributes:
        config: of the tower.
    """

    def __init__(self, model: Any, tower: str) -> None:
        super().__init__()
        self.model = model
        self.config = tower_config(model.config, tower)
        self._of_pictures = tower == "vision"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of its activations."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def forward(self, **call: Any) -> dict[str, Tensor]:
        """Return the embeddings, as the tower by itself calls them."""
        found = self.model.get_image_features(**call) if self._of_pictures else self.model.get_text_features(**call)
        embeddings: Tensor = getattr(found, "pooler_output", found)
        return {"image_embeds" if self._of_pictures else "text_embeds": embeddings}


def _task_of(config: Any) -> tuple[str, bool]:
    """Return the class of transformers that loads a model, and whether it reads pictures."""
    for reads in ("tokens", "pictures"):
        encoder = encoder_class(config, reads)
        if encoder is not None:
            return encoder, reads == "pictures"
    if why_no_image_classifier(config) is None:
        return IMAGE_CLASSIFIER, True
    return CAUSAL_LM, False


def check_context(model: LoadedModel, window_length: int) -> None:
    """Refuse windows that are longer than the model's context.

    Raises:
        RequestError: they are.
    """
    config: Any = model.model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context < window_length:
        raise RequestError(
            f"{model.name}: windows must fit the model's context of {context} tokens, but they have {window_length}; "
            f"pass --window-length {context} or less"
        )


def _check_quantization(folder: Path) -> None:
    content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    nested = content.get("text_config")
    description = content.get("quantization_config") or (
        nested.get("quantization_config") if isinstance(nested, dict) else None
    )
    if not description:
        return
    if not isinstance(description, dict) or not isinstance(description.get("quant_method"), str | None):
        raise CheckpointError(
            f"{folder}: quantization_config must be a table with a quant_method in words, but {CONFIG_FILE} says "
            f"{description!r:.80}; copy {CONFIG_FILE} again"
        )
    known = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    method = description.get("quant_method")
    bits_and_bytes = description.get("load_in_4bit") or description.get("load_in_8bit")
    if method not in known and not bits_and_bytes:
        raise CheckpointError(
            f"{folder}: a quantisation method that transformers or bitmend can read is required, but "
            f"{CONFIG_FILE} says {method!r}; known: {', '.join(sorted(known))}"
        )


def _check_loading(folder: Path, loading: dict[str, Any]) -> None:
    for kind, words in (
        ("missing_keys", "the file lacks"),
        ("mismatched_keys", "the shape differs from the config's for"),
        ("unexpected_keys", "the config has no place for"),
    ):
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in loading.get(kind, ()))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{folder}: exactly the tensors that {CONFIG_FILE} describes are required, but {words} "
                f"{', '.join(names[:3])}{more}; copy the model again, weights and config together"
            )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
