"""Negative log-likelihood of the next token, from logits.

Logits are a row of V numbers a token; float32 copies are made of a few rows at a time, whatever the number of tokens.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

CHUNK_ELEMENTS = 2**22  # numbers in one float32 copy: 16 MiB


def token_chunks(num_tokens: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices of the tokens so that a slice of logits holds at most `CHUNK_ELEMENTS` numbers (at least a row)."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)


def negative_log_likelihood(
    logits: Float[Tensor, "token vocabulary"], targets: Int64[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """Return -log softmax(logits)[target] of each token, in nats, float32.

    Cost: O(T V) time; memory of two chunks besides the result.

    Example:
        Two tokens over three words, with odds 1:1:2 and 3:1:0 of the words:

        >>> logits = torch.tensor([[1.0, 1.0, 2.0], [3.0, 1.0, 1e-30]]).log()
        >>> [round(x, 4) for x in negative_log_likelihood(logits, torch.tensor([2, 1])).exp().tolist()]
        [2.0, 4.0]
    """
    losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    for chunk in token_chunks(*logits.shape):
        # As where a reference is scored beside it, so that both give the same number.
        losses[chunk] = -logits[chunk].float().log_softmax(1).gather(1, targets[chunk, None]).squeeze(1)
    return losses


def perplexity(losses: Float[Tensor, " token"]) -> float:
    """Return exp of the mean loss, summed in float64; infinity where it is beyond a float."""
    mean = float(losses.double().mean())
    return math.exp(mean) if mean < 700 else math.inf
