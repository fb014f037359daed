import pytest
import torch

from bitmend.errors import ModelError, NumericsError, RecipeError
from bitmend.linalg.hadamard import Rotation
from bitmend.linalg.learned_rotation import learned_size, num_codes, rotated_by
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.numerics.activations import ActivationSpec
from bitmend.online import InputScheme, attach_input
from bitmend.pipeline.learning import WholeNetwork, rows_to_learn_from
from bitmend.pipeline.transforming import Transforms
from bitmend.protocols import LearningTransform, SilentProgress, TokenBatch
from bitmend.testing.laws.transform import applying_is_repeatable, exact_keeps_the_function
from bitmend.transforms.spinquant import SpinQuant, _Learning

BATCH = TokenBatch(torch.arange(3, 27).view(2, 12))
FOUR_BITS = ActivationSpec(4, clip_ratio=0.9)


@pytest.fixture
def folder(tiny, tmp_path):
    return lambda family="llama": tiny.save(tmp_path / family, tiny.build(family))


def network(folder, rounding=lambda site: FOUR_BITS):
    adapter = HfCausalLm.open(folder, dtype=torch.float32)
    return WholeNetwork(adapter, rows_to_learn_from([(BATCH, False)]), rounding, BATCH)


def drawn(part, wiring_blocks=2, hidden=16, head_dim=4, centres=False):
    """A transform that has learned something, at random."""
    draw = torch.Generator().manual_seed(1)
    sizes = {"residual": learned_size(Rotation(hidden, keeps_mean=centres))}
    sizes |= {f"values.{index}": head_dim for index in range(wiring_blocks)}
    learned = {
        name: torch.randint(-4000, 4000, (num_codes(size),), generator=draw, dtype=torch.int16)
        for name, size in sizes.items()
    }
    return part.with_learned(learned)


@pytest.mark.parametrize("law", [exact_keeps_the_function, applying_is_repeatable])
@pytest.mark.parametrize(
    "family", ["llama-tied", "gpt2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("llama", "mixtral"))]
)
def test_laws_hold_with_what_was_learned(folder, family, law):
    place = folder(family)
    part = drawn(SpinQuant(seed=2), head_dim=8 if family == "mixtral" else 4, centres=family == "gpt2")
    law(part, lambda: HfCausalLm.open(place, dtype=torch.float64), BATCH)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounding_in_a_rotated_basis_is_rounding_in_the_rotated_network(folder, family):
    place = folder(family)
    part = drawn(SpinQuant(seed=2), centres=family == "gpt2")
    # The rotated network itself, with its inputs rounded.
    adapter = HfCausalLm.open(place, dtype=torch.float32)
    transforms = Transforms(adapter, [part], BATCH)
    transforms.begin_()
    hidden = adapter.block_inputs(BATCH).hidden
    for index in range(len(adapter.block_names)):
        adapter.load_block(index)
        block = adapter.describe_block(index, BATCH)
        transforms.apply_(block, None)
        handles = [
            attach_input(block.module.get_submodule(site.path), InputScheme(activations=FOUR_BITS))
            for site in block.sites
        ]
        hidden = adapter.run_block(index, hidden, adapter.block_inputs(BATCH))
        for handle in handles:
            handle.remove()
    wanted = adapter.logits(hidden, BATCH).log_softmax(-1)
    # What learning sees, in place of zeros what was drawn.
    learning = _Learning(network(place), part)
    for name, upper in learning.generators.items():
        rows, columns = torch.triu_indices(len(upper), len(upper), 1)
        with torch.no_grad():
            upper[rows, columns] = part._learned[name].float() / 2**14
    learning._made = {name: rotated_by(learning._starts[name], upper) for name, upper in learning.generators.items()}
    with torch.no_grad(), learning._rounding():
        found = torch.stack([learning._network.logits(row) for row in range(2)]).log_softmax(-1)
    plain = torch.stack([learning._network.logits(row) for row in range(2)]).log_softmax(-1).detach()
    # A number near the middle of two levels may fall to either side, so not every token is equal; most are.
    close = (found - wanted).abs().amax(-1) < 0.1 * float((found - plain).abs().amax(-1).mean())
    assert float(close.float().mean()) > 0.6
    assert float((found - plain).abs().mean()) > 5 * float((found - wanted).abs().mean())


def test_the_loss_falls_and_what_is_learned_is_repeatable(folder):
    place = folder()
    part = SpinQuant(steps=15, rows=2, learning_rate=0.02)
    assert isinstance(part, LearningTransform)
    assert part.num_passes == 30
    learned = part.learn(network(place), SilentProgress())
    assert sorted(learned) == ["residual", "values.0", "values.1"]
    assert {name: len(codes) for name, codes in learned.items()} == {"residual": 120, "values.0": 6, "values.1": 6}
    shorter = SpinQuant(steps=2, rows=1)
    one, other = (shorter.learn(network(place), SilentProgress()) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)

    def loss(codes):
        learning = _Learning(network(place), part)
        for name, upper in learning.generators.items():
            rows, columns = torch.triu_indices(len(upper), len(upper), 1)
            with torch.no_grad():
                upper[rows, columns] = codes[name].float() / 2**14 if codes else 0.0
        return learning.gradient_([0, 1])

    assert loss(learned) < 0.9 * loss({})


def test_what_is_left_out_is_not_learned(folder):
    part = SpinQuant(steps=1, rows=1, values=False)
    assert sorted(part.learn(network(folder()), SilentProgress())) == ["residual"]
    part = SpinQuant(steps=1, rows=1, residual=False)
    found = part.learn(network(folder(), lambda site: FOUR_BITS if "o_proj" in site else None), SilentProgress())
    assert sorted(found) == ["values.0", "values.1"]


def test_refusals(folder):
    with pytest.raises(RecipeError, match=r"nothing is rounded; set activations\.bits"):
        SpinQuant().learn(network(folder(), lambda site: None), SilentProgress())
    with pytest.raises(RecipeError, match="has nothing to learn"):
        SpinQuant(residual=False, values=False).learn(network(folder()), SilentProgress())
    with pytest.raises(ModelError, match="needs a norm whose result the output head reads"):
        SpinQuant().learn(network(folder("opt-projected")), SilentProgress())
    with pytest.raises(ModelError, match="multiplies what is added to it feature by feature"):
        SpinQuant().learn(network(folder("gemma2")), SilentProgress())
    broken = network(folder())
    with torch.no_grad():
        broken.blocks[0][0].module.mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(NumericsError, match="the loss of learned rotations must be finite"):
        SpinQuant(steps=1, rows=1).learn(broken, SilentProgress())


def test_what_is_remembered_ends_with_the_block(folder):
    # Else the gradient of a block would keep what all later blocks have computed again.
    learning = _Learning(network(folder()), SpinQuant())
    learning.gradient_([0])
    assert learning._shared
    assert all(one._last is None for one in learning._shared)
