import pytest
import torch

from bitmend.errors import ModelError
from bitmend.linalg.hadamard import Rotation
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.pipeline.transforming import Transforms
from bitmend.protocols import TokenBatch
from bitmend.testing.laws.transform import exact_keeps_the_function
from bitmend.transforms.quarot import QuaRot

BATCH = TokenBatch(torch.arange(3, 19).unsqueeze(0))


def transformed(folder, part):
    adapter = HfCausalLm.open(folder, dtype=torch.float64)
    transforms = Transforms(adapter, [part], BATCH)
    transforms.begin_()
    adapter.load_block(0)
    block = adapter.describe_block(0, BATCH)
    inputs = transforms.apply_(block, None).inputs
    return adapter, transforms, block, inputs


@pytest.fixture
def folder(tiny, tmp_path):
    return lambda family: tiny.save(tmp_path / family, tiny.build(family))


def test_each_matrix_by_the_equations(folder, tiny):
    place, model = folder("llama"), tiny.build("llama").double()
    adapter, transforms, block, inputs = transformed(place, QuaRot(seed=5))
    old, new = model.model.layers[0], block.module
    whole, head = Rotation(16, 5).matrix(), Rotation(4).matrix()
    in_head, across = torch.block_diag(*[head] * 4), torch.kron(Rotation(4).matrix(), torch.eye(4).double())
    gains = [torch.diag(norm.weight) for norm in (old.input_layernorm, old.post_attention_layernorm)]
    attention, mlp = old.self_attn, old.mlp
    kv_heads = torch.block_diag(*[head] * 2)
    wanted = {
        "self_attn.q_proj": attention.q_proj.weight @ gains[0] @ whole,
        "self_attn.v_proj": kv_heads.T @ attention.v_proj.weight @ gains[0] @ whole,
        "self_attn.o_proj": whole.T @ attention.o_proj.weight @ in_head @ across,
        "mlp.up_proj": mlp.up_proj.weight @ gains[1] @ whole,
        "mlp.down_proj": whole.T @ mlp.down_proj.weight @ Rotation(24).matrix(),
    }
    for path, weight in wanted.items():
        assert torch.allclose(new.get_submodule(path).weight, weight, atol=1e-12), path
    assert bool((new.input_layernorm.weight == 1).all())
    assert inputs == {"self_attn.o_proj": Rotation(4, inner=4), "mlp.down_proj": Rotation(24)}
    # The whole Hadamard matrix of the attention's result: of all heads and inside each.
    assert torch.allclose(in_head @ across, torch.kron(Rotation(4).matrix(), head))
    ends = adapter.model
    assert torch.allclose(ends.model.embed_tokens.weight, model.model.embed_tokens.weight @ whole)
    assert torch.allclose(ends.lm_head.weight, model.lm_head.weight @ torch.diag(model.model.norm.weight) @ whole)
    assert transforms.inputs == transforms.outputs == {}


def test_a_tied_table_is_left_alone_and_the_stream_rotated_around_it(folder, tiny):
    adapter, transforms, _, _ = transformed(folder("llama-tied"), QuaRot(seed=5))
    old = tiny.build("llama-tied").double()
    assert torch.equal(adapter.model.model.embed_tokens.weight, old.model.embed_tokens.weight)
    assert torch.equal(adapter.model.model.norm.weight, old.model.norm.weight)
    assert transforms.outputs == {"model.embed_tokens": Rotation(16, 5)}
    assert transforms.inputs == {"model.norm": Rotation(16, 5, transposed=True)}


def test_biases_of_what_writes_to_the_residual_stream_turn_with_it(folder, tiny):
    # gpt-oss has biases everywhere.
    _, _, block, _ = transformed(folder("gpt-oss"), QuaRot(seed=5))
    old = tiny.build("gpt-oss").double().model.layers[0]
    whole = Rotation(16, 5)
    assert torch.allclose(block.module.self_attn.o_proj.bias, whole.apply(old.self_attn.o_proj.bias))
    assert torch.allclose(
        block.module.mlp.experts.get_submodule("2.down_proj").bias, whole.apply(old.mlp.experts.down_proj_bias[2])
    )
    assert torch.equal(block.module.self_attn.q_proj.bias, old.self_attn.q_proj.bias)


