import pytest
import torch
from torch import nn

from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.models.tracing import describe, trace_block
from bitmend.models.wiring import find_wiring
from bitmend.protocols import TokenBatch
from bitmend.sites import ModelEnds, ValueHeads, norm_gain, scale_norm_, set_unit_gain_

BATCH = TokenBatch(torch.arange(3, 11).unsqueeze(0))
QKV = tuple(f"self_attn.{one}_proj" for one in "qkv")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def wiring(folder):
    adapter = HfCausalLm.open(folder)
    adapter.load_block(0)
    block = adapter.describe_block(0, BATCH)
    before = {name: tensor.clone() for name, tensor in adapter.block_tensors(0).items()}
    found = adapter.wiring_of(block, BATCH)
    for name, tensor in adapter.block_tensors(0).items():
        assert torch.equal(tensor, before[name])  # doubled and halved weights are back, bit for bit
    return found


def test_llama(saved):
    found = wiring(saved("llama"))
    assert found.hidden == 16
    assert found.readers == {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP}
    assert found.writers == ("self_attn.o_proj", "mlp.down_proj")
    assert found.after_writers == ()
    assert found.values == ValueHeads("self_attn.v_proj", "self_attn.o_proj", 4, 4, 2)
    assert found.gated == (("mlp.up_proj", "mlp.down_proj"),)


def test_norms_of_queries_are_not_on_the_way_of_the_residual(saved):
    assert wiring(saved("qwen3")).after_writers == ()
    assert wiring(saved("olmoe")).after_writers == ()  # as wide as the residual stream
    assert wiring(saved("gemma2")).after_writers == ("post_attention_layernorm", "post_feedforward_layernorm")


def test_experts_and_their_router_read_the_norm(saved):
    found = wiring(saved("mixtral"))
    readers = found.readers["post_attention_layernorm"]
    assert readers[0] == "mlp.gate"
    assert set(readers[1:]) == {f"mlp.experts.{number}.{leaf}" for number in range(4) for leaf in ("w1", "w3")}
    assert found.writers == ("self_attn.o_proj", *(f"mlp.experts.{number}.w2" for number in range(4)))
    assert found.gated == ()


def test_what_is_made_together_is_not_told_apart(saved):
    for family in ("phi3", "gpt2", "neox"):
        found = wiring(saved(family))
        assert found.values is None
        assert found.gated == ()
    # A ReLU lets a positive factor pass.
    assert wiring(saved("opt")).gated == (("fc1", "fc2"),)


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("llama", ("model.embed_tokens", "model.norm", "lm_head", False, ())),
        ("llama-tied", ("model.embed_tokens", "model.norm", "lm_head", True, ())),
        ("gpt2", ("transformer.wte", "transformer.ln_f", "lm_head", True, ("transformer.wpe",))),
        ("opt-projected", ("model.decoder.embed_tokens", None, "lm_head", True, ("model.decoder.embed_positions",))),
    ],
)
def test_ends(saved, family, ends):
    adapter = HfCausalLm.open(saved(family))
    *paths, added = ends
    assert adapter.ends(BATCH) == ModelEnds(*paths, 16, adapter.model, added)


class PlusOne(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.weight = nn.Parameter(gain - 1)

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)


def test_gains_are_read_from_what_a_norm_does():
    gain = torch.tensor([0.5, 2.0, -1.0, 1.25])
    plain = nn.RMSNorm(4, eps=1e-6)
    with torch.no_grad():
        plain.weight.copy_(gain)
    for norm in (plain, PlusOne(gain)):
        found = norm_gain(norm, 4)
        assert found is not None
        assert torch.equal(found, gain.double())
        values = torch.randn(3, 4)
        before = norm(values)
        scale_norm_(norm, torch.tensor([2.0, 0.5, 4.0, 1.0]))
        assert torch.allclose(norm(values), before * torch.tensor([2.0, 0.5, 4.0, 1.0]))
        set_unit_gain_(norm, 4)
        assert torch.equal(norm_gain(norm, 4), torch.ones(4).double())


def test_norms_that_centre_have_no_gain_to_fold():
    assert norm_gain(nn.LayerNorm(8), 8) is None
    biased = nn.RMSNorm(8)
    biased.register_forward_hook(lambda module, arguments, output: output + 0.5)
    assert norm_gain(biased, 8) is None
    bare = nn.RMSNorm(8, elementwise_affine=False)
    assert torch.allclose(norm_gain(bare, 8), torch.ones(8).double(), atol=1e-4)
    set_unit_gain_(bare, 8)
    with pytest.raises(ValueError, match="without a weight"):
        scale_norm_(bare, torch.ones(8))


def test_a_layer_norm_takes_factors_in_gain_and_bias():
    norm, values, factors = nn.LayerNorm(4), torch.randn(3, 4), torch.tensor([2.0, 0.5, 4.0, 1.0])
    with torch.no_grad():
        norm.bias.normal_()
    before = norm(values)
    scale_norm_(norm, factors)
    assert torch.allclose(norm(values), before * factors)


class OverTokens(nn.Module):
    """Beside a linear layer, a convolution reads the memory of the norm's output, in another shape."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 4)
        self.between = nn.Conv2d(4, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.down = nn.Linear(4, 4)

    def forward(self, x):
        y = self.norm(x)
        picture = self.depthwise(self.between(y.transpose(1, 2).unflatten(2, (3, 3))))
        return x + self.down(self.up(y) + picture.flatten(2).transpose(1, 2))


def test_convolutions_are_left_out():
    torch.manual_seed(0)
    module, x = OverTokens(), torch.randn(2, 9, 4)
    block = describe("top.0", 0, module, trace_block(module, lambda: module(x)), places=18)
    assert {site.path for site in block.sites} == {"up", "between", "depthwise", "down"}
    found = find_wiring(block, lambda: module(x), 4)
    assert found.readers == {"norm": ("up",)}
    assert found.writers == ("down",)
    assert found.gated == ()
