"""Score image classifiers on pictures: top-1, top-5, and agreement with a reference."""

import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from jaxtyping import Float, Int64
from scipy import stats
from torch import Tensor

from bitmend.calibrate.images import LabelledImages
from bitmend.errors import NumericsError, RequestError
from bitmend.evaluate.agreement import AgreementSummary, score_tokens, summarise
from bitmend.evaluate.load import LoadedModel
from bitmend.evaluate.results import ImageResult
from bitmend.models.hf_image import answer_of
from bitmend.numerics.products import FastLinear
from bitmend.protocols import ImageBatch, Progress

INTERVAL = 0.95
TOP = 5


def run_on_pictures(model: LoadedModel, batch: ImageBatch) -> Float[Tensor, "image label"]:
    """Return the logits of a model that is in evaluation mode, or an encoder's embeddings, float32, on the CPU.

    Raises:
        RequestError: the model cannot read pictures of that size.
        NumericsError: the logits hold NaN or infinity.
    """
    network: Any = model.model
    try:
        with torch.no_grad(), FastLinear():
            logits = answer_of(network(pixel_values=batch.pixels.to(network.device, network.dtype)))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(
            f"{model.name}: its processor gives pictures of {tuple(batch.pixels.shape[1:])}, but the model cannot read them "
            f"({reason}); copy the preprocessor_config.json that belongs to the model"
        ) from error
    if not bool(torch.isfinite(logits).all()):
        raise NumericsError(
            f"{model.name}: finite logits are required, but it gives NaN or infinity on the pictures; look for overflow in "
            "its weights or scales, or evaluate it in float32"
        )
    return logits.float().cpu()


def all_logits(
    model: LoadedModel, pictures: LabelledImages, batch_size: int, count: int | None, progress: Progress, label: str
) -> tuple[Float[Tensor, "image label"], Int64[Tensor, " image"] | None]:
    """Return the logits of all pictures, and their labels, None where they have none.

    Cost: one forward pass of each picture; memory of one batch, and of the logits.
    """
    logits, labels = [], []
    number = len(pictures) if count is None else min(count, len(pictures))
    batches = pictures.batches(batch_size, count)
    for batch, of_batch in progress.track(batches, label, -(-number // batch_size)):
        logits.append(run_on_pictures(model, batch))
        if of_batch is not None:
            labels.append(of_batch)
    return torch.cat(logits), torch.cat(labels) if labels else None


def score_pictures(
    model: LoadedModel,
    pictures: LabelledImages,
    *,
    batch_size: int,
    count: int | None,
    reference: Float[Tensor, "image label"] | None,
    progress: Progress,
) -> ImageResult:
    """Return how often a model names the right class, and how far it is from a reference.

    Args:
        model: in evaluation mode.
        pictures: what it is to name.
        batch_size: pictures that run at once.
        count: how many pictures, at most; None for all.
        reference: its logits on the same pictures.
        progress: shown batch by batch.

    Raises:
        RequestError: the reference has other classes, or there is nothing to measure.
        NumericsError: the model gives NaN or infinity.
    """
    started = time.perf_counter()
    logits, labels = all_logits(model, pictures, batch_size, count, progress, f"{model.name} on {pictures.name}")
    if labels is None and reference is None:
        raise RequestError(
            f"{pictures.name}: pictures without classes can only be compared with a reference; pass --reference MODEL, or "
            "sort them into one folder for each class"
        )
    agreement: dict[str, Any] = dict.fromkeys(field.name for field in fields(AgreementSummary))
    if reference is not None:
        if reference.shape != logits.shape:
            raise RequestError(
                f"{model.name}: the reference's {reference.shape[-1]} classes are required, but the model has "
                f"{logits.shape[-1]}; compare a model with the one it was made from"
            )
        targets = torch.zeros(len(logits), dtype=torch.int64) if labels is None else labels
        scores = score_tokens(reference, logits, targets)
        agreement = asdict(summarise(scores.kl.unsqueeze(1), scores.agrees.unsqueeze(1)))
    return ImageResult(
        path=pictures.name,
        count=len(logits),
        **_accuracies(logits, labels),
        reference_top1=None if reference is None or labels is None else _share(reference, labels, 1),
        kl=agreement["kl"],
        kl_standard_error=agreement["kl_standard_error"],
        top1_agreement=agreement["top1_agreement"],
        pictures_sha256=pictures.sha256(count),
        seconds=time.perf_counter() - started,
    )


def _accuracies(logits: Tensor, labels: Tensor | None) -> dict[str, float | None]:
    if labels is None:
        return {"top1": None, "top1_low": None, "top1_high": None, "top5": None, "cross_entropy": None}
    top1 = _share(logits, labels, 1)
    low, high = interval(top1, len(labels))
    loss = torch.nn.functional.cross_entropy(logits.double(), labels)
    top5 = _share(logits, labels, TOP) if logits.shape[-1] > TOP else None
    return {"top1": top1, "top1_low": low, "top1_high": high, "top5": top5, "cross_entropy": float(loss)}


def _share(logits: Tensor, labels: Tensor, places: int) -> float:
    best = logits.topk(places, dim=-1).indices
    return float((best == labels.unsqueeze(-1)).any(-1).double().mean())


def interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a share of `count` pictures.

    Drawing the pictures again with replacement gives Binomial(count, share) right ones, so that the interval needs no draws.

    Example:
        >>> interval(0.5, 100)
        (0.4, 0.6)
    """
    tail = (1 - INTERVAL) / 2
    low, high = (float(stats.binom.ppf(level, count, share)) / count for level in (tail, 1 - tail))
    return low, high


def labels_of(model: LoadedModel) -> dict[int, str]:
    """Return the names of a classifier's classes by number."""
    config: Any = model.model.config
    names: Sequence[tuple[Any, Any]] = list(config.id2label.items())
    return {int(number): str(name) for number, name in names}
