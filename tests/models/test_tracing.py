import pytest
import torch
from torch import nn

from bitmend.models.tracing import describe, group_name, is_norm, trace_block


def described(block, *inputs):
    block.eval()
    return describe("top.0", 0, block, trace_block(block, lambda: block(*inputs)), places=len(inputs[0]))


def facts(block):
    return [(group.name, group.norm) for group in block.groups]


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (["a.q", "a.k", "a.v"], "a.{q,k,v}"),
        (["mlp.down"], "mlp.down"),
        (["fc1"], "fc1"),
        (["fc1", "fc2"], "{fc1,fc2}"),
        (["a.q", "a.k", "mlp.up"], "a.{q,k}+mlp.up"),
    ],
)
def test_group_name(paths, name):
    assert group_name(paths) == name


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)


class Views(Parts):
    def forward(self, x):
        y = self.norm(x)
        return self.one(y.view(-1, 4)) + self.two(y.unsqueeze(0)).view(-1, 4)


class Residual(Parts):
    def forward(self, x):
        y = self.norm(x)
        return self.two(self.one(y)) + y


class Returned(Parts):
    def forward(self, x):
        y = self.norm(x)
        return self.two(self.one(y)), y


class Overwritten(Parts):
    def forward(self, x):
        y = self.norm(x)
        z = self.one(y)
        y.mul_(2)
        return self.two(y) + z


class Twice(Parts):
    def forward(self, x):
        return self.one(self.one(self.norm(x)))


class Reused(Parts):
    def forward(self, x):
        # The memory of the first product is free again when the second is made.
        first = self.one(x * 2).sum()
        return self.two(x * 3) + first


def test_views_of_one_tensor_are_one_input():
    assert facts(described(Views(), torch.randn(2, 3, 4))) == [("{one,two}", "norm")]


@pytest.mark.parametrize("kind", [Residual, Returned])
def test_a_norm_that_others_read_too_is_not_named(kind):
    assert facts(described(kind(), torch.randn(2, 4))) == [("one", None), ("two", None)]


def test_memory_that_was_overwritten_is_another_input():
    assert facts(described(Overwritten(), torch.randn(2, 4))) == [("one", None), ("two", None)]


def test_memory_that_was_freed_is_another_input():
    assert facts(described(Reused(), torch.randn(2, 4))) == [("one", None), ("two", None)]


def test_a_layer_that_runs_twice_and_one_that_never_runs():
    block = described(Twice(), torch.randn(2, 4))
    assert facts(block) == [("one", None)]
    assert block.unread == ("two",)


def test_unread_names_packed_weights_and_leaves_embeddings_out():
    class Packed(Parts):
        def __init__(self):
            super().__init__()
            self.experts = nn.Module()
            self.experts.gate_up_proj = nn.Parameter(torch.randn(2, 4, 4))
            self.positions = nn.Embedding(3, 4)
            self.table = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return self.two(self.one(x)) @ self.experts.gate_up_proj[0]

    assert described(Packed(), torch.randn(2, 4)).unread == ("table", "experts.gate_up_proj")


def test_hooks_are_gone_after_a_failure():
    block = Parts()
    block.forward = lambda x: block.two(block.one(x)[:, :1])
    with pytest.raises(RuntimeError):
        trace_block(block, lambda: block(torch.randn(2, 4)))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in block.modules())


def test_is_norm():
    class RMSNorm(nn.Module):
        def __init__(self, weight=None):
            super().__init__()
            self.weight = None if weight is None else nn.Parameter(weight)

    assert is_norm(RMSNorm())
    assert is_norm(RMSNorm(torch.ones(4)))
    assert not is_norm(RMSNorm(torch.ones(4, 4)))
    assert is_norm(nn.LayerNorm(4, elementwise_affine=False))
    assert not is_norm(nn.Linear(4, 4))


# ---------------------------------------------------------------------------------------------- convolutions
class Pictures(nn.Module):
    """Two convolutions with the same patches, a shortcut of the same input, a depthwise one, and one padded by reflection."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(4, 6, 3, padding="same")
        self.shortcut = nn.Conv2d(4, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.reflected = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        return self.reflected(self.depthwise(self.one(x) + self.two(x) + self.shortcut(x)))


def test_convolutions_share_an_input_where_they_share_patches():
    block = described(Pictures(), torch.randn(2, 4, 5, 5))
    assert facts(block) == [("{one,two}", None), ("shortcut", None), ("depthwise", None)]
    assert [(site.kind, site.shape) for site in block.sites] == [
        ("conv2d", (6, 36)), ("conv2d", (6, 36)), ("conv2d", (6, 4)), ("grouped_conv2d", (6, 9))
    ]  # fmt: skip
    assert block.unread == ("reflected",)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(4, 6, (3, 1))
        self.two = nn.Conv2d(4, 6, (3, 1))

    def forward(self, x):
        return self.one(x) + self.two(x.transpose(2, 3))


def test_a_picture_and_its_transpose_are_two_inputs():
    assert facts(described(Transposed(), torch.randn(2, 4, 5, 5))) == [("one", None), ("two", None)]


class OverTokens(Parts):
    """A convolution between the tokens, in front of which the norm's output changes its shape."""

    def __init__(self):
        super().__init__()
        self.between = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.norm(x)
        picture = y.transpose(1, 2).unflatten(2, (3, 3))
        return self.one(y) + self.between(picture).flatten(2).transpose(1, 2)


def test_a_norm_that_a_convolution_reads_too_is_not_named():
    block = described(OverTokens(), torch.randn(2, 9, 4))
    assert facts(block) == [("one", None), ("between", None)]
    assert block.unread == ("two",)
