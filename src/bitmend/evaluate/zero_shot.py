"""A classifier made of two encoders, as CLIP is used: a picture is of the class whose description is nearest to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from bitmend.errors import RequestError
from bitmend.evaluate.embeddings import embed_texts
from bitmend.evaluate.load import LoadedModel
from bitmend.models.hf_image import answer_of
from bitmend.protocols import Progress

SCALE = 100.0  # of the cosines; the largest that CLIP allows, and what its models have come to
PLACE = "{}"


@dataclass(frozen=True)
class ZeroShot:
    """What describes the classes.

    Attributes:
        names: of the classes, in the words that stand in the templates.
        templates: each with one `{}` for the name.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]


def read_zero_shot(names: Path, templates: Path | None) -> ZeroShot:
    """Read the names of the classes and the templates, one a line; without a file the one template is the bare name.

    Raises:
        RequestError: a file is missing, empty or not UTF-8, a name stands twice, or a template has not one `{}`.
    """
    found = _lines(names)
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise RequestError(f"{names}: each class is required once, but {twice[0]!r} stands there again; leave one out")
    patterns = (PLACE,) if templates is None else _lines(templates)
    wrong = [pattern for pattern in patterns if pattern.count(PLACE) != 1]
    if wrong:
        raise RequestError(f"{templates}: one {PLACE} for the name is required in each line, but {wrong[0]!r} came")
    return ZeroShot(found, patterns)


def _lines(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise RequestError(f"{path}: a text file with one line each is required, but there is none; check the path")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path}: UTF-8 text is required, but byte {error.start} is not; convert the file"
        ) from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise RequestError(f"{path}: at least one line is required, but it has none; give another file")
    return found


def class_embeddings(
    text: LoadedModel, classes: ZeroShot, batch_size: int, progress: Progress
) -> Float[Tensor, "class features"]:
    """Return for each class the mean, over the templates, of its normed descriptions, normed again."""
    texts = [template.replace(PLACE, name) for name in classes.names for template in classes.templates]
    found = embed_texts(text, texts, batch_size, progress, f"{text.name} on {len(classes.names)} classes")
    grouped = normalize(found, dim=-1).reshape(len(classes.names), len(classes.templates), -1)
    return normalize(grouped.mean(1), dim=-1)


class ZeroShotClassifier(nn.Module):
    """Gives `SCALE` times the cosine of a picture's embedding with each class's as its logits."""

    classes: Tensor

    def __init__(self, pictures: nn.Module, classes: Float[Tensor, "class features"], names: Sequence[str]) -> None:
        super().__init__()
        self.pictures = pictures
        inner: Any = pictures
        self.config = SimpleNamespace(id2label=dict(enumerate(names)))
        self.device: torch.device = inner.device
        self.dtype: torch.dtype = inner.dtype
        self.register_buffer("classes", classes.to(self.device, self.dtype))

    def forward(self, pixel_values: Float[Tensor, "image channel height width"]) -> Any:
        """Return an output with `logits`."""
        found = normalize(answer_of(self.pictures(pixel_values=pixel_values)), dim=-1)
        return {"logits": SCALE * found @ self.classes.T}


def zero_shot_classifier(
    pictures: LoadedModel, text: LoadedModel, classes: ZeroShot, batch_size: int, progress: Progress
) -> LoadedModel:
    """Return a classifier of pictures made of an encoder for each.

    Raises:
        RequestError: one of both is no encoder of its kind, or their embeddings differ in size.
    """
    for model, reads in ((pictures, "pictures"), (text, "tokens")):
        if model.gives != "embeddings" or model.reads != reads:
            raise RequestError(
                f"{model.name}: an encoder that reads {reads} is required, but it gives {model.gives} of {model.reads}; give "
                "the towers of one model"
            )
    found = class_embeddings(text, classes, batch_size, progress)
    inner: Any = pictures.model
    width = getattr(inner.config, "projection_dim", None)
    if isinstance(width, int) and width != found.shape[-1]:
        raise RequestError(
            f"{text.name}: embeddings of {width} features, as {pictures.name} gives, are required, but its own have "
            f"{found.shape[-1]}; give the towers of one model"
        )
    classifier = ZeroShotClassifier(pictures.model, found, classes.names).eval()
    return LoadedModel(pictures.name, classifier, None, pictures.processor, folder=pictures.folder)
