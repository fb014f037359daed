"""Whole runs with rounded keys and values: what is solved for is what is loaded, with a cache and without."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from bitmend.calibrate.data import Split, load_calibration
from bitmend.errors import CheckpointError, ModelError, RecipeError, RequestError
from bitmend.evaluate.generation import generate_text
from bitmend.formats.compressed_tensors import CompressedTensors
from bitmend.formats.ledger import ledger
from bitmend.formats.load import load
from bitmend.linalg.hadamard import Rotation
from bitmend.models.tokenizer import load_tokenizer
from bitmend.numerics.activations import ActivationSpec
from bitmend.online import AttentionScheme
from bitmend.pipeline.recipe import parse_recipe
from bitmend.runtime.packed_cache import PackedCache, cache_option
from bitmend.sites import AttentionSite

KV = {"kv_cache.bits": 3}
BOTH = {**KV, "attention.query_bits": 6, "attention.probability_bits": 6}
IDS = torch.arange(3, 43).view(2, 20)


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, **options).logits


def before_the_last_norm(model, ids):
    seen = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0]


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    del config["quantization_config"]["seal"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("family", "keys"), [("llama", KV), ("qwen3", KV), ("gemma2", BOTH), ("mixtral", BOTH)], ids=str
)
def test_the_loaded_model_is_the_one_that_was_solved_for(run_tiny, tiny, tiny_text, tmp_path, family, keys):
    folder = tiny.save(tmp_path / "model", tiny.build(family))
    report = run_tiny(model=folder, keys={**keys, "weights.bits": 8, "weights.group_size": -1})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rows = load_calibration([tiny_text], load_tokenizer(folder), sequences=8, sequence_length=12, held_out=0.25, seed=0)
    splits = zip(rows.batches(1), rows.split_of_batch(1), strict=True)
    held_out = torch.cat([row.ids for row, split in splits if split is Split.HELD_OUT])
    quantised, wanted = (before_the_last_norm(one, held_out) for one in (model, tiny.build(family)))
    error = float((quantised - wanted).square().sum() / wanted.square().sum())
    assert error == pytest.approx(report.blocks[-1].relative_error, rel=0.02)
    plain = run_tiny(output="plain", model=folder, keys={"weights.bits": 8, "weights.group_size": -1})
    assert report.blocks[-1].relative_error > 10 * plain.blocks[-1].relative_error  # rounded keys and values do show


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_packed_cache_gives_what_no_cache_gives(run_tiny, tiny, tmp_path, family):
    folder = tiny.save(tmp_path / "model", tiny.build(family))
    run_tiny(model=folder, keys={**KV, "weights.bits": 8})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole, option, parts = logits(model), cache_option(model), []
    with torch.no_grad():
        for start, stop in ((0, 7), (7, 8), (8, 13), (13, 20)):
            parts.append(model(IDS[:, start:stop], **option).logits)
    # A value in the middle of two levels may fall to the other side, when products are added up in another order.
    assert torch.isclose(torch.cat(parts, 1), whole, atol=1e-4).float().mean() > 0.95
    assert torch.equal(logits(model, **cache_option(model)), whole)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS, use_cache=False, **asked)
    assert torch.equal(model.generate(IDS, **asked), plain)
    assert torch.equal(model.generate(IDS, **cache_option(model), **asked), plain)
    beams = {**asked, "num_beams": 3}
    assert torch.equal(model.generate(IDS, **cache_option(model), **beams), model.generate(IDS, **beams))


def test_the_cache_takes_the_bits_that_it_says(run_tiny, tmp_path):
    run_tiny(keys={"kv_cache.bits": 4})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    option = cache_option(model)
    (cache,) = option.values()
    logits(model, **option)
    # 2 rows, 2 blocks, keys and values, 2 heads, 20 tokens: 4 codes of 4 bits fill half a word; scale 2 bytes, zero point 1.
    assert cache.num_bytes() == 2 * 2 * 2 * 2 * 20 * (4 + 2 + 1)
    assert cache.get_seq_length() == 20
    cache.crop(-5)
    assert cache.get_seq_length() == 15
    with torch.no_grad():
        again = model(IDS[:, 15:], **option).logits
    assert torch.isclose(again, logits(model)[:, 15:], atol=1e-4).float().mean() > 0.95
    cache.reset()
    assert cache.get_seq_length() == 0


def test_the_command_line_generates_with_the_packed_cache(run_tiny, tmp_path, monkeypatch):
    run_tiny(keys=KV)
    made = []
    init = PackedCache.__init__

    def noted(cache, model):
        init(cache, model)
        made.append(cache)

    monkeypatch.setattr(PackedCache, "__init__", noted)
    text = generate_text(tmp_path / "out", "w5 w6 w7", tokens=5, temperature=0.0, seed=0, device=torch.device("cpu"))
    assert text.startswith("w5 w6 w7")
    assert len(made) == 1
    assert made[0].get_seq_length() > 3


def test_the_folder_says_what_runs_and_saves_again(run_tiny, tmp_path):
    skip = {"overrides": [{"targets": ["model.layers.0.self_attn"], "skip": True}]}
    run_tiny(keys={**BOTH, **skip})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    spec = ActivationSpec(3, symmetric=False, scale_bits=16)
    wanted = AttentionScheme(Rotation(4), ActivationSpec(6), spec, spec, ActivationSpec(6, symmetric=False))
    assert model.hf_quantizer.quantization_config.manifest.attentions == {"model.layers.1.self_attn": wanted}
    assert ledger(tmp_path / "out").online == {
        "rotation of 4 features of queries and keys": 1,
        "queries of 6 bits, symmetric, one scale for a head of a token": 1,
        "keys of 3 bits, with zero points, one scale for a head of a token": 1,
        "values of 3 bits, with zero points, one scale for a head of a token": 1,
        "probabilities of 6 bits, with zero points, one scale for a head of a token": 1,
    }
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    assert "attn_implementation" not in (tmp_path / "again" / "config.json").read_text()
    with pytest.raises(RequestError, match="rotates or rounds activations while it runs"):
        CompressedTensors().export(tmp_path / "out", tmp_path / "export")


def test_resume_is_bit_identical(run_tiny, interrupted, tmp_path):
    run_tiny(keys=BOTH)
    interrupted(10, "stopped", keys=BOTH)
    run_tiny(output="stopped", keys=BOTH, resume=True)
    assert (tmp_path / "stopped/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "stopped"))
    assert one["quantization_config"]["attentions"] == other["quantization_config"]["attentions"]


def test_requests_that_cannot_be_met_are_refused_before_anything_runs(run_tiny, tiny, tmp_path):
    with pytest.raises(
        RecipeError, match=r"layers\.0\.self_attn: activation group_size must divide.*got 3 for 4 features"
    ):
        run_tiny(keys={"kv_cache.group_size": 3})
    with pytest.raises(RecipeError, match=r"unknown key 'kv_cache\.bit'"):
        run_tiny(keys={"kv_cache.bit": 5})
    config = transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=2, n_head=2)
    folder = tiny.save(tmp_path / "bloom", transformers.BloomForCausalLM(config))
    with pytest.raises(ModelError, match=r"BloomForCausalLM attends by itself"):
        run_tiny(model=folder, keys=KV)
    site = AttentionSite("a", "a", 4, 2, 8, 8)
    assert parse_recipe({"attention": {}}).attention_scheme(site) is None
    assert parse_recipe({"kv_cache": {"rotate": False}}).attention_scheme(site).rotation is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(nowhere=a.pop("model.layers.0.self_attn")), "does not have"),
        (lambda a: a["model.layers.0.self_attn"]["rotation"].update(size=3), "rotates heads of 3 features"),
        (lambda a: a["model.layers.0.self_attn"]["keys"].update(group_size=3), "got 3 for 4 features"),
        (lambda a: a["model.layers.0.self_attn"]["keys"].update(scale_bits=8), "must have 16 or 32 bits; got 8"),
        (lambda a: a["model.layers.0.self_attn"].update(answers={}), "must be a table of rotation, prefix, queries"),
    ],
)
def test_a_changed_folder_is_refused(run_tiny, tmp_path, change, message):
    run_tiny(keys=KV)
    edit(tmp_path / "out", lambda config: change(config["attentions"]))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "out")


def test_a_model_that_is_asked_to_attend_by_something_else_is_refused(run_tiny, tmp_path):
    run_tiny(keys=KV)
    with pytest.raises((CheckpointError, ImportError), match="attend"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="flex_attention")
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.allclose(logits(eager), logits(load(tmp_path / "out")), atol=1e-4)
