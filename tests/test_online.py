import torch
from torch import nn

from bitmend.linalg.hadamard import Rotation
from bitmend.numerics.activations import ActivationSpec
from bitmend.online import InputScheme, attach_input, attach_output, rounding_put_off


def test_rotation_comes_before_rounding():
    values = torch.randn(3, 8)
    rotation, activations = Rotation(8, 1), ActivationSpec(4)
    assert torch.equal(InputScheme(rotation, activations).apply(values), activations.round(rotation.apply(values)))
    assert torch.equal(InputScheme(rotation).apply(values), rotation.apply(values))
    assert torch.equal(InputScheme(None, activations).apply(values), activations.round(values))
    assert InputScheme().apply(values) is values


def test_attached_until_it_is_taken_off():
    layer, values = nn.Linear(8, 4), torch.randn(3, 8)
    scheme, plain = InputScheme(Rotation(8), ActivationSpec(3)), layer(values)
    handle = attach_input(layer, scheme)
    assert torch.equal(layer(values), nn.functional.linear(scheme.apply(values), layer.weight, layer.bias))
    handle.remove()
    assert torch.equal(layer(values), plain)
    handle = attach_output(layer, Rotation(4))
    assert torch.equal(layer(values), Rotation(4).apply(plain))
    handle.remove()
    assert torch.equal(layer(values), plain)


def test_two_at_one_layer_act_in_the_order_in_which_they_were_attached():
    layer, values = nn.Identity(), torch.randn(3, 8)
    attach_input(layer, InputScheme(Rotation(8, 1)))
    attach_input(layer, InputScheme(None, ActivationSpec(2)))
    assert torch.equal(layer(values), ActivationSpec(2).round(Rotation(8, 1).apply(values)))


def test_rounding_can_be_put_off():
    layer, seen = nn.Linear(4, 2), []
    attach_input(layer, InputScheme(Rotation(4)))
    attach_input(layer, InputScheme(activations=ActivationSpec(3)))
    layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    values = torch.randn(5, 4)
    with rounding_put_off(layer) as found:
        layer(values)
    layer(values)
    turned = Rotation(4).apply(values)
    assert found == [ActivationSpec(3)]
    assert torch.equal(seen[0], turned)  # rotated, not rounded
    assert torch.equal(seen[1], ActivationSpec(3).round(turned))
