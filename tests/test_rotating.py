"""Folding norms and rotations into single layers; whole networks are in tests/transforms/test_quarot.py."""

import pytest
import torch
from torch import nn

from bitmend.errors import ModelError
from bitmend.linalg.hadamard import Rotation
from bitmend.rotating import fold_norm_, rotate_outputs_
from bitmend.sites import centring_norm, rotate_inputs_

TOKENS = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def random_norm(kind):
    norm = kind(6).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(1 + torch.rand(6, generator=torch.Generator().manual_seed(1)))
    return norm


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_a_folded_norm_and_its_readers_give_what_they_gave(kind):
    norm, readers = random_norm(kind), {name: nn.Linear(6, width).double() for name, width in (("a", 3), ("b", 4))}
    before = [layer(norm(TOKENS)) for layer in readers.values()]
    fold_norm_(norm, "norm", readers, 6)
    assert bool((norm.weight == 1).all())
    for wanted, layer in zip(before, readers.values(), strict=True):
        torch.testing.assert_close(layer(norm(TOKENS)), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_a_rotated_stream_passes_a_folded_norm(kind):
    norm, layer = random_norm(kind), nn.Linear(6, 3).double()
    wanted = layer(norm(TOKENS))
    fold_norm_(norm, "norm", {"layer": layer}, 6)
    rotation = Rotation(6, 2, keeps_mean=kind is nn.LayerNorm)
    rotate_inputs_(layer, rotation)
    torch.testing.assert_close(layer(norm(rotation.apply(TOKENS))), wanted, rtol=1e-5, atol=1e-5)
    # A rotation that does not keep the mean is another thing to a norm that subtracts it.
    if kind is nn.LayerNorm:
        other = Rotation(6, 2)
        rotate_inputs_(layer, rotation.inverse)
        rotate_inputs_(layer, other)
        assert float((layer(norm(other.apply(TOKENS))) - wanted).detach().abs().max()) > 0.01


def test_what_a_layer_gives_is_rotated_with_its_bias():
    layer, rotation = nn.Linear(6, 4).double(), Rotation(4, 1)
    wanted = rotation.apply(layer(TOKENS))
    rotate_outputs_(layer, rotation)
    torch.testing.assert_close(layer(TOKENS), wanted)


def test_norms_that_centre_are_known_by_what_they_do():
    norm = random_norm(nn.LayerNorm)
    gain, bias = centring_norm(norm, 6)
    assert torch.equal(gain, norm.weight)
    assert torch.equal(bias, norm.bias)
    gain, bias = centring_norm(nn.LayerNorm(6, elementwise_affine=False), 6)
    assert gain.tolist() == [1.0] * 6
    assert bias.tolist() == [0.0] * 6
    norm.register_forward_hook(
        lambda module, arguments, output: (
            output + (arguments[0] - arguments[0].mean(-1, True)) / arguments[0].std(-1, correction=0, keepdim=True)
        )
    )  # one more than its weight
    torch.testing.assert_close(centring_norm(norm, 6)[0], norm.weight.detach() + 1)
    assert centring_norm(nn.RMSNorm(6), 6) is None
    assert centring_norm(nn.GroupNorm(2, 6), 6) is None


def test_a_bias_without_a_place_and_a_norm_of_another_kind_are_told():
    with pytest.raises(ModelError, match="norm adds a bias, for which q, which reads it, has no place"):
        fold_norm_(random_norm(nn.LayerNorm), "norm", {"q": nn.Linear(6, 3, bias=False).double()}, 6)
    with pytest.raises(ModelError, match=r"norm \(GroupNorm\) is no norm that divides by the root mean square or by"):
        fold_norm_(nn.GroupNorm(2, 6), "norm", {"q": nn.Linear(6, 3)}, 6)
