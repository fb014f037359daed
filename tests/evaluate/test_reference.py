import pytest
import torch
from transformers import Gemma2Config

from bitmend.errors import NumericsError, RequestError
from bitmend.evaluate import reference as module
from bitmend.evaluate.load import LoadedModel
from bitmend.evaluate.reference import HiddenLogits, LiveLogits, Reference, check_same_tokens, run_model
from bitmend.evaluate.reference_cache import ReferenceCache
from bitmend.evaluate.windows import TokenWindows, read_windows
from bitmend.numerics.products import FastLinear


@pytest.fixture
def ask(own_cache, spoken, text):
    def ask(source, batch_size=4, dtype=torch.float32):
        cache = ReferenceCache(own_cache, spoken.say)
        asked = Reference(source, device="cpu", dtype=dtype, cache=cache, progress=spoken)
        windows = read_windows(text, asked.tokenizer, windows=None, window_length=8)
        return asked.logits(windows, batch_size), windows

    return ask


def all_logits(answers, windows, batch_size=4):
    return torch.cat([answers.batch(chunk) for chunk in windows.batches(batch_size)])


def test_cached_fresh_and_direct_logits_are_equal_bit_for_bit(ask, reference, spoken, lab, monkeypatch):
    fresh, windows = ask(reference)
    assert isinstance(fresh, HiddenLogits)
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("the network was loaded again"))
    cached, _ = ask(reference)
    assert [line for line in spoken.lines if "come from" in line]
    assert torch.equal(all_logits(fresh, windows), all_logits(cached, windows))
    with torch.no_grad(), FastLinear():
        direct = torch.cat([lab.model()(input_ids=ids, use_cache=False).logits for ids in windows.ids.split(4)])
    assert torch.equal(all_logits(cached, windows), direct)


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"dtype": torch.bfloat16}])
def test_other_conditions_are_computed_anew(ask, reference, spoken, change):
    ask(reference)
    ask(reference, **change)
    assert len(spoken.labels) == 2
    assert spoken.lines == []


def test_a_changed_checkpoint_is_computed_anew(ask, lab, tmp_path, spoken):
    folder = lab.save(tmp_path / "model", lab.model())
    first, windows = ask(folder)
    lab.save(folder, lab.model(seed=1))
    second, _ = ask(folder)
    assert len(spoken.labels) == 2
    assert not torch.equal(all_logits(first, windows), all_logits(second, windows))


def test_a_damaged_cache_is_computed_anew(ask, reference, own_cache, spoken):
    first, windows = ask(reference)
    for path in own_cache.iterdir():
        path.write_bytes(b"?")
    second, _ = ask(reference)
    assert len(spoken.labels) == 2
    assert all("is computed again" in line for line in spoken.lines)
    assert torch.equal(all_logits(first, windows), all_logits(second, windows))


def test_a_model_with_something_after_its_head_runs_again(ask, lab, tmp_path, spoken, own_cache):
    config = Gemma2Config(
        vocab_size=lab.vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=16,
        final_logit_softcapping=0.5,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = lab.model(config)
    answers, windows = ask(lab.save(tmp_path / "capped", model))
    assert isinstance(answers, LiveLogits)
    assert answers.vocabulary == lab.vocabulary
    assert any("it runs again for each model" in line for line in spoken.lines)
    assert not own_cache.exists()
    logits = all_logits(answers, windows)
    assert logits.abs().max() <= 0.5
    with torch.no_grad(), FastLinear():
        assert torch.equal(logits[:4], model(input_ids=windows.ids[:4], use_cache=False).logits)


def test_a_model_in_memory_is_not_cached(ask, lab, own_cache):
    model = lab.model()
    answers, windows = ask(LoadedModel("mine", model, lab.tokenizer()))
    assert all_logits(answers, windows).shape == (*windows.ids.shape, lab.vocabulary)
    assert not own_cache.exists()
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_logits_that_are_not_finite_name_the_model(lab):
    model = lab.model()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("inf")
    with pytest.raises(NumericsError, match="broken: finite logits are required, but it gives NaN or infinity"):
        run_model(LoadedModel("broken", model, lab.tokenizer()), torch.ones(1, 2, dtype=torch.int64))


def test_other_tokens_are_refused():
    one, two = TokenWindows("t", torch.tensor([[1, 2]])), TokenWindows("t", torch.tensor([[1, 3]]))
    check_same_tokens(one, one, "a", "b")
    with pytest.raises(RequestError, match="b: the tokenizer of the reference a is required for a comparison"):
        check_same_tokens(one, two, "a", "b")
