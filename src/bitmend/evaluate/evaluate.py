"""Score models: perplexity on texts, top-1 on pictures, embeddings of encoders, and agreement with a reference.

Networks run in float32 unless asked otherwise. bfloat16 is too coarse to judge good repairs by: on the books model (16
windows of 512 tokens of the validation text) the same network in bfloat16 is 9e-5 nats a token from itself in float32,
half of it from rounding the logits alone. Rounding in the divergence itself, given float32 logits, is below 1e-7.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bitmend.calibrate.images import LabelledImages, labelled
from bitmend.errors import RequestError
from bitmend.evaluate.agreement import AgreementSummary, score_tokens, summarise
from bitmend.evaluate.embeddings import embed_pairs, read_pairs, score_embedded_pictures, score_pairs
from bitmend.evaluate.images import all_logits, labels_of, score_pictures
from bitmend.evaluate.load import LoadedModel, check_context, load_model
from bitmend.evaluate.perplexity import negative_log_likelihood, perplexity
from bitmend.evaluate.reference import Reference, ReferenceLogits, check_same_tokens, run_model
from bitmend.evaluate.reference_cache import ReferenceCache, default_folder
from bitmend.evaluate.results import EvaluationReport, ModelResult, TextResult
from bitmend.evaluate.windows import TokenWindows, read_windows
from bitmend.evaluate.zero_shot import ZeroShot, zero_shot_classifier
from bitmend.models.architecture import encoder_class, two_towers
from bitmend.models.loading import read_config, resolve_model
from bitmend.protocols import Progress, SilentProgress


@dataclass(frozen=True)
class _Settings:
    """What is the same for all models."""

    texts: tuple[Path, ...]
    images: tuple[Path, ...]
    pairs: tuple[Path, ...]
    zero_shot: ZeroShot | None
    text_model: Path | str | LoadedModel | None
    windows: int | None
    window_length: int
    batch_size: int
    pictures: int | None
    progress: Progress

    def read(self, text: Path, tokenizer: object) -> TokenWindows:
        return read_windows(text, tokenizer, windows=self.windows, window_length=self.window_length)


def evaluate(
    models: Sequence[Path | str | LoadedModel],
    *,
    texts: Sequence[Path | str] = (),
    images: Sequence[Path | str] = (),
    pairs: Sequence[Path | str] = (),
    zero_shot: ZeroShot | None = None,
    text_model: Path | str | LoadedModel | None = None,
    reference: Path | str | LoadedModel | None = None,
    windows: int | None = 160,
    window_length: int = 512,
    pictures: int | None = None,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
) -> EvaluationReport:
    """Score each model on the first windows of each text, or on the pictures of each set.

    Each window is scored by itself: position i predicts token i + 1, so that a window of L tokens gives L - 1 losses
    for the perplexity, while all L next-token distributions are compared with the reference's.

    Args:
        models: folders, hub names, or models in memory; one at a time is loaded.
        texts: UTF-8 files, for language models.
        images: folders of class folders, or archives of them, for image classifiers and encoders.
        pairs: files of sentence pairs, for text encoders.
        zero_shot: what describes the classes, for encoders of pictures that are to be used as classifiers.
        text_model: what embeds these descriptions; None: the text tower of a model with two.
        reference: what `kl` and `top1_agreement` are taken against; None leaves them out.
        windows: how many windows of each text, at most; None for all.
        pictures: how many pictures of each set, at most; None for all.
        window_length: tokens in a window.
        batch_size: windows that run at once.
        device: where networks from folders run; a model in memory runs where it is.
        dtype: of activations and unquantised weights of models from folders.
        progress: shown while it works; None for nothing.
        cache_dir: where the reference's hidden states are kept for later evaluations (at most 4 GB); None for
            `$BITMEND_CACHE`, `$XDG_CACHE_HOME/bitmend` or `~/.cache/bitmend`.

    Raises:
        RequestError: a number out of range, a text missing or too short, windows longer than a model's context, or
            tokenizers that differ from the reference's.
        ModelError: no such model.
        CheckpointError: a checkpoint that cannot be trusted to be what its config says.
        NumericsError: a model gives NaN or infinity.

    Cost: one forward pass of each model and, unless cached, of the reference; memory of one batch of logits of both
    (2 x batch x window x vocabulary numbers) and of the reference's final hidden states.
    """
    _check_request(models, texts, images, pairs, zero_shot, reference, batch_size)
    for source in models:
        if not isinstance(source, LoadedModel):
            read_config(resolve_model(source))  # a wrong name is told before the first model has run for minutes
    shown = progress or SilentProgress()
    settings = _Settings(
        tuple(map(Path, texts)),
        tuple(map(Path, images)),
        tuple(map(Path, pairs)),
        zero_shot,
        text_model,
        windows,
        window_length,
        batch_size,
        pictures,
        shown,
    )
    if images:
        return _score_on_pictures(models, reference, settings, device, dtype)
    if pairs:
        return _score_on_pairs(models, reference, settings, device, dtype)
    compared: Reference | None = None
    answers: list[tuple[TokenWindows, ReferenceLogits]] = []
    if reference is not None:
        cache = ReferenceCache(cache_dir or default_folder(), shown.say)
        compared = Reference(reference, device=device, dtype=dtype, cache=cache, progress=shown)
        answers = _ask_reference(compared, settings)
    results = []
    for source in models:
        model = _loaded(source, device, dtype, "tokens")
        results.append(_score_model(model, settings, compared, answers))
        del model  # before the next one is loaded
    name = None if compared is None else compared.name
    return EvaluationReport(tuple(results), name, str(dtype).removeprefix("torch."), str(device))


def _check_request(
    models: Sequence[Path | str | LoadedModel],
    texts: Sequence[Path | str],
    images: Sequence[Path | str],
    pairs: Sequence[Path | str],
    zero_shot: ZeroShot | None,
    reference: Path | str | LoadedModel | None,
    batch_size: int,
) -> None:
    """Refuse what cannot be scored, before any model is loaded."""
    if not models or not (texts or images or pairs) or batch_size < 1:
        raise RequestError(
            f"evaluate: at least one model, one text (or set of pictures or pairs) and a batch of one are required, but "
            f"{len(models)} models, {len(texts)} texts, {len(images)} sets of pictures, {len(pairs)} files of pairs and a "
            f"batch of {batch_size} came; give what is missing"
        )
    if sum(map(bool, (texts, images, pairs))) > 1:
        raise RequestError("evaluate: no model is scored on two of texts, pictures and sentence pairs; give one kind")
    if texts:
        for source in (*models, *([] if reference is None else [reference])):
            _refuse_encoder(source)
    if zero_shot is not None and not images:
        raise RequestError("evaluate: names of classes need pictures to name, but none came; pass --images PATH")


def _score_on_pictures(
    models: Sequence[Path | str | LoadedModel],
    reference: Path | str | LoadedModel | None,
    settings: _Settings,
    device: str | torch.device,
    dtype: torch.dtype,
) -> EvaluationReport:
    answers: list[Float[Tensor, "image label"] | None] = [None] * len(settings.images)
    name, classes, asked_gives = None, None, "logits"
    if reference is not None:
        asked = _of_pictures(reference, settings, device, dtype, own_text=True)
        name, classes, asked_gives = asked.name, _classes_of(asked), asked.gives
        for place, path in enumerate(settings.images):
            found = _labelled(asked, path)
            label = f"{asked.name} (reference) on {path}"
            answers[place], _ = all_logits(
                asked, found, settings.batch_size, settings.pictures, settings.progress, label
            )
        del asked
    results = []
    for source in models:
        model = _of_pictures(source, settings, device, dtype)
        if reference is not None and model.gives != asked_gives:
            raise RequestError(
                f"{model.name}: {asked_gives}, as the reference {name} gives, are required, but it gives {model.gives}; "
                "compare a model with the one it was made from"
            )
        if model.gives == "embeddings":
            results.append(_embedded(model, settings, answers))
            continue
        if classes is not None and _classes_of(model) != classes:
            raise RequestError(
                f"{model.name}: the classes of the reference {name} are required, in the same order, but its own differ; "
                "compare a model with the one it was made from"
            )
        scored = [
            score_pictures(
                model,
                _labelled(model, path),
                batch_size=settings.batch_size,
                count=settings.pictures,
                reference=answer,
                progress=settings.progress,
            )
            for path, answer in zip(settings.images, answers, strict=True)
        ]
        results.append(ModelResult(model.name, images=tuple(scored)))
        del model  # before the next one is loaded
    return EvaluationReport(tuple(results), name, str(dtype).removeprefix("torch."), str(device))


def _of_pictures(
    source: Path | str | LoadedModel,
    settings: _Settings,
    device: str | torch.device,
    dtype: torch.dtype,
    own_text: bool = False,
) -> LoadedModel:
    """Return a model of pictures; where classes are described, the classifier that an encoder makes with them.

    A reference with two towers describes classes by its own, whatever describes them for the others.
    """
    model = _loaded(source, device, dtype, "pictures")
    if settings.zero_shot is None:
        return model
    whole = not isinstance(source, LoadedModel) and two_towers(read_config(resolve_model(source)))
    described = source if settings.text_model is None or (own_text and whole) else settings.text_model
    text = described if isinstance(described, LoadedModel) else load_model(described, device, dtype, "text")
    return zero_shot_classifier(model, text, settings.zero_shot, settings.batch_size, settings.progress)


def _embedded(model: LoadedModel, settings: _Settings, answers: Sequence[Tensor | None]) -> ModelResult:
    """Score an encoder of pictures by its embeddings alone."""
    found = []
    for path, answer in zip(settings.images, answers, strict=True):
        if answer is None:
            raise RequestError(
                f"{model.name}: an encoder of pictures can only be compared with a reference; pass --reference MODEL, or "
                "name classes with --class-names FILE"
            )
        found.append(
            score_embedded_pictures(
                model,
                _labelled(model, path),
                batch_size=settings.batch_size,
                count=settings.pictures,
                reference=answer,
                progress=settings.progress,
            )
        )
    return ModelResult(model.name, embeddings=tuple(found))


def _score_on_pairs(
    models: Sequence[Path | str | LoadedModel],
    reference: Path | str | LoadedModel | None,
    settings: _Settings,
    device: str | torch.device,
    dtype: torch.dtype,
) -> EvaluationReport:
    files = [read_pairs(path) for path in settings.pairs]
    answers: list[Tensor | None] = [None] * len(files)
    name = None
    if reference is not None:
        asked = _encoder_of_texts(reference, device, dtype)
        name = asked.name
        answers = [embed_pairs(asked, pairs, settings.batch_size, settings.progress) for pairs in files]
        del asked
    results = []
    for source in models:
        model = _encoder_of_texts(source, device, dtype)
        scored = [
            score_pairs(model, pairs, batch_size=settings.batch_size, reference=answer, progress=settings.progress)
            for pairs, answer in zip(files, answers, strict=True)
        ]
        results.append(ModelResult(model.name, embeddings=tuple(scored)))
        del model  # before the next one is loaded
    return EvaluationReport(tuple(results), name, str(dtype).removeprefix("torch."), str(device))


def _encoder_of_texts(source: Path | str | LoadedModel, device: str | torch.device, dtype: torch.dtype) -> LoadedModel:
    model = _loaded(source, device, dtype, "tokens", tower="text")
    if model.gives != "embeddings":
        raise RequestError(
            f"{model.name}: an encoder is required to embed sentences, but it is a language model; pass --text FILE"
        )
    return model


def _refuse_encoder(source: Path | str | LoadedModel) -> None:
    """Raise for a model that gives no distribution over words.

    Raises:
        RequestError: as above.
    """
    encoder = (
        source.gives == "embeddings"
        if isinstance(source, LoadedModel)
        else encoder_class(read_config(resolve_model(source)), "tokens") is not None
    )
    if encoder:
        name = source.name if isinstance(source, LoadedModel) else str(source)
        raise RequestError(
            f"{name}: a language model is required to score windows of text, but it is an encoder; pass --pairs FILE"
        )


def _classes_of(model: LoadedModel) -> dict[int, str] | None:
    """Return the names of a classifier's classes by number; None of an encoder."""
    return labels_of(model) if model.gives == "logits" else None


