import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.evaluate import perplexity as module
from bitmend.evaluate.perplexity import negative_log_likelihood, perplexity, token_chunks


def sample(tokens, vocabulary, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(tokens, vocabulary, generator=generator)
    return logits, torch.randint(vocabulary, (tokens,), generator=generator)


sizes = {"tokens": st.integers(1, 9), "vocabulary": st.integers(1, 9), "seed": st.integers(0, 99)}


def test_two_tokens_over_three_words():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log() + torch.tensor([[7.0], [-3.0]])
    losses = negative_log_likelihood(logits, torch.tensor([1, 2]))
    assert losses.tolist() == pytest.approx([math.log(4), math.log(1.25)], abs=1e-6)
    assert perplexity(losses) == pytest.approx(math.sqrt(5), rel=1e-6)


@given(**sizes)
def test_it_equals_brute_force_in_float64(tokens, vocabulary, seed):
    logits, targets = sample(tokens, vocabulary, seed)
    expected = []
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        expected.append(-math.log(math.exp(row[target]) / sum(map(math.exp, row))))
    assert negative_log_likelihood(logits, targets).tolist() == pytest.approx(expected, abs=2e-6)


@given(**sizes)
def test_chunks_do_not_matter(tokens, vocabulary, seed):
    logits, targets = sample(tokens, vocabulary, seed)
    whole = negative_log_likelihood(logits, targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ELEMENTS", 2 * vocabulary)
        assert torch.equal(negative_log_likelihood(logits, targets), whole)


@given(**sizes)
def test_the_names_of_the_words_do_not_matter(tokens, vocabulary, seed):
    logits, targets = sample(tokens, vocabulary, seed)
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    renamed = negative_log_likelihood(logits[:, order], order.argsort()[targets])
    torch.testing.assert_close(renamed, negative_log_likelihood(logits, targets), rtol=0, atol=2e-6)


def test_bfloat16_logits_are_scored_in_float32():
    logits, targets = sample(4, 5, 0)
    coarse = logits.bfloat16()
    assert torch.equal(negative_log_likelihood(coarse, targets), negative_log_likelihood(coarse.float(), targets))


@given(st.integers(1, 100), st.integers(1, 2**23))
def test_chunks_cover_all_tokens_and_are_bounded(tokens, vocabulary):
    rows = [list(range(tokens))[chunk] for chunk in token_chunks(tokens, vocabulary)]
    assert [token for chunk in rows for token in chunk] == list(range(tokens))
    assert all(len(chunk) * vocabulary <= max(vocabulary, module.CHUNK_ELEMENTS) for chunk in rows)


def test_a_perplexity_beyond_a_float_is_infinite():
    assert perplexity(torch.tensor([800.0])) == math.inf
