"""Laws of grids."""

import torch
from torch import Tensor

from bitmend.numerics.uniform import UniformGrid


def decoded_codes_encode_to_themselves(grid: UniformGrid, scale: float, zero_point: int) -> None:
    """`encode(decode(c)) == c` for every code."""
    codes = torch.arange(grid.min_code, grid.max_code + 1).to(torch.int8)
    step = torch.tensor(scale)
    zero = None if grid.symmetric else torch.tensor(float(zero_point))
    assert torch.equal(grid.encode(grid.decode(codes, step, zero), step, zero), codes)


def encoding_finds_the_nearest_level(grid: UniformGrid, values: Tensor, scale: float, zero_point: int) -> None:
    """No other level is nearer, by brute force over all of them."""
    step = torch.tensor(scale, dtype=torch.float64)
    zero = None if grid.symmetric else torch.tensor(float(zero_point), dtype=torch.float64)
    codes = torch.arange(grid.min_code, grid.max_code + 1).to(torch.int8)
    levels = grid.decode(codes, step, zero)
    chosen = grid.decode(grid.encode(values.double(), step, zero), step, zero)
    nearest = (values.double().reshape(-1, 1) - levels).abs().amin(1)
    assert torch.allclose((values.double().reshape(-1) - chosen.reshape(-1)).abs(), nearest, rtol=1e-12, atol=1e-300)


def doubling_commutes(grid: UniformGrid, values: Tensor, scale: float, zero_point: int) -> None:
    """Quantising 2 v on a grid of twice the step gives twice the values, bit for bit."""
    step = torch.tensor(scale)
    zero = None if grid.symmetric else torch.tensor(float(zero_point))
    once = grid.decode(grid.encode(values, step, zero), step, zero)
    twice = grid.decode(grid.encode(2 * values, 2 * step, zero), 2 * step, zero)
    assert torch.equal(2 * once, twice)


GRID_LAWS = (encoding_finds_the_nearest_level, doubling_commutes)
