import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.errors import RecipeError
from bitmend.numerics.uniform import UniformGrid
from bitmend.testing.laws.grid import GRID_LAWS, decoded_codes_encode_to_themselves
from bitmend.testing.laws.strategies import matrices

grids = st.builds(UniformGrid, st.integers(1, 8), st.booleans())
scales = st.floats(2.0**-10, 2.0**10, width=32)


def test_two_bits_by_hand():
    symmetric = UniformGrid(2, symmetric=True)
    values = torch.tensor([-9.0, -0.8, -0.25, 0.25, 0.6, 9.0])
    assert symmetric.encode(values, torch.tensor(0.5), None).tolist() == [-2, -2, 0, 0, 1, 1]
    asymmetric = UniformGrid(2, symmetric=False)
    zero = torch.tensor(-1.0)  # levels -1, 0, 1, 2 times the scale
    assert asymmetric.encode(values, torch.tensor(0.5), zero).tolist() == [-2, -2, -1, -1, 0, 1]
    assert asymmetric.decode(torch.tensor([-2, 1], dtype=torch.int8), torch.tensor(0.5), zero).tolist() == [-0.5, 1.0]


def test_one_symmetric_bit_is_a_sign():
    grid = UniformGrid(1, symmetric=True)
    codes = grid.encode(torch.tensor([-3.0, -0.0, 0.0, 0.1]), torch.tensor(2.0), None)
    assert codes.tolist() == [-1, 0, 0, 0]
    assert grid.decode(codes, torch.tensor(2.0), None).tolist() == [-2.0, 2.0, 2.0, 2.0]


def test_ties_go_to_the_even_step():
    grid = UniformGrid(4, symmetric=True)
    assert grid.encode(torch.tensor([0.5, 1.5, -0.5, -1.5]), torch.tensor(1.0), None).tolist() == [0, 2, 0, -2]


@given(grid=grids, scale=scales, zero=st.integers(-128, 127))
def test_every_code_survives_a_round_trip(grid, scale, zero):
    decoded_codes_encode_to_themselves(grid, scale, max(grid.min_code, min(grid.max_code, zero)))


@pytest.mark.parametrize("law", GRID_LAWS, ids=lambda law: law.__name__)
@given(grid=grids, values=matrices(), scale=scales, zero=st.integers(-128, 127))
def test_laws(law, grid, values, scale, zero):
    law(grid, values, scale, max(grid.min_code, min(grid.max_code, zero)))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits):
    with pytest.raises(RecipeError, match=f"bits must be a whole number from 1 to 8; got {bits}"):
        UniformGrid(bits, symmetric=True)
