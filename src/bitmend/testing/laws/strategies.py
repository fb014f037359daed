"""Hypothesis strategies: small matrices of odd sizes, with dead columns, constant rows and zeros among them."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bitmend.linalg.moments import Moments, MomentSums
from bitmend.numerics.granularity import Granularity, PerChannel, PerGroup
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.protocols import Problem
from bitmend.sites import LinearSite

ODDITIES = ("none", "dead column", "zero row", "constant row", "all zero", "one large entry")


@st.composite
def matrices(draw: Any, max_rows: int = 7, max_columns: int = 9) -> Tensor:
    """Draw a float32 matrix."""
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    matrix = torch.randn(rows, columns, generator=generator) * 2.0 ** draw(st.integers(-6, 6))
    oddity = draw(st.sampled_from(ODDITIES))
    if oddity == "dead column":
        matrix[:, draw(st.integers(0, columns - 1))] = 0
    elif oddity == "zero row":
        matrix[draw(st.integers(0, rows - 1))] = 0
    elif oddity == "constant row":
        matrix[draw(st.integers(0, rows - 1))] = 0.375
    elif oddity == "all zero":
        matrix.zero_()
    elif oddity == "one large entry":
        matrix[0, 0] = 1000.0
    return matrix


@st.composite
def moments(draw: Any, width: int) -> Moments:
    """Draw the moments G, C and D of correlated tokens, now and then with an input that is always zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    tokens = draw(st.integers(1, 4 * width))
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    if draw(st.booleans()):
        x[:, draw(st.integers(0, width - 1))] = 0
    sums = MomentSums(width, cross=True, residual=True, device=x.device)
    sums.add_(x, x + 0.1 * torch.randn(tokens, width, generator=generator))
    return sums.means()


@st.composite
def specs(draw: Any, width: int, min_bits: int = 1) -> QuantSpec:
    """Draw a grid, per channel or in groups that divide the width or are declared ragged."""
    grid = UniformGrid(draw(st.integers(min_bits, 8)), draw(st.booleans()))
    size = draw(st.integers(1, width))
    granularity: Granularity = draw(st.sampled_from([PerChannel(), PerGroup(size, ragged=True)]))
    observer = draw(st.sampled_from(["minmax", "percentile", "mse"]))
    return QuantSpec(grid, granularity, observer, draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))


@st.composite
def problems(draw: Any) -> Problem:
    """Draw one matrix with everything that a site solver may ask for."""
    weight = draw(matrices())
    rows, columns = weight.shape
    return Problem(
        site=LinearSite("model.layers.0.proj", "proj", "linear", (rows, columns)),
        weight=weight,
        spec=draw(specs(columns)),
        fit=draw(moments(columns)),
        held_out=draw(moments(columns)),
    )
