from dataclasses import replace

import pytest
import torch

from bitmend.errors import RecipeError
from bitmend.linalg.moments import merge
from bitmend.solvers.gptaq import Gptaq
from bitmend.solvers.strength_grid import StrengthGrid


@pytest.mark.parametrize("form", ["gptaq", "shift"])
def test_the_best_point_on_held_out_rows_is_kept(make_layer, form):
    problem = make_layer(bits=3).problem
    solution = StrengthGrid(form=form, points=5, max_strength=1.0).solve(problem)
    steps = solution.diagnostics["steps"]
    assert [step["strength"] for step in steps] == [0.0, 0.25, 0.5, 0.75, 1.0]
    best = min(steps, key=lambda step: step["error"])
    assert solution.diagnostics["residual_strength"] == best["strength"]
    energy = problem.held_out.output_energy(problem.weight)
    ours = problem.held_out.output_error(problem.weight, solution.qtensor.dequantize()) / energy
    assert ours == pytest.approx(best["error"], rel=1e-5)
    if form == "gptaq":
        alone = Gptaq(residual_strength=best["strength"]).solve(problem).qtensor
        assert torch.equal(alone.codes, solution.qtensor.codes)


def test_the_refit_uses_all_rows(make_layer):
    problem = make_layer(bits=3).problem
    everything = replace(problem, fit=merge(problem.fit, problem.held_out), held_out=None)
    judged = StrengthGrid(form="gptaq").solve(problem)
    solution = StrengthGrid(form="gptaq").solve_again(everything, judged)
    strength = judged.diagnostics["residual_strength"]
    assert strength > 0
    assert torch.equal(solution.qtensor.codes, Gptaq(residual_strength=strength).solve(everything).qtensor.codes)
    assert not torch.equal(solution.qtensor.codes, judged.qtensor.codes)
    assert solution.events == judged.events == ()


def test_without_moments_it_cannot_work(make_layer):
    with pytest.raises(ValueError, match="strength_grid needs the moments"):
        StrengthGrid().solve(replace(make_layer().problem, fit=None))


def test_without_held_out_rows_it_says_so(make_layer):
    (event,) = StrengthGrid().solve(replace(make_layer().problem, held_out=None)).events
    assert event.degrades
    assert event.message.startswith("no rows are held out")


@pytest.mark.parametrize("keys", [{"points": 0}, {"max_strength": -1.0}])
def test_a_grid_that_cannot_be(keys):
    with pytest.raises(RecipeError, match="strength_grid needs at least one point and a max_strength of 0 or more"):
        StrengthGrid(**keys)
