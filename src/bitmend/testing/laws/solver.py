"""Laws of site solvers."""

from dataclasses import replace

import torch
from torch import Tensor

from bitmend.linalg.moments import Moments
from bitmend.numerics.granularity import PerChannel, num_groups
from bitmend.numerics.qtensor import QTensor, QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.protocols import ChoosingSolver, Need, Problem, SiteSolver

# Relative difference of errors below which float32 cannot tell two candidates apart.
EQUALLY_GOOD = 1e-5


def result_lies_on_the_grid(solver: SiteSolver, problem: Problem) -> None:
    """Codes are in range, one for each entry; scales are finite, not negative, and exact in the type they are stored in."""
    solution = solver.solve(problem).qtensor
    grid, qparams = solution.spec.grid, solution.qparams
    assert solution.codes.shape == problem.weight.shape
    assert int(solution.codes.min()) >= grid.min_code
    assert int(solution.codes.max()) <= grid.max_code
    assert qparams.scale.shape[1] == num_groups(solution.spec.granularity, problem.weight.shape[1])
    assert bool(torch.isfinite(qparams.scale).all())
    assert bool((qparams.scale >= 0).all())
    assert torch.equal(qparams.scale.to(solution.spec.scale_dtype).float(), qparams.scale)
    if qparams.zero_point is not None:
        assert torch.equal(qparams.zero_point, qparams.zero_point.round())
        assert bool(((qparams.zero_point >= grid.min_code) & (qparams.zero_point <= grid.max_code)).all())
    assert bool(torch.isfinite(solution.dequantize()).all())


def input_is_not_changed(solver: SiteSolver, problem: Problem) -> None:
    """Neither the weight nor the moments are written to."""
    tensors = [problem.weight]
    for moments in (problem.fit, problem.held_out):
        if moments is not None:
            tensors += [tensor for tensor in (moments.G, moments.C, moments.D) if tensor is not None]
    before = [tensor.clone() for tensor in tensors]
    solver.solve(problem)
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old, new)


def same_input_same_answer(solver: SiteSolver, problem: Problem) -> None:
    """Two runs agree bit for bit."""
    assert_same(solver.solve(problem).qtensor, solver.solve(problem).qtensor)


def choice_is_kept(solver: SiteSolver, problem: Problem) -> None:
    """A solver that chooses on held-out rows, fitted again on the same rows, gives what it gave; others choose nothing."""
    if Need.HELD_OUT not in solver.needs:
        return
    assert isinstance(solver, ChoosingSolver)
    judged = solver.solve(problem)
    again = solver.solve_again(replace(problem, held_out=None), judged)
    assert_same(again.qtensor, judged.qtensor)
    assert again.diagnostics == judged.diagnostics


def permuting_rows_permutes_the_answer(solver: SiteSolver, problem: Problem) -> None:
    """Output rows are independent of each other's order.

    A matrix product may add up the terms of a row in another order when the row stands elsewhere. A solver that chooses
    between candidates may then choose another of two that are equally good, to the precision of float32. One that measures
    nothing has no such excuse.
    """
    order = torch.arange(len(problem.weight)).flip(0)
    straight = solver.solve(problem).qtensor
    permuted = solver.solve(replace(problem, weight=problem.weight[order])).qtensor
    same = (straight.codes[order] == permuted.codes).all(1)
    same &= (straight.qparams.scale[order] == permuted.qparams.scale).all(1)
    if bool(same.all()):
        return
    assert solver.needs
    assert problem.fit is not None
    errors = [
        _row_errors(problem.weight[order], values, problem.fit)
        for values in (straight.dequantize()[order], permuted.dequantize())
    ]
    torch.testing.assert_close(errors[0], errors[1], rtol=EQUALLY_GOOD, atol=0)


def _row_errors(weight: Tensor, quantised: Tensor, moments: Moments) -> Tensor:
    W, E = weight.double(), quantised.double() - weight.double()
    errors = ((E @ moments.G) * E).sum(1)
    if moments.C is None or moments.D is None:
        return errors
    return errors - 2 * (E * (W @ moments.C)).sum(1) + ((W @ moments.D) * W).sum(1)


def scaling_by_a_power_of_two_scales_the_answer(solver: SiteSolver, problem: Problem) -> None:
    """Codes stay, scales double, bit for bit (away from the limits of the scale's type)."""
    problem = replace(problem, spec=replace(problem.spec, scale_dtype=torch.float32))
    once = solver.solve(problem).qtensor
    twice = solver.solve(replace(problem, weight=2 * problem.weight)).qtensor
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(2 * once.dequantize(), twice.dequantize())


def scaling_the_moments_changes_nothing(solver: SiteSolver, problem: Problem) -> None:
    """Damping is relative, so the unit of the inputs does not matter (a power of two keeps floating point exact)."""
    if problem.fit is None or problem.held_out is None:
        return
    larger = [
        replace(m, G=4 * m.G, C=None if m.C is None else 4 * m.C, D=None if m.D is None else 4 * m.D, _known={})
        for m in (problem.fit, problem.held_out)
    ]
    assert_same(
        solver.solve(problem).qtensor, solver.solve(replace(problem, fit=larger[0], held_out=larger[1])).qtensor
    )


def weight_on_its_own_grid_is_kept(solver: SiteSolver, problem: Problem) -> None:
    """A matrix whose rows use both ends of an asymmetric grid comes back unchanged."""
    grid = UniformGrid(max(2, problem.spec.grid.bits), symmetric=False)
    rows, columns = problem.weight.shape
    if columns < 2:
        return
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    levels = torch.randint(grid.min_code, grid.max_code + 1, (rows, columns), generator=generator).float()
    levels[:, 0], levels[:, -1] = grid.min_code, grid.max_code
    spec = QuantSpec(grid, PerChannel(), problem.spec.observer, torch.float32)
    if spec.observer == "percentile":
        return  # quantiles lie inside the range on purpose
    weight = levels * 0.25
    no_residual = [
        None if m is None else replace(m, C=_zeros(m.C), D=_zeros(m.D), _known={})
        for m in (problem.fit, problem.held_out)
    ]
    moved = replace(problem, weight=weight, spec=spec, fit=no_residual[0], held_out=no_residual[1])
    assert torch.equal(solver.solve(moved).qtensor.dequantize(), weight)


SOLVER_LAWS = (
    result_lies_on_the_grid,
    input_is_not_changed,
    same_input_same_answer,
    choice_is_kept,
    permuting_rows_permutes_the_answer,
    scaling_by_a_power_of_two_scales_the_answer,
    scaling_the_moments_changes_nothing,
    weight_on_its_own_grid_is_kept,
)


def assert_same(one: QTensor, other: QTensor) -> None:
    """Both hold the same codes, scales and zero points."""
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.qparams.scale, other.qparams.scale)
    assert (one.qparams.zero_point is None) == (other.qparams.zero_point is None)
    if one.qparams.zero_point is not None and other.qparams.zero_point is not None:
        assert torch.equal(one.qparams.zero_point, other.qparams.zero_point)


def _zeros(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor)
