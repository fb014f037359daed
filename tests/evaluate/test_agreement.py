import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.evaluate import perplexity as chunking
from bitmend.evaluate.agreement import kl_divergence, score_tokens, summarise, top1_agreement
from bitmend.evaluate.perplexity import negative_log_likelihood


def pair(tokens, vocabulary, seed, distance=1.0):
    generator = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(tokens, vocabulary, generator=generator)
    return reference, reference + distance * torch.randn(tokens, vocabulary, generator=generator)


sizes = {"tokens": st.integers(1, 9), "vocabulary": st.integers(1, 9), "seed": st.integers(0, 99)}


def test_two_tokens_over_three_words():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log() + 5
    q = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.2, 0.6]]).log() - 5
    assert kl_divergence(p, q).tolist() == pytest.approx([0.25 * math.log(2), 0], abs=1e-6)
    assert top1_agreement(p, q).tolist() == [False, True]


@given(**sizes, distance=st.sampled_from([1e-3, 1e-2, 1.0, 30.0]))
def test_it_equals_brute_force_in_float64(tokens, vocabulary, seed, distance):
    reference, model = pair(tokens, vocabulary, seed, distance)
    log_p, log_q = reference.double().log_softmax(1).numpy(), model.double().log_softmax(1).numpy()
    rows = zip(log_p, log_q, strict=True)
    expected = [sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)) for p, q in rows]
    assert kl_divergence(reference, model).tolist() == pytest.approx(expected, rel=1e-5, abs=3e-7)


@given(**sizes)
def test_it_is_zero_for_equal_logits_and_never_negative(tokens, vocabulary, seed):
    reference, model = pair(tokens, vocabulary, seed, 1e-4)
    assert kl_divergence(reference, reference).tolist() == [0] * tokens
    assert (kl_divergence(reference, model) >= 0).all()
    assert top1_agreement(reference, reference).all()


@given(**sizes)
def test_chunks_and_names_of_words_do_not_matter(tokens, vocabulary, seed):
    reference, model = pair(tokens, vocabulary, seed)
    whole = kl_divergence(reference, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "CHUNK_ELEMENTS", 2 * vocabulary)
        assert torch.equal(kl_divergence(reference, model), whole)
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(kl_divergence(reference[:, order], model[:, order]), whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(top1_agreement(reference[:, order], model[:, order]), top1_agreement(reference, model))


def test_extreme_logits_stay_finite():
    reference, model = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    assert kl_divergence(reference, model).tolist() == pytest.approx([2e4])


def test_the_float32_floor_is_below_1e_7_on_a_real_vocabulary():
    """The plain sum of p (log p - log q) is ten times worse here."""
    reference, model = pair(64, 8192, 0, 1e-3)
    log_p, log_q = reference.double().log_softmax(1), model.double().log_softmax(1)
    error = kl_divergence(reference, model) - (log_p.exp() * (log_p - log_q)).sum(1)
    assert error.abs().max() < 1e-7


@given(**sizes)
def test_one_softmax_serves_all_scores(tokens, vocabulary, seed):
    reference, model = pair(tokens, vocabulary, seed)
    kept = reference.clone(), model.clone()
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    scores = score_tokens(reference, model, targets)
    assert torch.equal(scores.kl, kl_divergence(reference, model))
    assert torch.equal(scores.agrees, top1_agreement(reference, model))
    for losses, logits in ((scores.loss, model), (scores.reference_loss, reference)):
        torch.testing.assert_close(losses, negative_log_likelihood(logits, targets), rtol=0, atol=2e-6)
    assert torch.equal(reference, kept[0])
    assert torch.equal(model, kept[1])


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 9))
def test_the_summary_equals_numpy(windows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    kl = torch.rand(windows, length, generator=generator)
    agrees = torch.rand(windows, length, generator=generator) < 0.7
    summary = summarise(kl, agrees)
    values = kl.double().numpy()
    assert summary.kl == pytest.approx(values.mean())
    assert [summary.kl_p90, summary.kl_p99, summary.kl_p999] == pytest.approx(np.quantile(values, [0.9, 0.99, 0.999]))
    assert summary.top1_agreement == pytest.approx(agrees.numpy().mean())
    if windows == 1:
        assert summary.kl_standard_error is None
    else:
        assert summary.kl_standard_error == pytest.approx(values.mean(1).std(ddof=1) / math.sqrt(windows))