def _labelled(model: LoadedModel, path: Path) -> LabelledImages:
    assert model.processor is not None
    return labelled(path, model.processor, _classes_of(model))


def _loaded(
    source: Path | str | LoadedModel,
    device: str | torch.device,
    dtype: torch.dtype,
    reads: str,
    tower: str | None = None,
) -> LoadedModel:
    tower = tower or ("vision" if reads == "pictures" else None)
    model = source if isinstance(source, LoadedModel) else load_model(source, device, dtype, tower)
    if model.model.training:
        raise RequestError(f"{model.name}: a model in evaluation mode is required, but it is training; call .eval()")
    if model.reads != reads:
        wanted = "--text FILE" if model.reads == "tokens" else "--images FOLDER"
        raise RequestError(f"{model.name}: the model reads {model.reads}, but {reads} came; pass {wanted}")
    return model


def _ask_reference(reference: Reference, settings: _Settings) -> list[tuple[TokenWindows, ReferenceLogits]]:
    answers = []
    for text in settings.texts:
        windows = settings.read(text, reference.tokenizer)
        answers.append((windows, reference.logits(windows, settings.batch_size)))
    reference.release()
    return answers


def _score_model(
    model: LoadedModel,
    settings: _Settings,
    reference: Reference | None,
    answers: list[tuple[TokenWindows, ReferenceLogits]],
) -> ModelResult:
    check_context(model, settings.window_length)
    scored = []
    for position, text in enumerate(settings.texts):
        windows = settings.read(text, model.tokenizer)
        if settings.windows is not None and len(windows.ids) < settings.windows:
            settings.progress.say(f"{text}: {settings.windows} windows were asked for, it holds {len(windows.ids)}")
        expected: ReferenceLogits | None = None
        if reference is not None:
            tokens, expected = answers[position]
            check_same_tokens(tokens, windows, reference.name, model.name)
        scored.append(_score_text(model, windows, expected, settings))
    return ModelResult(model.name, tuple(scored))


