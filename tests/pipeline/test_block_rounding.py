"""Static ranges and searched ratios: found on the fit split, stored, and what the loaded model rounds by."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitmend.calibrate.data import Split, load_calibration
from bitmend.errors import CheckpointError, NumericsError, RecipeError, RequestError
from bitmend.models.tokenizer import load_tokenizer
from bitmend.pipeline import block_rounding as module
from bitmend.pipeline.recipe import parse_recipe
from bitmend.runtime.packed_cache import cache_option

W8 = {"weights.bits": 8, "weights.group_size": -1}
STATIC = {"activations.bits": 6, "activations.static": True}
STATIC_KV = {"kv_cache.bits": 6, "kv_cache.static": True, "kv_cache.symmetric": True}
IDS = torch.arange(3, 43).view(2, 20)


def manifest_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).hf_quantizer.quantization_config.manifest


def fit_ids(folder, text):
    rows = load_calibration([text], load_tokenizer(folder), sequences=8, sequence_length=12, held_out=0.25, seed=0)
    return torch.cat(
        [row.ids for row, split in zip(rows.batches(1), rows.split_of_batch(1), strict=True) if split is Split.FIT]
    )


def test_ranges_of_the_first_block_are_those_of_the_fit_split(run_tiny, tiny, tiny_model, tiny_text, tmp_path):
    """By hand: the model as it is, run on the rows of the fit split alone."""
    run_tiny(keys={**W8, **STATIC, **STATIC_KV})
    manifest = manifest_of(tmp_path / "out")
    model, seen = tiny.build("llama"), {}
    block = model.model.layers[0]
    for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.v_proj"):
        layer = block.get_submodule(path)
        layer.register_forward_hook(lambda _, given, got, path=path: seen.setdefault(path, (given[0], got)) and None)
    with torch.no_grad():
        model(fit_ids(tiny_model, tiny_text))
    for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        spec = manifest.inputs[f"model.layers.0.{path}"].activations
        assert spec.ranges == pytest.approx((float(seen[path][0].abs().max()),), rel=1e-5)
    assert manifest.inputs["model.layers.0.self_attn.k_proj"] == manifest.inputs["model.layers.0.self_attn.q_proj"]
    values = seen["self_attn.v_proj"][1]
    heads = values.reshape(*values.shape[:2], -1, 4).abs().amax((0, 1, 3))
    assert manifest.attentions["model.layers.0.self_attn"].values.ranges == pytest.approx(heads.tolist(), rel=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["format_version"] == 4


def test_what_is_solved_for_is_what_runs(run_tiny, tiny, tiny_text, tiny_model, tmp_path):
    report = run_tiny(
        keys={**W8, **STATIC, **STATIC_KV, "activations.clip_ratio": "search", "kv_cache.clip_ratio": "search"}
    )
    model, seen = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), []
    rows = load_calibration(
        [tiny_text], load_tokenizer(tiny_model), sequences=8, sequence_length=12, held_out=0.25, seed=0
    )
    splits = zip(rows.batches(1), rows.split_of_batch(1), strict=True)
    held_out = torch.cat([row.ids for row, split in splits if split is Split.HELD_OUT])
    for one in (model, tiny.build("llama")):
        handle = one.model.norm.register_forward_pre_hook(lambda norm, arguments: seen.append(arguments[0]))
        with torch.no_grad():
            one(held_out)
        handle.remove()
    error = float((seen[0] - seen[1]).square().sum() / seen[1].square().sum())
    assert error == pytest.approx(report.blocks[-1].relative_error, rel=0.02)


def test_a_search_is_never_worse_than_no_clipping_on_the_rows_it_looks_at(run_tiny, tmp_path, monkeypatch):
    errors = []
    original = module.BlockRounding._search_

    def note(rounding, quantiser, rows):
        before = rows.error()
        original(rounding, quantiser, rows)
        errors.append((quantiser, before, rows.error(), rounding.spec_of(quantiser).clip_ratio))

    monkeypatch.setattr(module.BlockRounding, "_search_", note)
    keys = {**W8, "activations.bits": 3, "activations.clip_ratio": "search"}
    run_tiny(keys={**keys, "kv_cache.bits": 3, "kv_cache.clip_ratio": "search"})
    assert len(errors) == 2 * (4 + 2)  # two blocks; four inputs, keys, values
    assert {quantiser.operand for quantiser, *_ in errors} == {None, "keys", "values"}
    assert all(after <= before for _, before, after, _ in errors)
    assert any(after < 0.95 * before for _, before, after, _ in errors)
    assert all(0 < ratio <= 1 for *_, ratio in errors)
    found = {one.activations.clip_ratio for one in manifest_of(tmp_path / "out").inputs.values()}
    assert found == {ratio for quantiser, *_, ratio in errors if quantiser.operand is None}


def test_a_search_ends_when_smaller_ratios_are_worse(run_tiny, monkeypatch):
    """At 8 bits clipping harms at once: no search goes on to the smallest ratios."""
    asked = []
    original = module._SearchRows.error

    def note(rows):
        asked.append(min(one.clip_ratio for one in rows._rounding.inputs.values()))
        return original(rows)

    monkeypatch.setattr(module._SearchRows, "error", note)
    run_tiny(keys={**W8, "activations.bits": 8, "activations.clip_ratio": "search"})
    assert asked
    assert min(asked) > 0.5


def test_resume_is_bit_identical(ends_alike):
    keys = {**STATIC, **STATIC_KV, "activations.clip_ratio": "search", "weights.bits": 3}
    for k in (3, 9):
        ends_alike(k, output=f"out{k}", keys=keys)


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "was zero on all calibration tokens"), (None, "no calibration token")]
)
def test_a_range_of_what_never_comes_is_not_invented(run_tiny, tmp_path, monkeypatch, value, words):
    original = module._Largest._take

    def take(largest, quantiser, found):
        if quantiser.paths != ("mlp.down_proj",):
            original(largest, quantiser, found)
        elif value is not None:
            original(largest, quantiser, found * value)

    monkeypatch.setattr(module._Largest, "_take", take)
    report = run_tiny(keys={**W8, **STATIC})
    events = [event for event in report.events if event.kind == "no_range"]
    assert [event.where for event in events] == [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert all(words in event.message and event.degrades for event in events)
    manifest = manifest_of(tmp_path / "out")
    assert manifest.inputs["model.layers.0.mlp.down_proj"].activations.ranges is None
    assert manifest.inputs["model.layers.0.mlp.up_proj"].activations.ranges is not None


@pytest.mark.parametrize(
    "keys",
    [
        STATIC,
        STATIC_KV,
        {"activations.clip_ratio": "search"},
        {"kv_cache.clip_ratio": "search"},
        {"prefix.max_tokens": 2},
    ],
    ids=str,
)
def test_what_is_to_be_found_needs_rows(run_tiny, tmp_path, keys):
    with pytest.raises(RequestError, match="needs calibration data, but none came"):
        run_tiny(recipe="rtn", keys={**W8, **keys}, calibration=())
    assert not (tmp_path / "out.partial").exists()


def test_a_group_of_which_only_some_layers_round_is_measured_on_what_these_read(run_tiny, tmp_path):
    """q is left as it is, and comes first: the moments of k and v are of rounded inputs all the same."""
    skip = {"overrides": [{"targets": ["re:.*q_proj"], "skip": True}]}
    errors = {}
    for name, activations in (("plain", {}), ("rounded", {"activations.bits": 2})):
        report = run_tiny(name, keys={**W8, **skip, **activations, "calibration.two_streams": True})
        sites = {site.name: site for site in report.blocks[0].sites}
        errors[name] = sites["model.layers.0.self_attn.k_proj"].fit_error
    # With two streams the error is against the full-precision network, so that it holds the rounding of the input.
    assert errors["rounded"] > 100 * errors["plain"]


def test_rows_that_are_not_finite_have_no_range(run_tiny, monkeypatch):
    original = module._Largest._take
    monkeypatch.setattr(
        module._Largest, "_take", lambda one, quantiser, found: original(one, quantiser, found * torch.inf)
    )
    with pytest.raises(NumericsError, match=r"what model\.layers\.0\.self_attn\.q_proj reads must be finite"):
        run_tiny(keys={**W8, **STATIC})


def test_a_folder_with_other_ranges_than_heads_is_refused(run_tiny, tmp_path):
    run_tiny(keys={**W8, **STATIC, **STATIC_KV})
    path = tmp_path / "out" / "config.json"
    written = path.read_text()
    for section, name, place in (
        ("attentions", "model.layers.0.self_attn", "keys"),
        ("inputs", "model.layers.0.mlp.up_proj", "activations"),
    ):
        config = json.loads(written)
        config["quantization_config"][section][name][place]["ranges"] = [1.0] * 3
        del config["quantization_config"]["seal"]
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"rounds by 3 ranges at {name}"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_experts_have_ranges_of_their_own(run_tiny, tiny, tmp_path):
    folder = tiny.save(tmp_path / "model", tiny.build("mixtral"))
    run_tiny(model=folder, keys={**W8, **STATIC})
    manifest = manifest_of(tmp_path / "out")
    ranges = {scheme.activations.ranges for name, scheme in manifest.inputs.items() if name.endswith("w2")}
    assert len(ranges) > 2


def test_a_packed_cache_holds_static_keys(run_tiny, tmp_path):
    run_tiny(keys={**W8, **STATIC_KV})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(IDS, **cache_option(model)).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"activations": {"static": True, "symmetric": False}}, "static ranges with zero points need an observer"),
        ({"activations": {"static": True, "group_size": 16}}, "static ranges need a grid without groups"),
        ({"kv_cache": {"static": True}}, "static ranges of a cache need a symmetric grid"),
    ],
)
def test_static_needs_a_grid_without_groups_and_one_way_to_choose(keys, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse_recipe(keys)


@pytest.mark.parametrize("ratio", ["find", 0.0, 1.5])
def test_a_ratio_is_a_share_or_a_search(ratio):
    with pytest.raises(RecipeError, match="clip_ratio"):
        parse_recipe({"activations": {"clip_ratio": ratio}})


def test_without_a_range_all_else_stays():
    from bitmend.numerics.activations import ActivationSpec
    from bitmend.numerics.log_sqrt2 import LogSqrt2Spec
    from bitmend.pipeline.block_rounding import _for_each_token

    kept = ActivationSpec(3, True, -1, 0.9, scale_bits=16, ranges=())
    assert _for_each_token(kept) == ActivationSpec(3, True, -1, 0.9, scale_bits=16)
    assert _for_each_token(ActivationSpec(4, symmetric=False, ranges=(1.0,), lows=(-2.0,))) == ActivationSpec(
        4, symmetric=False
    )
    assert _for_each_token(LogSqrt2Spec(4)) == ActivationSpec(4, symmetric=False)
