import torch

from bitmend.numerics.granularity import PerChannel
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.protocols import Problem
from bitmend.sites import LinearSite
from bitmend.solvers.rtn import Rtn


def test_the_example_of_the_docstring():
    spec = QuantSpec(UniformGrid(2, symmetric=True), PerChannel(), "minmax")
    problem = Problem(LinearSite("proj", "proj", "linear", (1, 3)), torch.tensor([[0.9, -0.4, 0.1]]), spec)
    solution = Rtn().solve(problem)
    assert solution.qtensor.codes.tolist() == [[1, -1, 0]]
    torch.testing.assert_close(solution.qtensor.dequantize(), torch.tensor([[0.6, -0.6, 0.0]]))
    assert not Rtn.needs
