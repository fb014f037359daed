"""What an evaluation found, as plain values."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TextResult:
    """One model on one text.

    Attributes:
        file: the text.
        windows: how many windows were scored.
        window_length: tokens in a window.
        perplexity: exp of `cross_entropy`.
        reference_perplexity: of the reference on the same windows.
        kl: mean KL(reference || model) of all next-token distributions, nats a token; None without a reference, as
            all further fields of the comparison.
        top1_agreement: share of the tokens after which both rank the same word first.
        kl_standard_error: of `kl`, windows taken as independent.
        kl_p90, kl_p99, kl_p999: quantiles over tokens, nats.
        cross_entropy: mean of -log p of the predicted tokens, nats.
        tokens: how many distributions were compared; one a window fewer are predictions of a known token.
        tokens_sha256: of the token numbers and the window length.
        seconds: wall time of scoring, the reference's part included where it runs beside the model.
    """

    file: str
    windows: int
    window_length: int
    perplexity: float
    reference_perplexity: float | None
    kl: float | None
    top1_agreement: float | None
    kl_standard_error: float | None
    kl_p90: float | None
    kl_p99: float | None
    kl_p999: float | None
    cross_entropy: float
    tokens: int
    tokens_sha256: str
    seconds: float


@dataclass(frozen=True)
class ImageResult:
    """One model on one set of pictures.

    Attributes:
        path: the folder or archive.
        count: how many pictures were scored.
        top1: share of the pictures whose class the model ranks first; None where they have no classes, as the four below.
        top1_low, top1_high: 95 % bootstrap interval of `top1`.
        top5: share whose class is among the first five; also None where there are no more than five classes.
        cross_entropy: mean of -log p of the class, nats.
        reference_top1: of the reference on the same pictures; None without one, as all below but the last two.
        kl: mean KL(reference || model) of the distributions over classes, nats a picture.
        kl_standard_error: of `kl`, pictures taken as independent.
        top1_agreement: share of the pictures for which both rank the same class first.
        pictures_sha256: of their files and classes.
        seconds: wall time, the decoding of the pictures included.
    """

    path: str
    count: int
    top1: float | None
    top1_low: float | None
    top1_high: float | None
    top5: float | None
    cross_entropy: float | None
    reference_top1: float | None
    kl: float | None
    kl_standard_error: float | None
    top1_agreement: float | None
    pictures_sha256: str
    seconds: float


@dataclass(frozen=True)
class EmbeddingResult:
    """One encoder on the sentence pairs of a file, or on a set of pictures.

    Attributes:
        path: the file, folder or archive.
        count: how many embeddings were compared.
        similarity: mean cosine between a model's embedding and the reference's; None without a reference, as the next two.
        similarity_low: below it lie 1 % of these cosines.
        rank_correlation: Spearman's, over the pairs of the file, of the cosine of a pair with the reference's; None for
            pictures, as all below but the last two.
        score_correlation: Spearman's of the cosine of a pair with its score; None where the file has no scores.
        reference_score_correlation: the same of the reference.
        sha256: of what was embedded.
        seconds: wall time, reading included.
    """

    path: str
    count: int
    similarity: float | None
    similarity_low: float | None
    rank_correlation: float | None
    score_correlation: float | None
    reference_score_correlation: float | None
    sha256: str
    seconds: float


@dataclass(frozen=True)
class ModelResult:
    """One model on all texts, on all sets of pictures, or an encoder on all that it embeds."""

    model: str
    texts: tuple[TextResult, ...] = ()
    images: tuple[ImageResult, ...] = ()
    embeddings: tuple[EmbeddingResult, ...] = ()


@dataclass(frozen=True)
class EvaluationReport:
    """All models on all texts.

    Attributes:
        models: in the order in which they were given.
        reference: what they were compared with.
        dtype: of activations and unquantised weights, for example `float32`.
        device: where the networks ran.
    """

    models: tuple[ModelResult, ...]
    reference: str | None
    dtype: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; a number beyond a float (an infinite perplexity) becomes None."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain

    def to_json(self) -> str:
        """Return `to_dict` as JSON text: `{"models": [{"model": ..., "texts": [{"file": ..., ...}]}], ...}`."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
