from dataclasses import replace

import numpy as np
import pytest
import torch

from bitmend.linalg.moments import Moments
from bitmend.numerics.granularity import PerChannel, group_of_column
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.protocols import Problem
from bitmend.sites import LinearSite
from bitmend.solvers.gptq import Gptq
from bitmend.solvers.rtn import Rtn
from bitmend.testing.reference.brute_force import best_codes
from bitmend.testing.reference.obq import obq_fixed_order


def reference_codes(problem, damping, order):
    """The codes of the slow solver, which never forms a Cholesky factor."""
    G = problem.fit.G.numpy()
    H = G + damping * np.mean(np.diag(G)) * np.eye(len(G))
    columns = np.arange(len(G)) if order == "natural" else np.argsort(-np.diag(G), kind="stable")
    qparams, grid = choose_qparams(problem.weight, problem.spec), problem.spec.grid
    return obq_fixed_order(
        problem.weight.numpy(),
        H,
        qparams.scale.numpy(),
        None if qparams.zero_point is None else qparams.zero_point.numpy(),
        group_of_column(problem.spec.granularity, len(G)).numpy(),
        grid.min_code,
        grid.max_code,
        columns,
    )


def test_the_example_of_the_docstring():
    spec = QuantSpec(UniformGrid(2, symmetric=False), PerChannel(), "minmax")
    # The third column, without any input, stretches the grid to the levels -1, 0, 1, 2.
    G = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    weight = torch.tensor([[0.5, 0.5, -1.0], [0.0, 0.0, 2.0]])
    weight = torch.cat([weight[:1], torch.tensor([[2.0]])], 1)
    G = torch.block_diag(G, torch.eye(1, dtype=torch.float64))
    problem = Problem(LinearSite("p", "p", "linear", (1, 4)), weight, spec, Moments(G, None, None, 10))
    solution = Gptq(damping=0.0, order="natural").solve(problem)
    assert solution.qtensor.dequantize().tolist() == [[0.0, 1.0, -1.0, 2.0]]
    assert problem.fit.output_error(weight, solution.qtensor.dequantize()) == pytest.approx(0.05)
    nearest = Rtn().solve(problem).qtensor.dequantize()
    assert nearest.tolist() == [[0.0, 0.0, -1.0, 2.0]]
    assert problem.fit.output_error(weight, nearest) == pytest.approx(0.95)


@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size"), [(4, True, -1), (3, False, 8), (2, True, 4), (1, False, 16)]
)
def test_codes_equal_the_independent_slow_solver(make_layer, order, bits, symmetric, group_size):
    problem = make_layer(bits=bits, symmetric=symmetric, group_size=group_size, observer="mse").problem
    problem = replace(problem, weight=problem.weight.double())  # ties apart, both then compute in float64
    ours = Gptq(damping=0.02, order=order).solve(problem).qtensor.codes.numpy()
    np.testing.assert_array_equal(ours, reference_codes(problem, 0.02, order))


def test_float32_differs_from_float64_in_few_codes(make_layer):
    problem = make_layer(out=64, width=64, bits=4, tokens=500).problem
    single = Gptq().solve(problem).qtensor.codes
    double = Gptq().solve(replace(problem, weight=problem.weight.double())).qtensor.codes
    assert float((single != double).float().mean()) < 0.005


def test_between_brute_force_and_round_to_nearest(make_layer):
    totals = {"best": 0.0, "gptq": 0.0, "rtn": 0.0}
    for seed in range(12):
        problem = make_layer(out=3, width=5, bits=2, seed=seed).problem
        problem = replace(problem, fit=replace(problem.fit, C=None, D=None, _known={}))
        solution = Gptq(damping=1e-6).solve(problem).qtensor
        grid, scale = problem.spec.grid, solution.qparams.scale
        codes = torch.arange(grid.min_code, grid.max_code + 1).to(torch.int8)
        best = 0.0
        for row in range(3):
            levels = [grid.decode(codes, scale[row, 0], None).numpy()] * 5
            best += best_codes(problem.weight[row].numpy(), problem.fit.G.numpy(), levels)[1]
        ours = problem.fit.output_error(problem.weight, solution.dequantize())
        assert best <= ours * (1 + 1e-6)
        totals["best"] += best
        totals["gptq"] += ours
        totals["rtn"] += problem.fit.output_error(problem.weight, Rtn().solve(problem).qtensor.dequantize())
    # The numbers of docs/results/2026-11-20_cpu-2_gptq-correct.md.
    assert totals == pytest.approx({"best": 11.617, "gptq": 19.300, "rtn": 20.231}, abs=2e-3)


def test_much_better_than_round_to_nearest_on_average(make_layer):
    ratios = []
    for seed in range(8):
        problem = make_layer(out=32, width=48, bits=3, seed=seed, tokens=600).problem
        one_stream = replace(problem.fit, C=None, D=None, _known={})
        errors = [
            one_stream.output_error(problem.weight, solver.solve(problem).qtensor.dequantize())
            for solver in (Gptq(), Rtn())
        ]
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 0.6


def test_uncorrelated_inputs_give_round_to_nearest(make_layer):
    problem = make_layer().problem
    diagonal = torch.diag(torch.linspace(0.5, 3, 16, dtype=torch.float64))
    problem = replace(problem, fit=Moments(diagonal, None, None, 10))
    assert torch.equal(Gptq().solve(problem).qtensor.codes, Rtn().solve(problem).qtensor.codes)


def test_dead_inputs_keep_their_weights(make_layer):
    problem = make_layer().problem
    G = problem.fit.G.clone()
    G[3], G[:, 3] = 0, 0
    problem = replace(problem, fit=Moments(G, None, None, 10))
    solution = Gptq().solve(problem)
    assert solution.diagnostics["dead_columns"] == 1
    assert torch.equal(solution.qtensor.codes[:, 3], Rtn().solve(problem).qtensor.codes[:, 3])


def test_without_moments_it_cannot_work(make_layer):
    with pytest.raises(ValueError, match="gptq needs the moments"):
        Gptq().solve(replace(make_layer().problem, fit=None))


@pytest.mark.parametrize("order", ["natural", "diagonal"])
@pytest.mark.parametrize(("bits", "damping"), [(4, 0.01), (2, 0.01), (3, 1.0)])
def test_the_error_that_it_knows_is_the_one_that_moments_give(make_layer, order, bits, damping):
    problem = make_layer(out=24, width=32, bits=bits).problem
    assert Gptq(damping=damping, order=order).solve(problem).fit_error is None  # not its own error, with two streams
    problem = replace(problem, fit=Moments(problem.fit.G, None, None, problem.fit.num_tokens))
    solution = Gptq(damping=damping, order=order).solve(problem)
    exact = problem.fit.output_error(problem.weight, solution.qtensor.dequantize())
    assert solution.fit_error == pytest.approx(exact, rel=1e-4)


def test_an_error_that_the_damping_drowns_is_not_told():
    spec = QuantSpec(UniformGrid(2, symmetric=False), PerChannel(), "minmax")
    G = torch.diag(torch.tensor([1e-12, 1e-12, 1.0], dtype=torch.float64))
    # The one column whose input has energy is rounded without error.
    problem = Problem(
        LinearSite("p", "p", "linear", (1, 3)), torch.tensor([[0.3, 0.2, 1.0]]), spec, Moments(G, None, None, 9)
    )
    solution = Gptq(damping=1.0).solve(problem)
    assert problem.fit.output_error(problem.weight, solution.qtensor.dequantize()) < 1e-6
    assert solution.fit_error is None
