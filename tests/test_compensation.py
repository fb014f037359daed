import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from bitmend.compensation import (
    CHILD,
    STRUCTURES,
    Compensation,
    CompensationShape,
    attach_compensation_,
)
from bitmend.errors import ModelError


def made(shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Compensation(shape, {name: torch.randn(size, generator=draw) for name, size in shape.shapes.items()})


def shaped(structure, **about):
    about = {"low_rank": {"rank": 2}, "block_diagonal": {"groups": 2}}.get(structure, {}) | about
    return CompensationShape(structure, 4, 4, **about)


def dense(map):
    """Return the (out, in) matrix of a map from its input."""
    shape = map.shape
    if shape.structure == "low_rank":
        return map.up @ map.down
    if shape.structure == "block_diagonal":
        return torch.block_diag(*map.weight.split(shape.outputs // shape.groups))
    return map.weight if shape.structure == "full" else torch.zeros(shape.outputs, shape.inputs)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_tokens(structure):
    map = made(shaped(structure))
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    wanted = y + x @ dense(map).T + map.bias
    if structure == "affine":
        wanted = y + map.scale * y + map.bias
    assert torch.allclose(map(x, y), wanted, atol=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_maps_of_pictures_with_a_stride(structure):
    map = made(shaped(structure, channels_first=True, stride=2))
    x, y = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 3, 3)
    tokens = Compensation(shaped(structure), {name: map.get_buffer(name) for name in map.shape.shapes})
    wanted = tokens(x[:, :, ::2, ::2].movedim(1, -1), y.movedim(1, -1)).movedim(-1, 1)
    assert torch.allclose(map(x, y), wanted, atol=1e-6)


def test_the_sum_is_cut_off_at_zero():
    map = Compensation(shaped("bias", clamped=True), {"bias": torch.tensor([-1.0, 0.0, 0.5, -0.1])})
    y = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    assert torch.allclose(map(y, y), torch.tensor([[0.0, 0.5, 1.0, 0.4]]))


def test_stored_types_stay_and_the_model_computes_in_its_own():
    shape = shaped("full")
    tensors = {"weight": torch.randn(4, 4).bfloat16(), "bias": torch.randn(4)}
    map = Compensation(shape, tensors)
    x = torch.randn(3, 4)
    found = map(x, x)
    assert found.dtype == torch.float32
    assert torch.allclose(found, x + linear(x, tensors["weight"].float()) + tensors["bias"])
    assert map(x.bfloat16(), x.bfloat16()).dtype == torch.bfloat16
    assert map.weight.dtype == torch.bfloat16


def test_bytes_are_those_of_the_tensors():
    for structure in STRUCTURES:
        shape = shaped(structure)
        tensors = {
            n: torch.zeros(s, dtype=torch.float32 if n == "bias" else torch.float16) for n, s in shape.shapes.items()
        }
        assert shape.num_bytes() == sum(tensor.nbytes for tensor in tensors.values())


class GivesMore(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden_states, flag=None):
        return (self.layer(hidden_states), "more")


@pytest.mark.parametrize("by_name", [False, True])
def test_attached_to_a_block_and_taken_off(by_name):
    block, map, x = GivesMore(), made(shaped("full")), torch.randn(2, 4)
    before = block(x)[0]
    attach_compensation_(block, map)
    found = block(hidden_states=x) if by_name else block(x)
    assert found[1] == "more"
    assert torch.equal(found[0], map(x, before))
    assert f"{CHILD}.weight" in block.state_dict()


def test_a_module_that_is_no_block_is_told():
    block = GivesMore()
    attach_compensation_(block, Compensation(CompensationShape("bias", 3, 3), {"bias": torch.zeros(3)}))
    with pytest.raises(ModelError, match="for 3 features, but the block gives 4"):
        block(torch.randn(2, 4))
    norm = nn.Identity()
    attach_compensation_(norm, made(shaped("full")))
    with pytest.raises(ModelError, match="not called with hidden states"):
        norm(input=torch.randn(2, 4))
