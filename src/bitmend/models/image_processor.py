"""The image processor of a model folder: from pictures to the numbers that the model reads.

Resizing, cropping and normalising are transformers' own, in the form that needs Pillow and numpy only.
"""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from bitmend.errors import CalibrationError, ModelError
from bitmend.models.bounds import refuse_special_files

PROCESSOR_FILE = "preprocessor_config.json"
COMBINED_FILE = "processor_config.json"  # of models that also read text; transformers looks into it first
MODES = {1: "L", 3: "RGB"}

# A few characters in the file could otherwise ask for terabytes.
LARGEST_EDGE = 4096
SMALLEST_CROP = 0.1

USUAL_CHANNELS = 3
# transformers would load whatever class of its own is named, a whole model too.
PROCESSOR_CLASS = re.compile(r"\w*(ImageProcessor(Fast|Pil)?|FeatureExtractor)")


def channels_of(config: Any) -> int:
    """Return how many channels the pictures of a model have, as its config says; 3 where it says nothing."""
    channels = getattr(config, "num_channels", None)
    return channels if isinstance(channels, int) else USUAL_CHANNELS


@dataclass(frozen=True)
class PixelsOf:
    """Turns pictures of any mode and size into what the model reads; made by `load_processor`.

    Attributes:
        processor: of transformers.
        channels: 1: grey, 3: colour.
        folder: where the processor comes from.
        size: (channels, height, width) of what it gives; None when that depends on the picture.
    """

    processor: Any
    channels: int
    folder: Path
    size: tuple[int, int, int] | None

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "image channel height width"]:
        """Resize, crop and normalise pictures, each by itself, so that none changes with what is beside it.

        Transparent pictures are laid on white, 16-bit grey is scaled to 8 bits, then all take the mode of the model.

        Raises:
            CalibrationError: there is no picture, one cannot be processed, or they come out at different sizes.
        """
        if not images:
            raise CalibrationError(f"{self.folder}: at least one picture is required, but none came; give a picture")
        rows: list[Tensor] = []
        for number, image in enumerate(images):
            try:
                rows.append(_apply(self.processor, image, self.channels))
            except Exception as error:  # image processors raise whatever they like
                raise CalibrationError(
                    f"the image processor of {self.folder} must accept every picture, but it failed on picture {number} "
                    f"of {len(images)}, {image.width} x {image.height} in mode {image.mode} ({_reason(error)}); "
                    "leave the picture out"
                ) from error
            if rows[-1].shape != rows[0].shape:
                raise CalibrationError(
                    f"all pictures must come out of the image processor of {self.folder} at one size, but picture {number} "
                    f"comes out as {tuple(rows[-1].shape)} and the first as {tuple(rows[0].shape)}; give pictures of one "
                    f"size, or let {PROCESSOR_FILE} resize or crop to a fixed one"
                )
        return torch.stack(rows)


def load_processor(folder: Path, channels: int = 3) -> PixelsOf:
    """Return the image processor of a model folder; code that comes with a model is never run.

    Args:
        folder: of a model, with a `preprocessor_config.json`.
        channels: `num_channels` of the model's config, 1 or 3.

    Raises:
        ModelError: there is none, it cannot be read, transformers does not know its class, it asks for absurd sizes, or
            it does not give what a model of `channels` channels reads.
        CheckpointError: something in the folder is no file.

    Cost: two small pictures are processed, to see that it works.
    """
    if channels not in MODES:
        raise ModelError(
            f"{folder}: a model that reads pictures of 1 (grey) or 3 (colour) channels is required, but its num_channels "
            f"is {channels}; give another model"
        )
    refuse_special_files(folder)
    path = _check_settings(folder)
    try:
        with _quiet():
            processor = transformers.AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # as above
        raise ModelError(
            f"{path}: an image processor that transformers {transformers.__version__} can run without torchvision is "
            f"required, but it could not be loaded ({_reason(error)}); copy the file of the original model"
        ) from error
    if not isinstance(processor, BaseImageProcessor):
        raise ModelError(
            f"{path}: an image processor is required, but it names {type(processor).__name__}; copy the file of the "
            "original model"
        )
    return PixelsOf(processor, channels, folder, _size_of(processor, channels, path))


