import json

import pytest
import torch
from safetensors.torch import load_file

import bitmend.formats.native_source as module
from bitmend.errors import CheckpointError, RequestError
from bitmend.formats.native_source import fusion_events, in_parts, open_native


def test_modules_are_sorted_by_what_becomes_of_them(quantised, helpers):
    def scheme(name):
        return None if "q_proj" in name else helpers.spec(4)

    made = quantised(scheme)
    source = open_native(made.output, "X")
    assert set(source.dequantised) == {"model.embed_tokens", "lm_head"}
    assert set(source.exported) == set(made.qtensors) - set(source.dequantised)
    assert set(source.unquantised) == {"lm_head", *(f"model.layers.{n}.self_attn.q_proj" for n in (0, 1))}
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(source.packed(name).dequantize(), made.qtensors[name].dequantize())
    assert [(event.kind, event.where) for event in source.dequantised_events()] == [
        ("dequantised", name) for name in source.dequantised
    ]


def test_other_tensors_are_all_that_is_not_exported_as_quantised(quantised, helpers):
    made = quantised(lambda name: helpers.spec(4) if "embed" in name or "up_proj" in name else None)
    others = {name: tensor for piece in open_native(made.output, "X").other_tensors() for name, tensor in piece.items()}
    state = made.dense.state_dict()
    assert others.keys() == {name for name in state if "up_proj.weight" not in name}
    assert all(torch.equal(others[name], state[name]) for name in others)
    assert any("up_proj.weight_packed" in name for name in load_file(made.output / "model.safetensors"))


def test_parts_are_bounded_and_complete(monkeypatch):
    monkeypatch.setattr(module, "_PART_BYTES", 100)
    pieces = [{f"t{number}": torch.zeros(20)} for number in range(5)]
    parts = list(in_parts(pieces))
    assert [list(part) for part in parts] == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    assert list(in_parts([])) == []


def test_projections_that_vllm_fuses_must_share_a_scheme():
    schemes = {"a.q_proj": 4, "a.k_proj": 4, "a.v_proj": 4, "b.gate_proj": 4}
    assert list(fusion_events(schemes, [])) == []
    (event,) = fusion_events(schemes, ["b.up_proj"])
    assert (event.kind, event.where) == ("vllm_fusion", "b")
    (event,) = fusion_events(schemes | {"a.k_proj": 3}, [])
    assert "q_proj, k_proj, v_proj of a have different schemes" in event.message


def test_what_cannot_be_opened(quantised, helpers, saved):
    made = quantised(lambda name: helpers.spec(8, True, -1) if name == "lm_head" else None)
    with pytest.raises(RequestError, match="has no quantised layer that FORMAT could hold"):
        open_native(made.output, "FORMAT")
    with pytest.raises(RequestError, match="is not in bitmend's own format"):
        open_native(saved("gpt2"), "FORMAT")
    with pytest.raises(CheckpointError, match="there is no model folder"):
        open_native(made.output / "none", "FORMAT")


def test_experts_have_the_names_of_their_own_checkpoints(quantised, helpers):
    spec = helpers.spec()
    made = quantised(lambda name: spec if ".layers." in name and ".experts.1." not in name else None, "mixtral")
    source = open_native(made.output, "X")
    assert source.has_experts
    assert source.name_outside("model.layers.1.mlp.experts.0.w2") == ("model.layers.1.block_sparse_moe.experts.0.w2")
    assert {"model.layers.0.mlp.gate", "model.layers.1.mlp.experts.1.w3", "lm_head"} <= set(source.unquantised)
    others = {name for piece in source.other_tensors() for name in piece}
    assert "model.layers.0.block_sparse_moe.gate.weight" in others
    assert "model.layers.0.block_sparse_moe.experts.1.w1.weight" in others
    assert not any(".mlp." in name for name in others)


def test_packed_experts_have_no_names_to_be_exported_under(quantised):
    made = quantised(family="granite-moe")
    with pytest.raises(
        RequestError,
        match=r"is GraniteMoeForCausalLM, whose checkpoints hold all experts of a layer in one tensor, so that no reader of "
        r"FORMAT looks for them one by one; keep bitmend's format",
    ):
        open_native(made.output, "FORMAT")


def test_experts_of_one_layer_must_share_a_scheme():
    schemes = {f"a.experts.{number}.{leaf}": 4 for number in range(3) for leaf in ("w1", "w2", "w3")}
    assert list(fusion_events(schemes, ["a.gate"])) == []
    (event,) = fusion_events(schemes | dict.fromkeys((f"a.experts.1.{leaf}" for leaf in ("w1", "w2", "w3")), 8), [])
    assert (event.kind, event.where) == ("vllm_fusion", "a.experts")
    assert "the experts of a.experts have different schemes" in event.message
    del schemes["a.experts.2.w2"]
    (event,) = fusion_events(schemes, ["a.experts.2.w2"])
    assert event.where == "a.experts"


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_config_that_asks_for_more_than_the_files_hold(quantised):
    made = quantised()
    change_config(made.output, num_hidden_layers=10**5)
    with pytest.raises(CheckpointError, match=r"asks for a model of \d+ or more tensors"):
        open_native(made.output, "X")


def test_a_config_that_no_model_can_be_built_from(quantised):
    made = quantised()
    change_config(made.output, hidden_act="no-such-function")
    with pytest.raises(CheckpointError, match=r"transformers cannot build the model that .*config\.json describes"):
        open_native(made.output, "X")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "changes", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"vocab_size": 97}, {"num_hidden_layers": 1}]
)
def test_a_config_of_another_model_is_refused(quantised, changes, tied):
    made = quantised(tied=tied)
    open_native(made.output, "X")
    change_config(made.output, **changes)
    with pytest.raises(
        CheckpointError, match=r"has the shape|the checkpoint lacks|which LlamaForCausalLM does not have"
    ):
        open_native(made.output, "X")
