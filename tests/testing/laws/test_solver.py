"""Every registered solver obeys every law, unasked."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from bitmend.linalg.moments import MomentSums
from bitmend.numerics.granularity import PerChannel
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import QuantSpec, quantize
from bitmend.numerics.uniform import UniformGrid
from bitmend.protocols import SOLVERS, Need, Problem, Solution
from bitmend.sites import LinearSite
from bitmend.testing.laws.solver import (
    SOLVER_LAWS,
    input_is_not_changed,
    permuting_rows_permutes_the_answer,
    result_lies_on_the_grid,
)
from bitmend.testing.laws.strategies import problems


@pytest.mark.parametrize("law", SOLVER_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", [entry.name for entry in SOLVERS])
def test_solver(name, law):
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(problem=problems())
    def holds(problem):
        law(SOLVERS[name](), problem)

    holds()


@dataclass(frozen=True)
class Floor:
    """A wrong solver: rounds down, and spoils its input."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def solve(self, problem):
        qparams = choose_qparams(problem.weight, problem.spec)
        problem.weight.sub_(0.49 * qparams.scale[:, :1])
        return Solution(quantize(problem.weight, qparams, problem.spec))


@dataclass(frozen=True)
class OutOfRange:
    """A wrong solver: uses codes that the grid does not have."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def solve(self, problem):
        solution = SOLVERS["rtn"]().solve(problem)
        codes = torch.full_like(solution.qtensor.codes, 127)
        return replace(solution, qtensor=replace(solution.qtensor, codes=codes))


@dataclass(frozen=True)
class FirstRowCoarse:
    """A wrong solver: what it gives for a row depends on where the row stands."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT})

    def solve(self, problem):
        solution = SOLVERS["gptq"]().solve(problem)
        codes = solution.qtensor.codes.clone()
        codes[0] = 0
        return replace(solution, qtensor=replace(solution.qtensor, codes=codes))


@dataclass(frozen=True)
class FirstRowEquallyGood(FirstRowCoarse):
    """The same without any error that moments could show, but it measures nothing that it could have chosen by."""

    needs: ClassVar[frozenset[Need]] = frozenset()


@pytest.mark.parametrize(("solver", "silent"), [(FirstRowCoarse(), False), (FirstRowEquallyGood(), True)])
def test_a_solver_that_looks_at_the_order_of_rows_is_caught(solver, silent):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(3, 8, generator=generator), torch.randn(40, 8, generator=generator)
    sums = MomentSums(8, cross=False, residual=False, device=torch.device("cpu"))
    sums.add_(torch.zeros_like(inputs) if silent else inputs, None)
    spec = QuantSpec(UniformGrid(3, symmetric=True), PerChannel(), "minmax")
    problem = Problem(LinearSite("p", "p", "linear", (3, 8)), weight, spec, sums.means())
    with pytest.raises(AssertionError):
        permuting_rows_permutes_the_answer(solver, problem)


@pytest.mark.parametrize(("solver", "law"), [(Floor(), input_is_not_changed), (OutOfRange(), result_lies_on_the_grid)])
def test_wrong_solvers_are_caught(solver, law):
    weight = torch.tensor([[0.5, -1.0, 0.25]])
    spec = QuantSpec(UniformGrid(3, symmetric=True), PerChannel(), "minmax")
    problem = Problem(LinearSite("p", "p", "linear", (1, 3)), weight, spec)
    with pytest.raises(AssertionError):
        law(solver, problem)
