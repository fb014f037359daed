import importlib

import pytest
import torch
import transformers

from bitmend.errors import CheckpointError, ModelError, RequestError
from bitmend.evaluate.generation import generate_text

CPU = torch.device("cpu")


def generate(model, prompt="w3 w4 w5", tokens=6, temperature=0.0, seed=0):
    return generate_text(model, prompt, tokens=tokens, temperature=temperature, seed=seed, device=CPU)


def test_greedy_takes_the_likeliest_token_each_time(reference):
    model = transformers.AutoModelForCausalLM.from_pretrained(reference)
    ids = [3, 4, 5]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert 0 not in ids  # begins a text, and would not be shown
    assert generate(reference) == " ".join(f"w{token}" for token in ids)


def test_drawing_repeats_with_its_seed(reference):
    drawn = [generate(reference, temperature=1.0, seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert all(text.startswith("w3 w4 w5") for text in drawn)


def test_a_low_temperature_is_nearly_greedy(reference):
    assert generate(reference, temperature=1e-4) == generate(reference)


def test_a_begin_token_is_not_shown(lab, tmp_path):
    model = lab.save(tmp_path / "m", lab.model(), lab.tokenizer(begins=True))
    assert generate(model, tokens=1).split()[:3] == ["w3", "w4", "w5"]


def test_token_zero_may_be_the_padding(lab, tmp_path):
    """Token 0 pads here; taking it for missing would leave none, which transformers warns of."""
    tokenizer = lab.tokenizer()
    tokenizer.pad_token = "<s>"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, None)
    model = lab.save(tmp_path / "m", lab.model(), tokenizer)
    seen = {}
    original = transformers.GenerationMixin.generate

    def generate_and_look(self, **arguments):
        seen.update(arguments)
        return original(self, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GenerationMixin, "generate", generate_and_look)
        generate(model)
    assert seen["pad_token_id"] == 0
    assert seen["max_new_tokens"] == 6


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "generate needs a prompt of at least one character, but an empty one came; pass --prompt TEXT"),
        (
            " \n",
            r"generate needs a prompt of at least one token, but ' \\n' holds none; pass --prompt TEXT with a word",
        ),
    ],
)
def test_nothing_to_continue(reference, prompt, sentence):
    with pytest.raises(RequestError, match=sentence):
        generate(reference, prompt)


def test_prompt_and_continuation_fit_the_context(reference):
    assert len(generate(reference, tokens=13).split()) == 16
    with pytest.raises(
        RequestError, match=r"context of 16 tokens, but are 3 \+ 14; pass --tokens 13 or a shorter prompt"
    ):
        generate(reference, tokens=14)


def test_no_such_model(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        generate(tmp_path / "none")


def test_a_context_that_is_no_number(reference, monkeypatch):
    module = importlib.import_module("bitmend.evaluate.generation")  # bitmend.evaluate is a function, too
    loaded = module.load_model(reference, CPU, torch.float32)
    loaded.model.config.__dict__["max_position_embeddings"] = {"a": 1}
    monkeypatch.setattr(module, "load_model", lambda *arguments: loaded)
    with pytest.raises(
        CheckpointError, match=r"a whole number of tokens is required as max_position_embeddings, but .* \{'a': 1\}"
    ):
        generate(reference)
