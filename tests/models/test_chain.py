"""The chain of hand-made networks: what is taken apart, where it ends, what lies outside."""

import pytest
import torch
from torch import nn

from bitmend.errors import ModelError
from bitmend.models.chain import find_chain

SHAPE = (3, 8, 8)


def convolution(given=4, made=4):
    return nn.Sequential(nn.Conv2d(given, made, 3, padding=1), nn.ReLU())


class Residual(nn.Module):
    """A block whose output is a sum."""

    def __init__(self, channels=4):
        super().__init__()
        self.one, self.two = convolution(channels, channels), convolution(channels, channels)

    def forward(self, hidden, scale=1.0):
        return self.two(self.one(hidden)) * scale + hidden


class Network(nn.Module):
    """A stem, a stage of two blocks, a module that changes the shape, a stage of one block, a pool and a head."""

    def __init__(self):
        super().__init__()
        self.stem = convolution(3, 4)
        self.first = nn.Sequential(Residual(), Residual())
        self.down = nn.Sequential(nn.Conv2d(4, 6, 2, stride=2), nn.Dropout(0.5))
        self.second = nn.ModuleList([Residual(6)])
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, pixels):
        hidden = self.down(self.first(self.stem(pixels)))
        for block in self.second:
            hidden = block(hidden, scale=2.0)
        return self.head(self.norm(hidden).mean((2, 3)))


def chain_of(kind, shape=SHAPE):
    with torch.device("meta"):
        network = kind().eval()
    return find_chain(network, shape, network, torch.float32)


def test_stages_come_apart_and_blocks_do_not():
    chain = chain_of(Network)
    assert [link.name for link in chain.links] == ["stem", "first.0", "first.1", "down", "second.0"]
    assert chain.heads == ("head",)
    assert chain.first_layer == "stem.0"
    assert (chain.elsewhere, chain.idle) == ((), ())


def test_shapes_and_arguments_of_the_links():
    links = {link.name: link for link in chain_of(Network).links}
    assert links["stem"].input_shape == SHAPE
    assert (links["down"].input_shape, links["down"].output_shape) == ((4, 8, 8), (6, 4, 4))
    assert links["second.0"].arguments == ((), {"scale": 2.0})
    assert links["first.0"].arguments == ((), {})


class Pair(nn.Module):
    """A block that returns its hidden states first in a tuple, with the size of what it was given."""

    def __init__(self):
        super().__init__()
        self.inner = Residual()

    def forward(self, hidden):
        return self.inner(hidden) + hidden, {"size": tuple(hidden.shape[2:]), "more": hidden.sum()}


class InTuples(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.pair, self.last, self.head = convolution(3, 4), Pair(), Residual(), nn.Linear(4, 2)

    def forward(self, pixels):
        hidden, about = self.pair(self.stem(pixels))
        assert about["size"] == tuple(pixels.shape[2:])
        return self.head(self.last(hidden).mean((2, 3)))


def test_what_a_block_returns_is_wrapped_as_it_was():
    chain = chain_of(InTuples)
    assert [link.name for link in chain.links] == ["stem", "pair", "last"]
    pair = chain.links[1]
    hidden = torch.ones(1)
    wrapped = pair.wrap(hidden)
    assert pair.unwrap(wrapped) is hidden
    assert wrapped == (hidden, {"size": (8, 8), "more": None})


class Forked(Network):
    """Two layers read the pictures."""

    def __init__(self):
        super().__init__()
        self.beside = nn.Conv2d(3, 4, 1)

    def forward(self, pixels):
        return super().forward(pixels) + self.beside(pixels).mean()


def test_a_fork_at_the_pictures_leaves_no_chain():
    with pytest.raises(ModelError, match="has no row of modules that hand one tensor on"):
        chain_of(Forked)


class Masked(Network):
    """A block that gets a tensor beside its input."""

    def forward(self, pixels):
        hidden = self.first(self.stem(pixels))
        hidden = self.down(hidden)
        hidden = self.second[0](hidden, pixels.mean())
        return self.head(self.norm(hidden).mean((2, 3)))


def test_a_block_that_gets_another_tensor_ends_the_chain():
    chain = chain_of(Masked)
    assert [link.name for link in chain.links][-1] == "down"
    assert chain.elsewhere == ("second.0.one.0", "second.0.two.0")


class Mixing(nn.Module):
    """A block that makes one row of two pictures."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = convolution(3, 4), Residual(), nn.Linear(4, 2)

    def forward(self, pixels):
        hidden = self.stem(pixels)
        return self.head(self.block(hidden.mean(0, keepdim=True)).mean((2, 3)))


def test_a_module_that_ran_not_is_idle_and_pictures_have_rows():
    class WithSpare(Network):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(3, 3)

    assert chain_of(WithSpare).idle == ("spare",)
    chain = chain_of(Mixing)
    assert [link.name for link in chain.links] == ["stem"]


def test_pictures_that_the_model_cannot_read():
    with pytest.raises(ModelError, match=r"Network could not be followed on pictures of \(4, 8, 8\)"):
        chain_of(Network, (4, 8, 8))


class Counting(Network):
    """A block that is told how many pictures there are."""

    def forward(self, pixels):
        hidden = self.down(self.first(self.stem(pixels)))
        return self.head(self.norm(self.second[0](hidden, scale=float(len(pixels)))).mean((2, 3)))


def test_arguments_that_depend_on_the_number_of_pictures_are_refused():
    with pytest.raises(ModelError, match=r"second\.0 is called with, or returns, \['2\.0'\] for 2 pictures"):
        chain_of(Counting)


class Twice(Network):
    """A layer beside the blocks that runs twice."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 6)

    def forward(self, pixels):
        hidden = self.down(self.first(self.stem(pixels)))
        hidden = self.norm(self.second[0](hidden)).mean((2, 3))
        return self.head(self.gate(self.gate(hidden)))


def test_a_layer_that_runs_twice_behind_the_blocks_is_no_idle_one():
    chain = chain_of(Twice)
    assert chain.elsewhere == ("gate",)
    assert chain.idle == ()
