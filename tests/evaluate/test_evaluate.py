import json
import math

import pytest
import torch

from bitmend.errors import ModelError, NumericsError, RequestError
from bitmend.evaluate.evaluate import evaluate
from bitmend.evaluate.load import LoadedModel


def score(models, text, **settings):
    return evaluate(models, texts=[text], **{"windows": None, "window_length": 8, "batch_size": 4, **settings})


def brute_force(lab, text, reference, model):
    """Perplexity, KL and agreement, window by window, token by token, in float64."""
    ids = [int(word[1:]) for word in text.read_text().split()]
    losses, divergences, agreed = [], [], []
    for start in range(0, len(ids) - 7, 8):
        window = torch.tensor([ids[start : start + 8]])
        with torch.no_grad():
            p = reference(input_ids=window).logits[0].double().softmax(-1)
            q = model(input_ids=window).logits[0].double().softmax(-1)
        for place in range(8):
            divergences.append(float(sum(p[place] * (p[place].log() - q[place].log()))))
            agreed.append(int(p[place].argmax()) == int(q[place].argmax()))
            if place < 7:
                losses.append(-math.log(q[place, ids[start + place + 1]]))
    return math.exp(sum(losses) / len(losses)), sum(divergences) / len(divergences), sum(agreed) / len(agreed)


def test_it_equals_brute_force(lab, text, reference, damaged):
    networks = [type(lab.model()).from_pretrained(folder) for folder in (reference, damaged)]
    perplexity, kl, agreement = brute_force(lab, text, *networks)
    report = score([reference, damaged], text, reference=reference)
    same, other = (model.texts[0] for model in report.models)
    assert other.perplexity == pytest.approx(perplexity, rel=1e-6)
    assert other.kl == pytest.approx(kl, rel=1e-5)
    assert other.top1_agreement == agreement < 1
    assert (same.kl, same.top1_agreement, same.kl_p999) == (0, 1, 0)
    assert (other.windows, other.window_length, other.tokens) == (6, 8, 48)
    assert 0 < other.kl_p90 <= other.kl_p99 <= other.kl_p999
    assert report.reference == str(reference)


def test_the_second_evaluation_uses_the_cache_and_gives_the_same(text, reference, damaged, spoken):
    first = score([damaged], text, reference=reference, progress=spoken)
    second = score([damaged], text, reference=reference, progress=spoken)
    assert sum("(reference)" in label for label in spoken.labels) == 1
    assert any("come from" in line for line in spoken.lines)
    drop = {"seconds"}
    one, two = (
        {key: value for key, value in report.to_dict()["models"][0]["texts"][0].items() if key not in drop}
        for report in (first, second)
    )
    assert one == two


def test_without_a_reference_there_is_no_comparison(text, damaged):
    result = json.loads(score([str(damaged)], text).to_json())["models"][0]["texts"][0]
    assert result["kl"] is None
    assert result["top1_agreement"] is None
    assert result["perplexity"] > 1


def test_batches_do_not_matter(text, reference, damaged):
    results = [score([damaged], text, reference=reference, batch_size=size).models[0].texts[0] for size in (1, 4, 64)]
    assert [result.kl for result in results] == pytest.approx([results[0].kl] * 3, rel=1e-4)
    assert [result.perplexity for result in results] == pytest.approx([results[0].perplexity] * 3, rel=1e-6)


def test_models_in_memory_are_scored_where_they_are(lab, text, reference):
    model = lab.model()
    loaded = LoadedModel("mine", model, lab.tokenizer())
    report = score([loaded], text, reference=loaded)
    assert (report.models[0].model, report.models[0].texts[0].kl) == ("mine", 0)
    assert report.models[0].texts[0].perplexity == score([reference], text).models[0].texts[0].perplexity
    model.train()
    with pytest.raises(RequestError, match="mine: a model in evaluation mode is required"):
        score([loaded], text)


def test_bfloat16_puts_a_floor_under_the_divergence(text, reference):
    """Why float32 is the default: the same weights, merely run in bfloat16, are this far from themselves."""
    exact = LoadedModel("float32", *parts(reference, torch.float32))
    coarse = LoadedModel("bfloat16", *parts(reference, torch.bfloat16))
    floor = score([coarse], text, reference=exact).models[0].texts[0].kl
    assert floor > 1e-6  # ten times the rounding of the float32 divergence, even on a toy


def parts(folder, dtype):
    from bitmend.evaluate.load import load_model

    loaded = load_model(folder, "cpu", dtype)
    return loaded.model, loaded.tokenizer


def test_fewer_windows_than_asked_are_said(text, reference, spoken):
    result = score([reference], text, windows=100, progress=spoken).models[0].texts[0]
    assert result.windows == 6
    assert spoken.lines == [f"{text}: 100 windows were asked for, it holds 6"]


def test_bad_requests_are_told(lab, text, reference, tmp_path):
    with pytest.raises(RequestError, match=r"at least one model, one text .* but 0 models, 1 texts"):
        score([], text)
    with pytest.raises(ModelError, match="nothing"):
        score([reference, tmp_path / "nothing"], text)
    with pytest.raises(RequestError, match="context of 16 tokens, but they have 17"):
        score([reference], text, window_length=17)
    other = lab.save(tmp_path / "other", lab.model(), lab.tokenizer(shift=1))
    with pytest.raises(RequestError, match="its own gives other tokens on"):
        score([other], text, reference=reference)
    wide = lab.save(tmp_path / "wide", lab.model(lab.config(vocab_size=lab.vocabulary + 2)))
    with pytest.raises(RequestError, match="vocabulary of 30 words is required, but the model has 32"):
        score([wide], text, reference=reference)
    narrow = lab.save(tmp_path / "narrow", lab.model(lab.config(vocab_size=lab.vocabulary - 9)))
    with pytest.raises(RequestError, match="token numbers below its vocabulary of 21"):
        score([narrow], text)


def test_a_model_that_overflows_is_named(lab, text, tmp_path):
    model = lab.model()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    broken = lab.save(tmp_path / "broken", model)
    with pytest.raises(NumericsError, match="broken: finite logits are required"):
        score([broken], text)
