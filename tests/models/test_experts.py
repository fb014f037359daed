import copy
import json

import pytest
import torch
import transformers
from torch import nn

from bitmend.errors import CheckpointError, ModelError
from bitmend.models.experts import (
    ExpertNames,
    PackedForm,
    UnpackedExperts,
    experts_of,
    refuse_packed,
    router_paths,
    stored_names,
    unpack_experts_,
)
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.testing.replay import replay

PACKED_IN_FILES = ("granite-moe", "gpt-oss")


def experts_path(family):
    return "block_sparse_moe.experts" if family == "granite-moe" else "mlp.experts"


def packed_of(model, family, index=1):
    return model.model.layers[index].get_submodule(experts_path(family))


def unpacked_like(packed):
    """Return the packed module taken apart, filled with its weights by hand."""
    form = PackedForm.of(packed)
    values = {name: value.detach().clone() for name, value in packed.named_parameters()}
    unpacked = UnpackedExperts(copy.deepcopy(packed), form, ExpertNames())
    with torch.no_grad():
        for place, parameter in unpacked.named_parameters():
            name, expert, role, leaf = unpacked.source_of(place)
            parameter.copy_(form.cut(values[name][expert], role, leaf))
    return unpacked


def routing(tokens, experts, choices, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=draw).softmax(-1)
    weights, index = scores.topk(choices, dim=-1)
    return index, weights.to(dtype)


# ------------------------------------------------------------------------------------------------ the function
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_computes_what_the_packed_module_does(expert_families, expert_family, implementation, dtype):
    if implementation == "grouped_mm" and dtype == torch.float64:
        pytest.skip("torch has no grouped product in float64")
    model = expert_families[expert_family].build().to(dtype)
    model.config._experts_implementation = implementation
    packed = packed_of(model, expert_family)
    unpacked = unpacked_like(packed)
    hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    index, weights = routing(50, 4, 2, dtype=dtype)
    with torch.no_grad():
        found, expected = unpacked(hidden, index, weights), packed(hidden, index, weights)
    # Both multiply the same numbers. Each of the two products rounds a sum of at most 24 terms, in float32 inside, to
    # `dtype`; then come a few roundings of activation, weighting and the sum over two experts.
    slack = 16 * torch.finfo(dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= slack
    assert expected.abs().max() > 0


def test_does_not_depend_on_the_order_of_tokens(expert_families):
    model = expert_families["mixtral"].build()
    model.config._experts_implementation = "eager"
    packed = packed_of(model, "mixtral")
    unpacked = unpacked_like(packed)
    hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    index, weights = routing(50, 4, 2)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = unpacked(hidden[order], index[order], weights[order])
        torch.testing.assert_close(found, packed(hidden, index, weights)[order], rtol=1e-5, atol=1e-6)


def test_an_expert_without_tokens_is_not_run_and_a_number_of_no_expert_is_left_out(expert_families):
    unpacked = unpacked_like(packed_of(expert_families["mixtral"].build(), "mixtral"))
    called = []
    for number, expert in enumerate(unpacked.children()):
        expert.register_forward_pre_hook(lambda _, arguments, n=number: called.append((n, len(arguments[0]))))
    hidden = torch.randn(3, 16)
    with torch.no_grad():
        made = unpacked(hidden, torch.tensor([[0, 2], [2, 0], [0, 4]]), torch.full((3, 2), 0.5))
        assert called == [(0, 3), (2, 2)]
        assert torch.allclose(made[2], 0.5 * unpacked.get_submodule("0")(hidden[2:])[0])
        assert torch.equal(unpacked(hidden[:0], torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)), hidden[:0])


def test_a_projection_without_gate():
    class Plain(nn.Module):
        has_gate, has_bias, is_transposed, is_concatenated = False, False, False, True

        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(3, 6, 4))
            self.down_proj = nn.Parameter(torch.randn(3, 4, 6))
            self.act_fn = nn.ReLU()

    packed = Plain()
    unpacked = unpacked_like(packed)
    assert unpacked.steps() == (("up_proj",), ("down_proj",))
    hidden = torch.randn(5, 4)
    found = unpacked(hidden, torch.full((5, 1), 1), torch.ones(5, 1))
    assert torch.allclose(found, (hidden @ packed.up_proj[1].T).relu() @ packed.down_proj[1].T, atol=1e-6)


# ------------------------------------------------------------------------------------------------ what is recognised
def test_forms(expert_families):
    found = {name: PackedForm.of(packed_of(family.build(), name)) for name, family in expert_families.items()}
    assert found["mixtral"] == PackedForm(4, 16, 24, True, False, False, True)
    assert found["qwen3-moe"] == PackedForm(4, 16, 8, True, False, False, True)
    assert found["gpt-oss"] == PackedForm(4, 16, 24, True, True, True, False)


@pytest.mark.parametrize("change", ["norm", "parameter", "buffer", "undeclared"])
def test_other_forms_are_left_alone_and_refused(expert_families, change):
    model = expert_families["mixtral"].build()
    packed = packed_of(model, "mixtral")
    if change == "norm":
        packed.has_post_expert_norm = True
    elif change == "parameter":
        packed.extra = nn.Parameter(torch.ones(3))
    elif change == "buffer":
        packed.register_buffer("extra", torch.ones(3))
    else:
        del packed.is_concatenated
    assert unpack_experts_(model) == ("model.layers.0.mlp.experts", "model.layers.2.mlp.experts")
    with pytest.raises(
        ModelError,
        match=r"model\.layers\.1\.mlp\.experts \(MixtralExperts\) packs its experts as \{'gate_up_proj': \(4, 48, 16\)",
    ):
        refuse_packed(model)