# ------------------------------------------------------------------------------------------------------ the settings
def _check_settings(folder: Path) -> Path:
    """Refuse a missing or broken file, a class that is none of image processors, and absurd sizes; return the file."""
    for path in (folder / COMBINED_FILE, folder / PROCESSOR_FILE):
        if not path.is_file():
            continue
        settings: Any = _read_object(path)
        if path.name == COMBINED_FILE:
            settings = settings.get("image_processor")
        if isinstance(settings, dict):
            _check_class(path, settings)
            _check_sizes(path, settings)
            return path
    raise ModelError(
        f"{folder} has no {PROCESSOR_FILE}, which says how pictures are resized and normalised; copy that of the "
        "original model into the folder"
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, need a JSON object; copy it again")
    return content


def _check_class(path: Path, settings: dict[str, Any]) -> None:
    for key in ("image_processor_type", "feature_extractor_type"):
        name = settings.get(key)
        if name is not None and not (isinstance(name, str) and PROCESSOR_CLASS.fullmatch(name)):
            raise ModelError(
                f"{path}: {key} must name an image processor of transformers, such as ViTImageProcessor, but it is "
                f"{name!r:.80}; copy the file of the original model"
            )


def _check_sizes(path: Path, settings: dict[str, Any]) -> None:
    for key in ("size", "crop_size", "pad_size"):
        value = settings.get(key)
        edges = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for edge in edges:
            if isinstance(edge, int | float) and not 1 <= edge <= LARGEST_EDGE:
                raise ModelError(
                    f"{path} asks for {key} = {value!r:.80}, edges of 1 to {LARGEST_EDGE} pixels can be meant; copy the "
                    "file of the original model"
                )
    crop = settings.get("crop_pct")
    if isinstance(crop, int | float) and not SMALLEST_CROP <= crop <= 1:
        raise ModelError(
            f"{path} asks for crop_pct = {crop!r:.30}, a share of {SMALLEST_CROP} to 1 can be meant; copy the file of the "
            "original model"
        )


def _size_of(processor: Any, channels: int, path: Path) -> tuple[int, int, int] | None:
    """Try two grey pictures of different form; the size is fixed when both come out alike."""
    sizes = []
    for form in ((64, 64), (96, 48)):
        try:
            pixels = _apply(processor, Image.new("L", form, 128), channels)
        except Exception as error:  # settings that contradict each other show only when they are used
            raise ModelError(
                f"{path}: an image processor for {channels} channels is required, but it fails on a grey picture "
                f"({_reason(error)}); give the file that belongs to this model"
            ) from error
        if not bool(pixels.isfinite().all()):
            raise ModelError(
                f"{path}: image_std must be above 0 and all numbers finite, but a grey picture comes out as NaN or "
                "infinite; copy the file of the original model"
            )
        sizes.append((pixels.shape[0], pixels.shape[1], pixels.shape[2]))
    return sizes[0] if sizes[0] == sizes[1] else None


# ------------------------------------------------------------------------------------------------------ one picture
def _apply(processor: Any, image: Image.Image, channels: int) -> Float[Tensor, "channel height width"]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of palettes with several transparent colours, and of an image_std of 0
        made = processor(images=[_in_mode(image, MODES[channels])], return_tensors="pt", do_convert_rgb=False)
    pixels = made["pixel_values"]
    if pixels.ndim != 4 or pixels.shape[:2] != (1, channels) or 0 in pixels.shape:
        raise ValueError(f"pixel_values of shape {tuple(pixels.shape)} came, not (1, {channels}, height, width)")
    return pixels[0].to(torch.float32).contiguous()


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion cuts 16-bit values off at 255 in some modes, which leaves a white picture.
        values = np.clip(np.asarray(image), 0, 65535).astype(np.int64)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if {"A", "a"} & set(image.getbands()) or image.info.get("transparency") is not None:
        # As transformers does; otherwise whatever colour lies under the transparent part would show.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from telling of torchvision and of old names of classes.

    Not for every picture: changing the level empties caches of all loggers, which takes longer than a small picture.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
