"""Score encoders: how close their embeddings are to a reference's, and whether they rank sentence pairs alike."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from bitmend.calibrate.images import LabelledImages
from bitmend.errors import ModelError, NumericsError, RequestError, is_whole_text
from bitmend.evaluate.images import all_logits
from bitmend.evaluate.load import LoadedModel
from bitmend.evaluate.results import EmbeddingResult
from bitmend.models.architecture import context_of
from bitmend.models.loading import POOLING_FILE
from bitmend.numerics.products import FastLinear
from bitmend.protocols import Progress

LOW = 0.01
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
KEYS = ("sentence1", "sentence2", "score")


@dataclass(frozen=True)
class SentencePairs:
    """Pairs of sentences, and what a human thinks of how alike they are.

    Attributes:
        path: the file.
        sentences: both of each pair.
        scores: of each pair; None where the file has none.
        sha256: of the file.
    """

    path: str
    sentences: tuple[tuple[str, str], ...]
    scores: tuple[float, ...] | None
    sha256: str


def read_pairs(path: Path) -> SentencePairs:
    """Read pairs of sentences.

    A `.jsonl` file has objects with `sentence1`, `sentence2` and, if there are scores, `score`; any other file has two or
    three columns with tabs between them. Empty lines count for nothing.

    Raises:
        RequestError: the file is missing, is not UTF-8, or a line is not what it should be; the sentence names the line.
    """
    if not path.is_file():
        raise RequestError(f"{path}: a file of sentence pairs is required, but there is none; check the path")
    raw = path.read_bytes()
    try:
        lines = raw.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path}: UTF-8 text is required, but byte {error.start} is not; convert the file"
        ) from error
    parse = _json_pair if path.suffix == ".jsonl" else _columns
    found = [parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    scored = {score is not None for _, _, score in found}
    if len(scored) != 1:
        what = "some lines have a score and some have none" if found else "it has no line"
        raise RequestError(f"{path}: sentence pairs, all with a score or all without, are required, but {what}")
    scores = tuple(float(score) for _, _, score in found if score is not None)
    pairs = tuple((first, second) for first, second, _ in found)
    return SentencePairs(str(path), pairs, scores or None, hashlib.sha256(raw).hexdigest())


def _columns(line: str, where: str) -> tuple[str, str, float | None]:
    columns = line.split("\t")
    if len(columns) not in (2, 3) or not all(column.strip() for column in columns):
        raise RequestError(
            f"{where}: two sentences and perhaps a score, with tabs between them, are required, but {len(columns)} columns "
            "came; mend the line"
        )
    return columns[0], columns[1], None if len(columns) == 2 else _score(columns[2], where)


def _json_pair(line: str, where: str) -> tuple[str, str, float | None]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: one JSON object a line is required, but this is none ({error})") from error
    if not is_whole_text(value):
        raise RequestError(f"{where}: text is required, but half of a character stands in it; mend the line")
    texts = [value.get(key) for key in KEYS[:2]] if isinstance(value, dict) else []
    sentences = [text for text in texts if isinstance(text, str) and text.strip()]
    if len(sentences) != 2:
        raise RequestError(
            f"{where}: the keys {KEYS[0]} and {KEYS[1]} with text are required; rename those that hold it"
        )
    score = value.get(KEYS[2])
    return sentences[0], sentences[1], None if score is None else _score(score, where)


def _score(value: Any, where: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(
            f"{where}: a number is required as score, but {str(value)[:40]!r} came; mend the line"
        ) from error
    if not torch.isfinite(torch.tensor(found)):
        raise RequestError(f"{where}: a finite number is required as score, but {value!r} came; mend the line")
    return found


# ---------------------------------------------------------------------------------------------- embeddings
def embed_texts(
    model: LoadedModel, texts: Sequence[str], batch_size: int, progress: Progress, label: str
) -> Float[Tensor, "text features"]:
    """Return the embedding of each text, float32, on the CPU.

    That is the projection, where the model makes one. Else its last states, averaged over the tokens of a text, or, where a
    pooling file of sentence-transformers in its folder says so, those of the first token. Texts are cut to the model's
    context. Each batch holds texts of about one length.

    Raises:
        NumericsError: an embedding holds NaN or infinity.
        ModelError: the pooling file asks for another way.
    """
    pooling = _pooling(model)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: dict[int, Tensor] = {}
    starts = range(0, len(order), batch_size)
    network: Any = model.model
    for start in progress.track(starts, label, len(starts)):
        members = order[start : start + batch_size]
        read = _tokenised(model, [texts[index] for index in members]).to(network.device)
        with torch.no_grad(), FastLinear():
            output = network(input_ids=read["input_ids"], attention_mask=read["attention_mask"])
        rows = output.get("text_embeds")
        if rows is None:
            rows = _pooled(output.last_hidden_state, read["attention_mask"], pooling)
        found.update(zip(members, rows.float().cpu(), strict=True))
    embeddings = torch.stack([found[index] for index in range(len(texts))])
    if not bool(embeddings.isfinite().all()):
        raise NumericsError(f"{model.name}: finite embeddings are required, but it gives NaN or infinity on a text")
    return embeddings


def _tokenised(model: LoadedModel, texts: list[str]) -> Any:
    longest = context_of(model.model)
    tokenizer: Any = model.tokenizer
    if tokenizer.pad_token is None:
        raise ModelError(
            f"{model.name}: a tokenizer with a padding token is required to embed texts, but it has none; name one in "
            "tokenizer_config.json"
        )
    most = tokenizer.model_max_length if longest is None else min(longest, tokenizer.model_max_length)
    sided = {"padding_side": "right"}  # positions and pooling count from the first token
    return tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt", **sided)


def _pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    if pooling == "first":
        return states[:, 0]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def _pooling(model: LoadedModel) -> str:
    path = None if model.folder is None else model.folder / POOLING_FILE
    if path is None or not path.is_file():
        return "mean"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        asked = {key for key, value in content.items() if key.startswith("pooling_mode_") and value is True}
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}); copy it again") from error
    if len(asked) == 1 and (way := POOLINGS.get(next(iter(asked)))):
        return way
    raise ModelError(
        f"{path}: {' or '.join(POOLINGS)} is required, but it says {', '.join(sorted(asked)) or 'nothing'}"
    )


# ---------------------------------------------------------------------------------------------- scores
def embed_pairs(
    model: LoadedModel, pairs: SentencePairs, batch_size: int, progress: Progress
) -> Float[Tensor, "pair both features"]:
    """Return the embeddings of both sentences of each pair; a sentence that stands in several pairs is embedded once."""
    texts = list(dict.fromkeys(text for pair in pairs.sentences for text in pair))
    place = {text: index for index, text in enumerate(texts)}
    embeddings = embed_texts(model, texts, batch_size, progress, f"{model.name} on {pairs.path}")
    return embeddings[torch.tensor([[place[text] for text in pair] for pair in pairs.sentences])]


def score_pairs(
    model: LoadedModel,
    pairs: SentencePairs,
    *,
    batch_size: int,
    reference: Float[Tensor, "pair both features"] | None,
    progress: Progress,
) -> EmbeddingResult:
    """Return how an encoder judges pairs of sentences, and how far its embeddings are from the reference's.

    Args:
        model: gives embeddings of texts.
        pairs: what it is to judge.
        batch_size: texts that run at once.
        reference: its embeddings of the same pairs.
        progress: shown batch by batch.

    Raises:
        RequestError: there is neither a reference nor a score, or the reference's embeddings have another size.
        NumericsError: an embedding holds NaN or infinity.
    """
    started = time.perf_counter()
    if reference is None and pairs.scores is None:
        raise RequestError(
            f"{pairs.path}: pairs without scores can only be compared with a reference; pass --reference MODEL, or give a "
            "score in a third column"
        )
    found = embed_pairs(model, pairs, batch_size, progress)
    cosines = _cosine(found[:, 0], found[:, 1])
    expected = None if reference is None else _cosine(reference[:, 0], reference[:, 1])
    similarity, low = _similarity(model, found.flatten(0, 1), None if reference is None else reference.flatten(0, 1))
    return EmbeddingResult(
        path=pairs.path,
        count=2 * len(pairs.sentences),
        similarity=similarity,
        similarity_low=low,
        rank_correlation=None if expected is None else _spearman(cosines, expected),
        score_correlation=None if pairs.scores is None else _spearman(cosines, torch.tensor(pairs.scores)),
        reference_score_correlation=(
            None if pairs.scores is None or expected is None else _spearman(expected, torch.tensor(pairs.scores))
        ),
        sha256=pairs.sha256,
        seconds=time.perf_counter() - started,
    )


def score_embedded_pictures(
    model: LoadedModel,
    pictures: LabelledImages,
    *,
    batch_size: int,
    count: int | None,
    reference: Float[Tensor, "image features"],
    progress: Progress,
) -> EmbeddingResult:
    """Return how far an encoder's embeddings of pictures are from the reference's.

    Raises:
        RequestError: the reference's embeddings have another size.
        NumericsError: an embedding holds NaN or infinity.
    """
    started = time.perf_counter()
    found, _ = all_logits(model, pictures, batch_size, count, progress, f"{model.name} on {pictures.name}")
    similarity, low = _similarity(model, found.flatten(1), reference.flatten(1))
    return EmbeddingResult(
        path=pictures.name,
        count=len(found),
        similarity=similarity,
        similarity_low=low,
        rank_correlation=None,
        score_correlation=None,
        reference_score_correlation=None,
        sha256=pictures.sha256(count),
        seconds=time.perf_counter() - started,
    )


def _similarity(model: LoadedModel, found: Tensor, reference: Tensor | None) -> tuple[float | None, float | None]:
    if reference is None:
        return None, None
    if found.shape != reference.shape:
        raise RequestError(
            f"{model.name}: embeddings of the reference's {reference.shape[-1]} features are required, but its own have "
            f"{found.shape[-1]}; compare a model with the one it was made from"
        )
    cosines = _cosine(found, reference)
    return float(cosines.mean()), float(cosines.quantile(LOW))


def _cosine(first: Tensor, second: Tensor) -> Float[Tensor, " row"]:
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1)


def _spearman(first: Tensor, second: Tensor) -> float | None:
    """Return Spearman's rank correlation; None where one of both is the same everywhere, which has no rank."""
    if len(first) < 2 or not bool((first != first[0]).any()) or not bool((second != second[0]).any()):
        return None
    return float(stats.spearmanr(first.numpy(), second.numpy()).statistic)
