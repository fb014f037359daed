from dataclasses import replace

import pytest
import torch

from bitmend.linalg.moments import Moments, merge
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.solvers.gptaq import Gptaq
from bitmend.solvers.gptq import Gptq
from bitmend.solvers.marr import Marr, _Loop, _Point, _secant, _slope

ANY_SOLUTION = QTensor(
    torch.zeros(1, 1, dtype=torch.int8), QParams(torch.ones(1, 1), None), QuantSpec(UniformGrid(2, True))
)
FORMS = ("gptaq", "shift", "rescomp", "rescomp_first")


def held_out_error(problem, solution):
    return problem.held_out.output_error(problem.weight, solution.dequantize())


def test_the_control_law_by_hand():
    loop = _Loop(Marr(kp=0.2, ki=0.6, kd=0.05), [])
    point = _Point(0.1, 1.0, 1.0, 0.0, ANY_SOLUTION)
    loop._control(point, [0.5])
    assert (point.p, point.i, point.d) == (0.0, pytest.approx(0.3), 0.0)
    assert point.update == pytest.approx(0.3)  # at the limit of one step
    loop._control(point, [0.5, 0.2])
    assert point.p == pytest.approx(0.2 * -0.3)
    assert point.update == pytest.approx(-0.06 + 0.12)
    loop._control(point, [0.5, 0.2, 0.1])
    assert point.d == pytest.approx(0.05 * (0.1 - 0.4 + 0.5))
    loop._control(point, [-3.0])
    assert point.update == -0.3


def test_the_slope_of_a_known_parabola_with_a_known_extra_cost():
    # J(a) = gain (a - 0.8)^2 + 0.05 a, while the projection only sees the parabola: e = 0.8 - a.
    gain = 0.5
    points = [_Point(a, 0.0, gain * (a - 0.8) ** 2 + 0.05 * a, 0.8 - a, ANY_SOLUTION) for a in (0.0, 0.25, 0.6)]
    assert _slope(points, gain) == pytest.approx(0.05)
    # The total feedback then vanishes at the true minimum, 0.8 - 0.05 / (2 gain) = 0.75.
    assert (0.8 - 0.75) - _slope(points, gain) / (2 * gain) == pytest.approx(0.0)
    assert _secant(points[:2], gain) == pytest.approx(0.8 - 0.125 - 0.05)  # the minimum seen from the middle of both


@pytest.mark.parametrize("form", ["gptaq", "shift"])
@pytest.mark.parametrize("start", ["closed_form", "global", "zero"])
def test_on_a_very_fine_grid_it_settles_near_the_closed_form(make_layer, form, start):
    problem = make_layer(out=32, bits=8, tokens=3000, noise=0.5).problem
    solution = Marr(form=form, start=start, signal="projection", max_steps=20).solve(problem)
    last = solution.diagnostics["steps"][-1]
    if form == "shift":  # linear in the strength: it must be the closed form itself
        assert last["strength"] == pytest.approx(min(solution.diagnostics["closed_form_strength"], 1.0), abs=0.03)
    assert solution.diagnostics["stop"] in {"error near zero", "at the bound", "error flat"}
    assert len(solution.diagnostics["steps"]) <= 15


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [2, 4])
def test_never_worse_on_held_out_rows_than_no_or_global_strength(make_layer, form, bits):
    for seed in range(3):
        problem = make_layer(bits=bits, seed=seed, tokens=60).problem
        solution = Marr(form=form).solve(problem).qtensor
        errors = {step["strength"]: step["error"] for step in Marr(form=form).solve(problem).diagnostics["steps"]}
        assert {0.0, 0.25} <= set(errors)
        energy = problem.held_out.output_energy(problem.weight)
        assert held_out_error(problem, solution) / energy == pytest.approx(min(errors.values()), rel=1e-4)
        if form == "gptaq":
            for solver in (Gptq(), Gptaq()):
                rival = held_out_error(problem, solver.solve(problem).qtensor)
                assert held_out_error(problem, solution) <= rival * (1 + 1e-6)


def test_wild_gains_cannot_hurt_because_of_the_guard(make_layer):
    problem = make_layer(bits=3, tokens=100).problem
    wild = Marr(kp=3.0, ki=5.0, kd=2.0).solve(problem)
    strengths = [step["strength"] for step in wild.diagnostics["steps"]]
    assert max(strengths) - min(strengths) > 0.25  # it does swing
    assert held_out_error(problem, wild.qtensor) <= held_out_error(problem, Gptq().solve(problem).qtensor) * (1 + 1e-6)


def test_in_sample_feedback_believes_more_than_held_out_feedback(make_layer):
    # Few tokens for the width: the correction fits noise, which only the held-out rows can tell.
    strengths = {}
    for feedback in ("held_out", "in_sample"):
        chosen = []
        for seed in range(4):
            problem = make_layer(out=24, width=32, bits=4, tokens=64, noise=0.3, seed=seed).problem
            chosen.append(Marr(form="shift", feedback=feedback).solve(problem).diagnostics["residual_strength"])
        strengths[feedback] = sum(chosen) / len(chosen)
    assert strengths["in_sample"] > strengths["held_out"] + 0.1


