"""Whole runs with rotations and rounded activations: what is solved for is what is loaded."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from bitmend.calibrate.data import Split, load_calibration
from bitmend.errors import CheckpointError, RecipeError, RequestError
from bitmend.formats.compressed_tensors import CompressedTensors
from bitmend.formats.ledger import ledger
from bitmend.formats.load import load
from bitmend.linalg.hadamard import Rotation
from bitmend.models.tokenizer import load_tokenizer
from bitmend.numerics.activations import ActivationSpec
from bitmend.online import InputScheme
from bitmend.pipeline.recipe import parse_recipe

W4A4 = {
    "activations.bits": 4,
    "activations.clip_ratio": 0.9,
    "transforms": [{"name": "quarot", "seed": 3, "force": True}],
}
IDS = torch.arange(3, 43).view(2, 20)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


LAST_NORMS = {"GPT2LMHeadModel": "transformer.ln_f", "GPTNeoXForCausalLM": "gpt_neox.final_layer_norm"}


def before_the_last_norm(model, ids):
    seen = []
    norm = model.get_submodule(LAST_NORMS.get(type(model).__name__, "model.norm"))
    handle = norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
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


def by_hand(folder, model):
    """The model of a folder computed without its hooks: rotations by matrices, rounding by the equation."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    loaded = load(folder)
    for name, module in loaded.named_modules():
        if name in config["modules"]:
            plain = torch.nn.Linear(*config["modules"][name]["shape"][::-1], bias=module.bias is not None)
            with torch.no_grad():
                plain.weight.copy_(module.dequantize())
                if module.bias is not None:
                    plain.bias.copy_(module.bias)
            about = config["inputs"][name]
            matrix = torch.eye(plain.in_features)
            if "rotation" in about:
                one = about["rotation"]
                matrix = torch.kron(Rotation(one["size"]).matrix().float(), torch.eye(one["inner"]))
            bits, clip = about["activations"]["bits"], about["activations"]["clip_ratio"]
            plain.register_forward_pre_hook(lambda _, args, m=matrix, b=bits, c=clip: (rounded(args[0] @ m, b, c),))
            model.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], plain)
    return loaded


def rounded(x, bits, clip):
    top = 2 ** (bits - 1) - 1
    scale = clip * x.abs().amax(-1, keepdim=True) / top
    return (x / scale).round().clamp(-top - 1, top) * scale


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "mixtral", "gpt2", "neox"])
def test_the_loaded_model_is_the_one_that_was_solved_for(run_tiny, tiny, tiny_text, tmp_path, family):
    folder = tiny.save(tmp_path / "model", tiny.build(family))
    report = run_tiny(model=folder, keys={**W4A4, "weights.bits": 8, "weights.group_size": -1})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # On the rows that were held out, what reaches the last norm is as wrong as the run says: streams and loaded model agree.
    rows = load_calibration([tiny_text], load_tokenizer(folder), sequences=8, sequence_length=12, held_out=0.25, seed=0)
    splits = zip(rows.batches(1), rows.split_of_batch(1), strict=True)
    held_out = torch.cat([row.ids for row, split in splits if split is Split.HELD_OUT])
    quantised, wanted = (before_the_last_norm(one, held_out) for one in (model, tiny.build(family)))
    # The stream ends rotated; with a tied head, or one without a place for a norm's bias, it is turned back.
    if family not in ("llama-tied", "gpt2", "neox"):
        wanted = Rotation(16, 3).apply(wanted)
    error = float((quantised - wanted).square().sum() / wanted.square().sum())
    assert error == pytest.approx(report.blocks[-1].relative_error, rel=0.02)
    plain = run_tiny(output="plain", model=folder, keys={"weights.bits": 8, "weights.group_size": -1})
    assert report.blocks[-1].relative_error > 10 * plain.blocks[-1].relative_error  # 4-bit activations do show


def test_by_matrices_and_the_equation(run_tiny, tmp_path, tiny):
    run_tiny(keys={**W4A4, "transforms": [{"name": "quarot", "residual": False}]})
    model = tiny.build()
    by_hand(tmp_path / "out", model)
    with torch.no_grad():
        for name, tensor in load(tmp_path / "out").state_dict().items():  # what lies around, gains that were not folded
            if name in model.state_dict():
                model.state_dict()[name].copy_(tensor)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # A value near the middle of two levels may fall to either side; all others are equal.
    assert torch.isclose(logits(loaded), logits(model), atol=1e-4).float().mean() > 0.9


