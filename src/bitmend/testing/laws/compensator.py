"""Laws of compensators."""

import torch
from torch import Tensor

from bitmend.compensation import Compensation
from bitmend.linalg.least_squares import RegressionSums
from bitmend.protocols import CompensationProblem, Compensator

ROUNDING = 1e-2  # of an error: tensors are stored in 16 bits


def tensors_are_those_of_the_shape(compensator: Compensator, problem: CompensationProblem) -> None:
    """What is returned has the tensors that its shape names, all finite; without a shape there are none."""
    found = compensator.fit(problem)
    if found.shape is None:
        assert not found.tensors
        return
    assert {name: tuple(tensor.shape) for name, tensor in found.tensors.items()} == found.shape.shapes
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors.values())
    assert found.shape.num_bytes() <= compensator.largest(problem.shape).num_bytes()


def sums_are_not_changed(compensator: Compensator, problem: CompensationProblem) -> None:
    """The sums of the problem are not written to, and fitting again gives the same bit for bit."""
    parts = [*problem.folds, *([] if problem.held_out is None else [problem.held_out])]
    before = [_tensors(part) for part in parts]
    first, second = compensator.fit(problem), compensator.fit(problem)
    for kept, part in zip(before, parts, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(kept, _tensors(part), strict=True))
    assert first.shape == second.shape
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


def nothing_is_added_where_nothing_lacks(compensator: Compensator, problem: CompensationProblem, x: Tensor) -> None:
    """Of a block that lacks nothing, what it gives stays as it is: there is no map, or it adds zero.

    Args:
        compensator: with its gate.
        problem: whose sums are all of rows without errors.
        x: some rows, which are also what the block gives.
    """
    found = compensator.fit(problem)
    if found.shape is not None:
        assert torch.equal(Compensation(found.shape, found.tensors)(x, x), x)


def kept_maps_help(compensator: Compensator, problem: CompensationProblem, rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """A map that is kept takes error away on the held-out rows that it was proved on.

    Args:
        compensator: with a gate on held-out rows.
        problem: with held-out sums.
        rows: x, y and e of the held-out rows.
    """
    found = compensator.fit(problem)
    if found.shape is None:
        return
    x, y, e = rows
    added = Compensation(found.shape, found.tensors)(x, y) - y
    assert float((e - added).square().sum()) <= (1 + ROUNDING) * float(e.square().sum())


def _tensors(sums: RegressionSums) -> list[Tensor]:
    return [value.clone() for value in vars(sums).values() if isinstance(value, Tensor)]
