import dataclasses

from bitmend.linalg.solver_cost import ONE_SWEEP, SolverCost
from bitmend.protocols import SOLVERS


def test_the_default_is_gptq_and_nothing_costs_nothing():
    assert ONE_SWEEP.sweeps == ONE_SWEEP.copies == ONE_SWEEP.factors == 1
    assert not any(dataclasses.astuple(SolverCost()))


def test_every_solver_of_ours_says_what_it_costs():
    for entry in SOLVERS:
        if entry.part.__module__.startswith("bitmend."):
            said = entry.part().cost()
            assert isinstance(said, SolverCost), entry.name
            assert bool(said.sweeps) == bool(entry.part.needs), entry.name
            assert said.copies >= said.stacked, entry.name


def test_more_steps_and_more_points_cost_more():
    marr, grid, descent = (SOLVERS[name] for name in ("marr", "strength_grid", "descent"))
    assert marr(max_steps=20).cost().copies > marr().cost().copies
    assert grid(points=21).cost().stacked == 21
    assert descent(sweeps=9).cost().products == 3 * descent(sweeps=3).cost().products