def test_loads_with_cache_as_without_and_saves_again(run_tiny, tmp_path):
    run_tiny(keys=W4A4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **asked), model.generate(IDS, use_cache=False, **asked))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    inner = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(inner(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_manifest_says_what_runs(run_tiny, tmp_path):
    run_tiny(keys={**W4A4, "overrides": [{"targets": ["re:.*k_proj", "re:.*layers.1.*down_proj"], "skip": True}]})
    model = load(tmp_path / "out")
    inputs = model.hf_quantizer.quantization_config.manifest.inputs
    rounding = ActivationSpec(4, clip_ratio=0.9)
    assert inputs["model.layers.0.mlp.down_proj"] == InputScheme(Rotation(24), rounding)
    assert inputs["model.layers.1.mlp.down_proj"] == InputScheme(Rotation(24))  # rotated, though in full precision
    assert inputs["model.layers.0.self_attn.v_proj"] == InputScheme(None, rounding)
    assert "model.layers.0.self_attn.k_proj" not in inputs


def test_the_ledger_counts_what_runs_and_books_no_bytes_for_it(run_tiny, tmp_path):
    run_tiny(keys=W4A4)
    run_tiny(output="plain")
    account, plain = ledger(tmp_path / "out"), ledger(tmp_path / "plain")
    assert account.online == {
        "rotation of 4 x 4 features": 2,
        "rotation of 24 features": 2,
        "activations of 4 bits, symmetric, one scale for a token, clipped to 0.9": 14,
    }
    assert plain.online == {}
    assert account.bits_per_weight == plain.bits_per_weight


def test_resume_is_bit_identical(run_tiny, interrupted, tmp_path):
    keys = {**W4A4, "transforms": [{"name": "smooth"}, {"name": "quarot"}]}
    run_tiny(keys=keys)
    interrupted(10, "stopped", keys=keys)
    assert (tmp_path / "stopped.partial" / "parts" / "0000.safetensors").exists()  # one block whole, the next begun
    run_tiny(output="stopped", keys=keys, resume=True)
    for name in ("model.safetensors", "recipe.toml"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "stopped"))
    assert one["quantization_config"]["inputs"] == other["quantization_config"]["inputs"]


def test_smoothing_needs_rows_even_if_the_solver_does_not(run_tiny):
    with pytest.raises(RequestError, match="needs calibration data"):
        run_tiny(recipe="rtn", keys={"transforms": [{"name": "smooth"}]}, calibration=[])
    run_tiny(recipe="rtn", keys=W4A4, calibration=[])  # a rotation does not


def test_groups_of_activations_must_fit_before_anything_runs(run_tiny):
    with pytest.raises(RecipeError, match=r"o_proj|q_proj: activation group_size must divide the width.*got 5 for 16"):
        run_tiny(keys={"activations.group_size": 5})
    with pytest.raises(RecipeError, match=r"unknown key 'activations\.bit'"):
        run_tiny(keys={"activations.bit": 5})
    assert parse_recipe({"activations": {}}).activation_spec("a") == ActivationSpec(4)
    assert parse_recipe({}).activation_spec("a") is None


def test_an_export_that_would_lose_the_rotations_is_refused(run_tiny, tmp_path):
    run_tiny(keys=W4A4)
    with pytest.raises(RequestError, match="rotates or rounds activations while it runs"):
        CompressedTensors().export(tmp_path / "out", tmp_path / "export")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["inputs"].update(nowhere=q["inputs"].pop("model.layers.0.mlp.down_proj")), "does not have"),
        (lambda q: q["inputs"]["model.layers.0.mlp.down_proj"]["rotation"].update(size=7), "rotates 7 x 1 features"),
        (
            lambda q: q["inputs"].update({"model.layers.0.mlp": {"activations": ROUNDING}}),
            "no layer, norm or embedding",
        ),
        (
            lambda q: q["inputs"].update(
                {"model.layers.0.mlp.up_proj": {"activations": {**ROUNDING, "group_size": 5}}}
            ),
            "got 5 for 16 features",
        ),
    ],
)
def test_a_changed_folder_is_refused(run_tiny, tmp_path, change, message):
    run_tiny(keys=W4A4)
    edit(tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "out")


ROUNDING = {"bits": 4, "symmetric": True, "group_size": -1, "clip_ratio": 1.0}
