"""Random quantised matrices."""

import pytest
import torch

from bitmend.numerics.granularity import PerChannel, PerGroup, PerTensor, num_groups
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec
from bitmend.numerics.uniform import UniformGrid


@pytest.fixture
def random_qtensor():
    """Return a function that makes a quantised matrix with random codes, scales and zero points."""

    def make(out, columns, bits=4, symmetric=True, group_size=-1, scale_dtype=torch.float32) -> QTensor:
        generator = torch.Generator().manual_seed(out * 1000 + columns * 10 + bits)
        grid = UniformGrid(bits, symmetric)
        granularity = PerTensor() if group_size == 0 else PerChannel()
        if group_size > 0:
            granularity = PerGroup(group_size, ragged=True)
        rows = 1 if group_size == 0 else out
        size = (rows, num_groups(granularity, columns))
        scale = (torch.rand(size, generator=generator) * 0.1 + 0.01).to(scale_dtype).float()
        zero_point = None
        if not symmetric:
            zero_point = torch.randint(grid.min_code, grid.max_code + 1, size, generator=generator).float()
        codes = torch.randint(grid.min_code, grid.max_code + 1, (out, columns), generator=generator).to(torch.int8)
        return QTensor(codes, QParams(scale, zero_point), QuantSpec(grid, granularity, "minmax", scale_dtype))

    return make