def test_the_refit_uses_all_rows_at_the_chosen_strength(make_layer):
    problem = make_layer(bits=3).problem
    everything = replace(problem, fit=merge(problem.fit, problem.held_out), held_out=None)
    judged = Marr(form="gptaq").solve(problem)
    solution = Marr(form="gptaq").solve_again(everything, judged)
    strength = judged.diagnostics["residual_strength"]
    assert 0 < strength < 1
    assert torch.equal(solution.qtensor.codes, Gptaq(residual_strength=strength).solve(everything).qtensor.codes)
    assert not torch.equal(solution.qtensor.codes, judged.qtensor.codes)
    assert solution.diagnostics["steps"] == judged.diagnostics["steps"]


def test_equal_streams_are_gptq(make_layer):
    problem = make_layer().problem
    none = torch.zeros_like(problem.fit.G)
    same = [Moments(moments.G, none, none, 10) for moments in (problem.fit, problem.held_out)]
    problem = replace(problem, fit=same[0], held_out=same[1])
    solution = Marr().solve(problem)
    assert solution.diagnostics["stop"] == "no residual"
    assert solution.diagnostics["residual_strength"] == 0
    assert torch.equal(solution.qtensor.codes, Gptq().solve(problem).qtensor.codes)


def test_two_folds_judge_by_the_rows_that_the_answer_was_not_fitted_to(make_layer):
    worst = 0.0
    for seed in range(12):
        problem = make_layer(bits=2, tokens=60, seed=seed).problem
        solution = Marr(folds=2).solve(problem)
        assert solution.diagnostics["passes"] % 2 == 0
        rivals = [solver.solve(problem).qtensor for solver in (Gptq(), Gptaq())]
        rival = min(held_out_error(problem, one) for one in rivals)
        worst = max(worst, held_out_error(problem, solution.qtensor) / rival)
    assert worst <= 1 + 1e-6


def test_equal_parts_either_way_round_give_the_same_start(make_layer):
    problem = make_layer(bits=3, tokens=80).problem
    swapped = replace(problem, fit=problem.held_out, held_out=problem.fit)
    starts = [Marr(folds=2).solve(p).diagnostics["steps"][2]["strength"] for p in (problem, swapped)]
    assert starts[0] == pytest.approx(starts[1], abs=1e-9)


def test_a_fold_without_a_residual_has_no_vote(make_layer):
    problem = make_layer(bits=3).problem
    quiet = replace(problem.held_out, C=1e-9 * problem.held_out.C, D=1e-18 * problem.held_out.D, _known={})
    for selection in ("best", "last"):
        solution = Marr(folds=2, selection=selection).solve(replace(problem, held_out=quiet))
        assert 0 <= solution.diagnostics["residual_strength"] <= 1
        assert all(step["strength"] == step["strength"] for step in solution.diagnostics["steps"])


def test_without_held_out_rows_it_says_so(make_layer):
    problem = replace(make_layer().problem, held_out=None)
    (event,) = Marr().solve(problem).events
    assert event.degrades
    assert event.message.startswith("no rows are held out")
    assert Marr().solve(problem).diagnostics["judged_on"] == "fit"
    assert not Marr(feedback="in_sample").solve(problem).events
    assert not Marr().solve(make_layer().problem).events


def test_a_secant_without_a_second_point_starts_from_the_projection(make_layer):
    problem = make_layer(bits=8, tokens=2000).problem
    solution = Marr(form="shift", signal="secant", start="zero", global_strength=0.0).solve(problem)
    assert solution.diagnostics["residual_strength"] > 0.3


def test_every_step_is_logged(make_layer):
    problem = make_layer(bits=2, tokens=100).problem
    diagnostics = Marr().solve(problem).diagnostics
    assert set(diagnostics["steps"][0]) == {
        "strength", "error", "mean_error", "projection", "slope", "feedback", "p", "i", "d", "update",
    }  # fmt: skip
    assert diagnostics["passes"] >= 1
    assert diagnostics["loop_seconds"] > 0


def test_the_last_point_can_be_asked_for(make_layer):
    problem = make_layer(bits=3).problem
    solution = Marr(selection="last", max_steps=3).solve(problem)
    assert solution.diagnostics["residual_strength"] == solution.diagnostics["steps"][-1]["strength"]


def test_without_moments_it_cannot_work(make_layer):
    with pytest.raises(ValueError, match="marr needs the moments"):
        Marr().solve(replace(make_layer().problem, fit=None))


def test_the_refit_keeps_the_scales_of_the_chosen_point(make_layer):
    problem = make_layer(bits=3, observer="mse").problem
    judged = Marr().solve(problem)
    solution = Marr().solve_again(replace(problem, fit=merge(problem.fit, problem.held_out)), judged)
    assert torch.equal(solution.qtensor.qparams.scale, judged.qtensor.qparams.scale)
    assert not torch.equal(solution.qtensor.codes, judged.qtensor.codes)
