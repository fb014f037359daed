"""One layer with correlated inputs whose quantised stream differs from the full-precision one."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bitmend.linalg.moments import Moments, MomentSums
from bitmend.numerics.granularity import PerChannel, PerGroup
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.protocols import Problem
from bitmend.sites import LinearSite


@dataclass(frozen=True)
class Layer:
    problem: Problem
    x: Tensor
    x_fp: Tensor


def moments_of(x: Tensor, x_fp: Tensor) -> Moments:
    sums = MomentSums(x.shape[1], cross=True, residual=True, device=x.device)
    sums.add_(x, x_fp)
    return sums.means()


@pytest.fixture
def make_layer():
    def make(out=12, width=16, bits=3, symmetric=True, group_size=-1, seed=0, tokens=400, noise=0.2, observer="minmax"):
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(width, width, generator=generator) / width**0.5
        x_fp = torch.randn(2 * tokens, width, generator=generator) @ mixing
        drift = torch.eye(width) + noise * torch.randn(width, width, generator=generator) / width**0.5
        x = x_fp @ drift + 0.5 * noise * torch.randn(2 * tokens, width, generator=generator)
        weight = torch.randn(out, width, generator=generator)
        granularity = PerChannel() if group_size == -1 else PerGroup(group_size)
        spec = QuantSpec(UniformGrid(bits, symmetric), granularity, observer)
        site = LinearSite("model.layers.0.proj", "proj", "linear", (out, width))
        fit = moments_of(x[:tokens], x_fp[:tokens])
        held_out = moments_of(x[tokens:], x_fp[tokens:])
        return Layer(Problem(site, weight, spec, fit, held_out), x[:tokens], x_fp[:tokens])

    return make
