"""How far a model's next-token distributions are from a reference's: KL divergence and top-1 agreement.

With p the reference's and q the model's distribution, KL(p || q) = sum_v p_v (log p_v - log q_v) in nats a token.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from bitmend.evaluate.perplexity import token_chunks


def kl_divergence(
    reference: Float[Tensor, "token vocabulary"], model: Float[Tensor, "token vocabulary"]
) -> Float[Tensor, " token"]:
    """Return KL(softmax(reference) || softmax(model)) of each token, in nats, float32; exactly 0 for equal logits.

    The sum is over p (log p - log q) - (p - q), which has the same value since p and q sum to 1. Without the second
    term a rounding of either log-normaliser by e moves the result by e (1e-6 a token over 8,192 words); with it, by
    about e^2, so that what is left is below 1e-7. A negative rest is set to 0.

    Cost: O(T V) time; memory of five chunks besides the result.

    Example:
        >>> p = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> q = torch.tensor([[0.25, 0.25, 0.5]]).log()
        >>> round(kl_divergence(p, q).item() / math.log(2), 4)  # 0.5 * 1 + 0.25 * 0 - 0.25 * 1, in bits
        0.25
    """
    result = torch.empty(len(reference), dtype=torch.float32, device=reference.device)
    for chunk in token_chunks(*reference.shape):
        log_p, log_q = reference[chunk].float().log_softmax(1), model[chunk].float().log_softmax(1)
        result[chunk] = _divergence(log_p, log_q)
    return result


def _divergence(log_p: Float[Tensor, "token vocabulary"], log_q: Float[Tensor, "token vocabulary"]) -> Tensor:
    """Return the sum in `kl_divergence`; overwrites `log_q`."""
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p)
    terms -= p.sub_(log_q.exp_())
    return terms.sum(1).clamp_min(0)


def top1_agreement(
    reference: Float[Tensor, "token vocabulary"], model: Float[Tensor, "token vocabulary"]
) -> Bool[Tensor, " token"]:
    """Return for each token whether both rank the same word first."""
    return reference.argmax(1) == model.argmax(1)


@dataclass(frozen=True)
class TokenScores:
    """What two models make of each token.

    Attributes:
        loss: -log of the probability that the model gives to the token's target, nats.
        reference_loss: the same of the reference.
        kl: KL(reference || model), nats.
        agrees: whether both rank the same word first.
    """

    loss: Float[Tensor, " token"]
    reference_loss: Float[Tensor, " token"]
    kl: Float[Tensor, " token"]
    agrees: Bool[Tensor, " token"]


def score_tokens(
    reference: Float[Tensor, "token vocabulary"],
    model: Float[Tensor, "token vocabulary"],
    targets: Int64[Tensor, " token"],
) -> TokenScores:
    """Return losses, divergence and agreement of each token, with one softmax of each row of logits for all of them.

    Cost: O(T V) time; memory of five chunks besides the result.
    """
    losses, reference_losses, kl = torch.empty(3, len(reference), dtype=torch.float32, device=reference.device)
    for chunk in token_chunks(*reference.shape):
        log_p, log_q = reference[chunk].float().log_softmax(1), model[chunk].float().log_softmax(1)
        target = targets[chunk, None]
        losses[chunk] = -log_q.gather(1, target).squeeze(1)
        reference_losses[chunk] = -log_p.gather(1, target).squeeze(1)
        kl[chunk] = _divergence(log_p, log_q)
    return TokenScores(losses, reference_losses, kl, top1_agreement(reference, model))


@dataclass(frozen=True)
class AgreementSummary:
    """Agreement over all tokens of a text.

    Attributes:
        kl: mean divergence, nats a token.
        kl_standard_error: of that mean, taking windows (not tokens, which depend on each other) as independent; None
            for a single window.
        kl_p90, kl_p99, kl_p999: quantiles of the tokens' divergences, nats.
        top1_agreement: share of the tokens, 0 to 1.
    """

    kl: float
    kl_standard_error: float | None
    kl_p90: float
    kl_p99: float
    kl_p999: float
    top1_agreement: float


def summarise(kl: Float[Tensor, "window token"], agrees: Bool[Tensor, "window token"]) -> AgreementSummary:
    """Return means and quantiles, taken in float64; quantiles are interpolated linearly between tokens."""
    kl = kl.double()
    ordered = kl.flatten().sort().values  # torch.quantile refuses more than 2^24 numbers
    p90, p99, p999 = (_quantile(ordered, share) for share in (0.90, 0.99, 0.999))
    error = float(kl.mean(1).std()) / math.sqrt(len(kl)) if len(kl) > 1 else None
    return AgreementSummary(float(kl.mean()), error, p90, p99, p999, float(agrees.double().mean()))


def _quantile(ordered: Float[Tensor, " number"], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[below], ordered[above], place - below))
