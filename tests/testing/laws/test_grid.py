import pytest
import torch

from bitmend.numerics.uniform import UniformGrid
from bitmend.testing.laws.grid import encoding_finds_the_nearest_level


class Floor(UniformGrid):
    """A wrong grid: rounds down."""

    def encode(self, values, scale, zero_point):
        return super().encode(values - scale / 2, scale, zero_point)


def test_a_wrong_grid_is_caught():
    values = torch.linspace(-2, 2, 17)
    encoding_finds_the_nearest_level(UniformGrid(3, symmetric=True), values, 0.5, 0)
    with pytest.raises(AssertionError):
        encoding_finds_the_nearest_level(Floor(3, symmetric=True), values, 0.5, 0)
