"""The whole network at once: the same logits, gradients that do not depend on how they are computed; runs that learn."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from bitmend.errors import CheckpointError, NumericsError, RecipeError, ResumeError
from bitmend.formats.load import load
from bitmend.linalg.learned_rotation import LearnedRotation
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.numerics.activations import ActivationSpec
from bitmend.pipeline.learning import WholeNetwork, rows_to_learn_from
from bitmend.protocols import TokenBatch
from bitmend.transforms.spinquant import SpinQuant

BATCH = TokenBatch(torch.arange(3, 27).view(2, 12))
IDS = torch.arange(3, 43).view(2, 20)
LEARNED = {
    "activations.bits": 4,
    "weights.bits": 8,
    "weights.group_size": -1,
    "transforms": [{"name": "spinquant", "steps": 2, "rows": 1, "learning_rate": 0.2, "force": True}],
}


@pytest.fixture
def folder(tiny, tmp_path):
    return lambda family="llama": tiny.save(tmp_path / family, tiny.build(family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_logits_and_gradients_are_those_of_the_model(folder, tiny, family):
    adapter = HfCausalLm.open(folder(family), dtype=torch.float32)
    network = WholeNetwork(adapter, rows_to_learn_from([(BATCH, False)]), lambda site: None, BATCH)
    model = tiny.build(family)
    with torch.no_grad():
        wanted = model(BATCH.ids[1:]).logits[0]
        torch.testing.assert_close(network.logits(1), wanted, atol=1e-5, rtol=1e-5)
    # The gradient by a factor of what one layer reads, through blocks that are computed again.
    factors = [torch.ones((), requires_grad=True) for _ in range(2)]
    path = network.blocks[0][0].sites[0].path
    layers = [network.blocks[0][0].module.get_submodule(path)]
    layers.append(model.get_submodule(network.blocks[0][0].sites[0].name))
    for factor, layer in zip(factors, layers, strict=True):
        layer.register_forward_pre_hook(lambda _, args, factor=factor: (args[0] * factor,))
    network.logits(1).square().sum().backward()
    model(BATCH.ids[1:]).logits[0].square().sum().backward()
    torch.testing.assert_close(factors[0].grad, factors[1].grad, rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in adapter.model.parameters())


def test_rows_of_the_fit_split_without_their_padding():
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    rows = rows_to_learn_from([(TokenBatch(ids, mask), False), (TokenBatch(ids + 1, mask), True)])
    assert [row.ids.tolist() for row in rows] == [[[5, 6, 7]], [[8]]]


@pytest.mark.parametrize("family", ["llama-tied", "neox"])
def test_a_rotation_that_runs_with_the_model_lies_in_the_files(run_tiny, folder, tmp_path, family):
    run_tiny(model=folder(family), keys=LEARNED)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    holder = model.get_input_embeddings()
    assert holder.rotation_codes.dtype == torch.int16
    assert bool(holder.rotation_codes.any())
    manifest = model.hf_quantizer.quantization_config.manifest
    found = [one.rotation for one in manifest.inputs.values() if isinstance(one.rotation, LearnedRotation)]
    found += manifest.outputs.values()
    assert len(found) == (2 if family == "llama-tied" else 1)
    turn = replace(found[0], codes=lambda: holder.rotation_codes).matrix()
    torch.testing.assert_close(turn @ turn.T, torch.eye(16, dtype=torch.float64))
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        inner = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert torch.equal(inner(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"])
def test_the_loaded_model_is_nearly_the_model_it_was(run_tiny, folder, tiny, tmp_path, family):
    # Eight bits everywhere: a rotation that is not undone would leave nothing of the logits.
    run_tiny(model=folder(family), keys={**LEARNED, "activations.bits": 8})
    with torch.no_grad():
        found, wanted = load(tmp_path / "out")(IDS).logits, tiny.build(family)(IDS).logits
    assert float((found - wanted).norm()) < 0.05 * float(wanted.norm())


def test_resume_takes_what_was_learned(run_tiny, interrupted, tmp_path, monkeypatch):
    run_tiny(keys=LEARNED)
    interrupted(10, "stopped", keys=LEARNED)
    assert (tmp_path / "stopped.partial" / "journal" / "learned.safetensors").is_file()
    monkeypatch.setattr(SpinQuant, "learn", lambda *arguments: pytest.fail("learned again"))
    run_tiny(output="stopped", keys=LEARNED, resume=True)
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "stopped"))
    assert one.read_bytes() == other.read_bytes()


def test_a_damaged_record_of_what_was_learned(run_tiny, interrupted, tmp_path):
    interrupted(10, "stopped", keys=LEARNED)
    path = tmp_path / "stopped.partial" / "journal" / "learned.safetensors"
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    # The finished blocks were made with it, and it may be learned otherwise.
    with pytest.raises(ResumeError, match="had learned for the finished blocks cannot be read any more"):
        run_tiny(output="stopped", keys=LEARNED, resume=True)


def test_what_was_learned_is_kept_before_anything_is_solved(run_tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("bitmend.pipeline.transforming.Transforms.begin_", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(keys=LEARNED)
    assert (tmp_path / "out.partial" / "journal" / "learned.safetensors").is_file()
    monkeypatch.setattr(SpinQuant, "learn", lambda *arguments: pytest.fail("learned again"))
    run_tiny(keys=LEARNED, resume=True)


def _interrupt(*arguments):
    raise KeyboardInterrupt


def test_a_weight_that_is_not_finite_is_named_before_anything_is_learned(run_tiny, tiny, tmp_path):
    model = tiny.build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"the weight of model\.layers\.1\.mlp\.up_proj must be finite"):
        run_tiny(model=tiny.save(tmp_path / "nan", model), keys=LEARNED)


def test_routers_are_not_rounded(folder):
    adapter = HfCausalLm.open(folder("mixtral"), dtype=torch.float32)
    network = WholeNetwork(adapter, rows_to_learn_from([(BATCH, False)]), lambda site: ActivationSpec(4), BATCH)
    block, wiring = network.blocks[0]
    readers = wiring.readers["post_attention_layernorm"]
    assert network.rounding(block, "mlp.gate") is None
    assert "mlp.gate" in readers
    assert network.rounding(block, readers[1]) == ActivationSpec(4)


def test_the_second_network_is_gone_when_it_has_been_learned(run_tiny, monkeypatch):
    seen = []
    plain = WholeNetwork.__init__

    def watched(self, adapter, *arguments):
        seen.append(weakref.ref(adapter.model))
        plain(self, adapter, *arguments)

    monkeypatch.setattr(WholeNetwork, "__init__", watched)
    monkeypatch.setattr(
        "bitmend.pipeline.transforming.Transforms.take_", lambda *arguments: pytest.fail("held") if seen[0]() else None
    )
    run_tiny(keys=LEARNED)
    assert len(seen) == 1


def test_a_second_rotation_of_the_residual_stream_is_told_before_anything_is_learned(run_tiny, monkeypatch):
    monkeypatch.setattr(WholeNetwork, "__init__", lambda *arguments: pytest.fail("it has begun to learn"))
    both = {**LEARNED, "transforms": [*LEARNED["transforms"], {"name": "quarot"}]}
    with pytest.raises(RecipeError, match="two transforms rotate the residual stream: spinquant and quarot; leave one"):
        run_tiny(keys=both)


def test_nothing_to_learn_from_is_told_before_anything_runs(run_tiny):
    with pytest.raises(
        RecipeError, match="spinquant learns from the rounding of activations, but the recipe rounds none"
    ):
        run_tiny(keys={"transforms": [{"name": "spinquant"}]})


CHANGES = [
    (lambda one: one.update(holder="model.nowhere"), "changes activations at model.nowhere"),
    (
        lambda one: one.update(holder="model.norm"),
        "has learned rotations|has the shape|lacks model.norm.rotation_codes",
    ),
    (lambda one: one.update(holder=3), "'holder' to be of type str"),
    (lambda one: one.update(inner=2), "starts from one of single features"),
    (lambda one: one.update(size=8), "rotates 8 x 1 features at"),
    (lambda one: one.update(size=1 << 19), "must have learned at most"),
]


def test_folders_that_say_something_else_are_refused(run_tiny, folder, tmp_path):
    run_tiny(model=folder("llama-tied"), keys=LEARNED)
    path = tmp_path / "out" / "config.json"
    whole = path.read_text()
    for change, message in CHANGES:
        config = json.loads(whole)
        change(config["quantization_config"]["inputs"]["model.norm"]["rotation"])
        del config["quantization_config"]["seal"]
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "out")
    # A holder that only the whole model has, where the inner one is loaded alone.
    config = json.loads(whole)
    quantization = config["quantization_config"]
    for table, name in (("inputs", "model.norm"), ("outputs", "model.embed_tokens")):
        quantization[table][name]["rotation"]["holder"] = "lm_head"
    del quantization["seal"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"looks for the codes of a rotation at model\.norm in 'lm_head'"):
        AutoModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("spoil", ["wide", "none"])
def test_codes_of_another_type_or_none_are_refused(run_tiny, folder, tmp_path, spoil):
    run_tiny(model=folder("llama-tied"), keys=LEARNED)
    weights = tmp_path / "out" / "model.safetensors"
    tensors, name = load_file(weights), "model.embed_tokens.rotation_codes"
    codes = tensors.pop(name)
    if spoil == "wide":
        tensors[name] = codes.to(torch.int64) << 40
    save_file(tensors, weights, {"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["files"] = {}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for kind in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(CheckpointError, match=r"16-bit whole numbers|lacks .*rotation_codes"):
            kind.from_pretrained(tmp_path / "out")
