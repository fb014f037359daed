"""Every registered solver obeys every law, unasked."""

import pytest
from hypothesis import HealthCheck, given, settings

from bitmend.protocols import SOLVERS
from bitmend.testing.laws.solver import SOLVER_LAWS
from bitmend.testing.laws.strategies import problems


@pytest.mark.parametrize("law", SOLVER_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", [entry.name for entry in SOLVERS])
def test_solver(name, law):
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(problem=problems())
    def holds(problem):
        law(SOLVERS[name](), problem)

    holds()