def test_what_was_taken_apart_is_not_refused(expert_families, expert_family):
    model = expert_families[expert_family].build()
    assert unpack_experts_(model) == tuple(f"model.layers.{n}.{experts_path(expert_family)}" for n in range(3))
    refuse_packed(model)
    assert unpack_experts_(model) == ()  # nothing is left to take apart


def test_names_are_those_of_the_checkpoints(expert_families, expert_family):
    names = stored_names(expert_families[expert_family].build())
    if expert_family in PACKED_IN_FILES:
        assert names is None
    else:
        assert names == (ExpertNames("w1", "w3", "w2") if expert_family == "mixtral" else ExpertNames())


def test_routers(expert_families, expert_family):
    model = expert_families[expert_family].build()
    unpack_experts_(model)
    expected = {
        "qwen2-moe": ("mlp.gate", "mlp.shared_expert_gate"),
        "granite-moe": ("block_sparse_moe.router",),
        "gpt-oss": ("mlp.router",),
    }
    assert router_paths(model.model.layers[0]) == expected.get(expert_family, ("mlp.gate",))


def test_a_layer_beside_the_experts_that_only_looks_like_a_router_is_none(expert_families):
    model = expert_families["mixtral"].build()
    unpack_experts_(model)
    layer = model.model.layers[0]
    layer.mlp.shared = nn.ModuleDict({"gate_proj": nn.Linear(16, 4), "k_proj": nn.Linear(16, 4)})
    assert router_paths(layer) == ("mlp.gate",)


def test_a_dense_model_has_no_experts(families):
    model = families["llama"].build()
    assert unpack_experts_(model) == ()
    assert experts_of(model) == {}
    assert router_paths(model.model.layers[0]) == ()


# ------------------------------------------------------------------------------------------------ from disk
def whole(folder, batch, implementation=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation).eval()
    mask = None if batch.mask is None else batch.mask.long()
    with torch.no_grad():
        return model(batch.ids, attention_mask=mask).logits


@pytest.mark.parametrize("rows", ["full_rows", "ragged_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_is_the_models_own_forward(saved, expert_family, rows, dtype, request):
    batch = request.getfixturevalue(rows)
    folder = saved(expert_family, dtype=dtype)
    found, expected = replay(HfCausalLm.open(folder), batch).float(), whole(folder, batch).float()
    # Another order of products in each of three layers; a token whose routing is nearly a tie may then go elsewhere, but
    # none of these does.
    slack = 32 * torch.finfo(dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= slack


def test_block_by_block_equals_the_unpacked_model_bit_for_bit(saved, expert_family, ragged_rows, products_as_run):
    adapter = HfCausalLm.open(saved(expert_family))
    found = replay(adapter, ragged_rows)
    for index in range(3):
        adapter.load_block(index)
    with torch.no_grad(), products_as_run(adapter.model, adapter.block_names):
        expected = adapter.model(ragged_rows.ids, attention_mask=ragged_rows.mask.long()).logits
    assert torch.equal(found, expected)


def test_groups_and_routers(saved, expert_families, expert_family, full_rows):
    adapter = HfCausalLm.open(saved(expert_family))
    adapter.load_block(2)
    block = adapter.describe_block(2, full_rows)
    assert [(group.name, group.norm) for group in block.groups] == expert_families[expert_family].groups
    assert block.unread == ()
    assert block.routers
    assert not {site.path for site in block.sites} & set(block.routers)
    places = [group.expert for group in block.groups if group.expert is not None]
    assert [(place.step, place.number) for place in places] == [
        (step, number) for step in (0, 1) for number in range(4)
    ]
    assert places[-1].path == f"{experts_path(expert_family)}.3"


def test_an_expert_that_no_token_of_the_trace_reaches_is_still_found(saved, tmp_path, full_rows):
    adapter = HfCausalLm.open(saved("qwen3-moe"))
    block = adapter.load_block(0)
    with torch.no_grad():  # a router that knows two experts
        block.mlp.gate.weight.zero_()
        block.mlp.gate.weight[:2] = 100 * torch.randn(2, 16).sign()
    described = adapter.describe_block(0, full_rows)
    assert described.unread == ()
    assert len(described.sites) == 4 + 12


def test_tensors_of_a_block_have_the_names_of_single_experts(saved):
    adapter = HfCausalLm.open(saved("mixtral"))
    adapter.load_block(0)
    names = set(adapter.block_tensors(0))
    assert "model.layers.0.mlp.experts.3.w2.weight" in names
    assert "model.layers.0.mlp.gate.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    assert adapter.stored_name("model.layers.0.mlp.experts.3.w2.weight") == (
        "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    )


@pytest.mark.parametrize("family", PACKED_IN_FILES)
def test_one_expert_of_a_packed_tensor_is_read_and_no_more(saved, family, monkeypatch):
    asked = []
    adapter = HfCausalLm.open(saved(family))
    original = adapter._source.weights.get
    monkeypatch.setattr(
        adapter._source.weights, "get", lambda name, part=None: asked.append((name, part)) or original(name, part)
    )
    adapter.load_block(0)
    parts = {part for name, part in asked if "gate_up_proj" in name or "input_linear" in name}
    assert parts == {0, 1, 2, 3}


def test_a_packed_tensor_of_another_shape_is_refused(saved, tmp_path):
    source = saved("gpt-oss")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"has shape \(4, 16, 48\), need \(4, 16, 64\) by the config"):
        HfCausalLm.open(tmp_path)


def test_meta_and_dtype_follow_the_packed_module(expert_families):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(expert_families["mixtral"].config(), dtype=torch.bfloat16)
    unpack_experts_(model)
    one = model.get_parameter("model.layers.0.mlp.experts.0.w1.weight")
    assert one.is_meta
    assert one.dtype == torch.bfloat16
