import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitmend.sites import LAYER_VIEWS, Block, LinearSite, SiteGroup, layer_kind


def test_a_linear_and_a_conv1d_with_the_same_function_present_the_same_weight():
    linear, conv = nn.Linear(3, 2, bias=False), Conv1D(2, 3)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    for module in (linear, conv):
        LAYER_VIEWS[layer_kind(module)].write_(module, weight)
    x = torch.tensor([[1.0, 0.0, -1.0]])
    assert torch.equal(linear(x), conv(x))
    assert torch.equal(LAYER_VIEWS["linear"].read(linear), weight)
    assert torch.equal(LAYER_VIEWS["conv1d"].read(conv), weight)
    assert tuple(conv.weight.shape) == (3, 2)


def test_other_layers_are_no_sites():
    assert layer_kind(nn.LayerNorm(4)) is None
    assert layer_kind(nn.Embedding(4, 2)) is None


def test_inputs_are_flattened_to_tokens():
    assert LAYER_VIEWS["linear"].tokens(torch.zeros(2, 5, 3)).shape == (10, 3)
    assert LAYER_VIEWS["conv1d"].tokens(torch.zeros(5, 3)).shape == (5, 3)


def test_a_site_reads_and_stores_inside_its_block():
    block = nn.ModuleDict({"proj": nn.Linear(3, 2, dtype=torch.bfloat16)})
    site = LinearSite("model.layers.0.proj", "proj", "linear", (2, 3))
    site.store_(block, torch.full((2, 3), 0.5))
    assert site.weight(block).dtype == torch.bfloat16
    assert torch.equal(site.weight(block).float(), torch.full((2, 3), 0.5))
    group = SiteGroup("proj", (site,), None)
    assert Block("model.layers.0", 0, block, (group,)).sites == (site,)