def _score_text(
    model: LoadedModel, windows: TokenWindows, reference: ReferenceLogits | None, settings: _Settings
) -> TextResult:
    started = time.perf_counter()
    losses, reference_losses, kl, agrees = [], [], [], []
    slices = list(windows.batches(settings.batch_size))
    for chunk in settings.progress.track(slices, f"{model.name} on {windows.file}", len(slices)):
        ids = windows.ids[chunk]
        logits = run_model(model, ids)
        # The last token of a window predicts nothing here. It is scored, too, and dropped: to copy the logits of all others
        # would take longer.
        targets = ids.roll(-1, 1).flatten().to(logits.device)
        given = logits.flatten(0, 1)
        if reference is None:
            losses.append(_predictions(negative_log_likelihood(given, targets), ids))
            continue
        if reference.vocabulary != logits.shape[-1]:
            raise RequestError(
                f"{model.name}: the reference's vocabulary of {reference.vocabulary} words is required, but the "
                f"model has {logits.shape[-1]}; compare a model with the one it was made from"
            )
        scores = score_tokens(reference.batch(chunk).to(logits.device).flatten(0, 1), given, targets)
        losses.append(_predictions(scores.loss, ids))
        reference_losses.append(_predictions(scores.reference_loss, ids))
        kl.append(scores.kl.reshape(ids.shape).cpu())
        agrees.append(scores.agrees.reshape(ids.shape).cpu())
    loss = torch.cat(losses)
    # Without a reference every field of the comparison is there, and None.
    agreement: dict[str, Any] = dict.fromkeys(field.name for field in fields(AgreementSummary))
    if kl:
        agreement = asdict(summarise(torch.cat(kl), torch.cat(agrees)))
    return TextResult(
        file=windows.file,
        windows=len(windows.ids),
        window_length=windows.ids.shape[1],
        perplexity=perplexity(loss),
        reference_perplexity=perplexity(torch.cat(reference_losses)) if reference_losses else None,
        cross_entropy=float(loss.double().mean()),
        tokens=windows.ids.numel(),
        tokens_sha256=windows.sha256,
        seconds=time.perf_counter() - started,
        **agreement,
    )


def _predictions(loss: Float[Tensor, " scored"], ids: Int64[Tensor, "window token"]) -> Float[Tensor, " prediction"]:
    """Return the losses of the tokens that a next one follows in their window."""
    return loss.reshape(ids.shape)[:, :-1].flatten().cpu()
