import pytest
import torch

from bitmend.calibrate.dual_stream import DualStream
from bitmend.errors import CalibrationError, RecipeError
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.protocols import TokenBatch
from bitmend.transforms.smooth import Smooth

BATCH = TokenBatch(torch.arange(3, 27).view(2, 12))


@pytest.fixture
def smoothed(tiny, tmp_path):
    def smooth(part, family="llama"):
        adapter = HfCausalLm.open(tiny.save(tmp_path / family, tiny.build(family)), dtype=torch.float64)
        streams = DualStream(adapter, [(BATCH, False)], device=torch.device("cpu"))
        adapter.load_block(0)
        block = adapter.describe_block(0, BATCH)
        wiring = adapter.wiring_of(block, BATCH)
        paths = [site.path for site in block.sites]
        before = streams.largest_inputs(block, paths)
        part.apply_(block, wiring, streams)
        return block.module, tiny.build(family).double().model.layers[0], before, streams.largest_inputs(block, paths)

    return smooth


def test_factors_by_the_equation(smoothed):
    new, old, before, after = smoothed(Smooth(0.75))
    inputs = before["self_attn.k_proj"].double()
    weights = torch.stack([old.self_attn.get_submodule(f"{one}_proj").weight.abs().amax(0) for one in "qkv"]).amax(0)
    factors = inputs**0.75 / weights**0.25
    assert torch.allclose(new.input_layernorm.weight, old.input_layernorm.weight / factors)
    assert torch.allclose(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight * factors)
    assert torch.allclose(after["self_attn.k_proj"].double(), inputs / factors, rtol=1e-5)
    # Between the layers of the MLP.
    inputs = before["mlp.down_proj"].double()
    factors = inputs**0.75 / old.mlp.down_proj.weight.abs().amax(0) ** 0.25
    assert torch.allclose(new.mlp.down_proj.weight, old.mlp.down_proj.weight * factors)
    assert torch.allclose(after["mlp.down_proj"].double(), inputs / factors, rtol=1e-5)


def test_heads_that_share_a_value_share_their_factors(smoothed):
    new, old, before, _ = smoothed(Smooth(1.0, norms=False, gated=False))
    # Four heads read two values: heads 0 and 1 the first, 2 and 3 the second; four features each.
    inputs = before["self_attn.o_proj"].double().view(2, 2, 4).amax(1)
    assert torch.allclose(new.self_attn.v_proj.weight, old.self_attn.v_proj.weight / inputs.view(8, 1), rtol=1e-5)
    repeated = inputs.unsqueeze(1).expand(2, 2, 4).flatten()
    assert torch.allclose(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight * repeated, rtol=1e-5)
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight)
    assert torch.equal(new.input_layernorm.weight, old.input_layernorm.weight)


def test_the_ends_of_the_exponent(smoothed):
    _, _, _, after = smoothed(Smooth(1.0, values=False))
    for path in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        assert torch.allclose(after[path], torch.ones_like(after[path]), rtol=1e-5)  # all inputs evened out
    new, _, _, _ = smoothed(Smooth(0.0, values=False))
    assert torch.allclose(new.mlp.down_proj.weight.abs().amax(0), torch.ones(24).double())  # all weights


def test_features_that_are_never_read_or_weigh_nothing_are_left_alone():
    layer = torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight[:, 1] = 0
    factors = Smooth()._factors(torch.tensor([0.0, 4.0, 4.0]), [layer])
    assert factors[:2].tolist() == [1.0, 1.0]
    assert float(factors[2]) != 1.0


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(RecipeError, match="strength must lie between 0 and 1; got"):
        Smooth(strength)


def test_rows_are_needed(smoothed, tiny, tmp_path):
    adapter = HfCausalLm.open(tiny.save(tmp_path / "m", tiny.build()))
    adapter.load_block(0)
    block = adapter.describe_block(0, BATCH)
    with pytest.raises(CalibrationError, match="smooth needs calibration rows"):
        Smooth().apply_(block, adapter.wiring_of(block, BATCH), None)