def test_parts_can_be_left_out(folder):
    place = folder("llama")
    assert transformed(place, QuaRot(online=False))[3] == {}
    # Without the rotation inside each head there is nothing to complete: the attention's result is rotated as a whole.
    assert transformed(place, QuaRot(values=False))[3]["self_attn.o_proj"] == Rotation(16)
    _, _, block, _ = transformed(place, QuaRot(residual=False))
    assert not bool((block.module.input_layernorm.weight == 1).all())


def with_random_norms(model):
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, torch.nn.LayerNorm):
                part.weight.copy_(1 + torch.rand(part.weight.shape, generator=draw))
                part.bias.copy_(torch.randn(part.bias.shape, generator=draw))
    return model


@pytest.mark.parametrize("family", ["gpt2", "neox", "neox-serial", "opt"])
def test_norms_that_centre_let_rotations_pass_that_keep_the_mean(tiny, tmp_path, family):
    folder = tiny.save(tmp_path / family, with_random_norms(tiny.build(family)))
    exact_keeps_the_function(QuaRot(seed=3), lambda: HfCausalLm.open(folder, dtype=torch.float64), BATCH)


def test_gain_and_bias_of_a_norm_that_centres_by_the_equations(tiny, tmp_path):
    model = with_random_norms(tiny.build("gpt2"))
    adapter, transforms, block, _ = transformed(tiny.save(tmp_path / "m", model), QuaRot(seed=5))
    old, new, whole = model.double().transformer.h[0], block.module, Rotation(16, 5, keeps_mean=True)
    weight, norm = old.attn.c_attn.weight.T, old.ln_1  # Conv1D stores (in, out)
    assert torch.allclose(new.attn.c_attn.weight.T, weight @ torch.diag(norm.weight) @ whole.matrix(), atol=1e-6)
    assert torch.allclose(new.attn.c_attn.bias, old.attn.c_attn.bias + weight @ norm.bias, atol=1e-6)
    assert torch.equal(new.ln_1.weight, torch.ones(16).double())
    assert not bool(new.ln_1.bias.any())
    # The table of positions turns in place, the tied table of tokens while the model runs.
    assert torch.allclose(adapter.model.transformer.wpe.weight, whole.apply(model.transformer.wpe.weight), atol=1e-6)
    assert torch.equal(adapter.model.transformer.wte.weight, model.transformer.wte.weight)
    assert transforms.outputs == {"transformer.wte": whole}
    assert transforms.inputs == {"transformer.ln_f": whole.inverse}


def test_a_head_without_a_bias_reads_a_stream_that_is_turned_back(tiny, tmp_path):
    _, transforms, _, _ = transformed(tiny.save(tmp_path / "m", with_random_norms(tiny.build("neox"))), QuaRot(seed=5))
    assert transforms.outputs == {}
    assert transforms.inputs == {"gpt_neox.final_layer_norm": Rotation(16, 5, transposed=True, keeps_mean=True)}


def test_a_reader_without_a_place_for_the_bias_is_told(tiny, tmp_path):
    model = with_random_norms(tiny.build("opt", enable_bias=False))
    with pytest.raises(
        ModelError, match=r"adds a bias, for which .*q_proj, which reads it, has no place; set residual"
    ):
        transformed(tiny.save(tmp_path / "m", model), QuaRot())


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", r"post_attention_layernorm multiplies what is added to it feature by feature"),
        ("opt-projected", r"needs a norm whose result the output head reads"),
    ],
)
def test_models_that_do_not_let_a_rotation_pass_are_told_why(folder, family, message):
    with pytest.raises(ModelError, match=message) as caught:
        transformed(folder(family), QuaRot())
    assert "set residual = false" in str(caught.value)
