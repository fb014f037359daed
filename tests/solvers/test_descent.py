import itertools
from dataclasses import replace

import pytest
import torch

from bitmend.errors import RecipeError
from bitmend.numerics.granularity import PerGroup, PerTensor
from bitmend.solvers import descent
from bitmend.solvers.descent import Descent
from bitmend.solvers.gptq import Gptq
from bitmend.solvers.qep import Qep

PLAIN = {"scale_factors": (1.0,), "sweeps": 0, "rounds": 0}


def no_residual(problem):
    fit = problem.fit
    return replace(problem, fit=replace(fit, C=torch.zeros_like(fit.C), D=torch.zeros_like(fit.D), _known={}))


def damped_error(problem, qtensor, strength):
    """f of the finished matrix from its definition: tokens of the moved target, and the ridge."""
    G, C = problem.fit.G, problem.fit.C
    H = G + 0.01 * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype)
    target = problem.weight.double() + strength * torch.linalg.solve(H, (problem.weight.double() @ C).T).T
    E = qtensor.dequantize(torch.float64) - target
    return float(torch.trace(E @ H @ E.T))


@pytest.mark.parametrize("group_size", [-1, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_without_its_own_steps_it_is_qep(make_layer, group_size, symmetric):
    problem = make_layer(bits=3, group_size=group_size, symmetric=symmetric).problem
    for strength in (0.0, 0.5, 1.0):
        ours = Descent(residual_strength=strength, **PLAIN).solve(problem).qtensor
        theirs = Qep(residual_strength=strength).solve(problem).qtensor
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.qparams.scale, theirs.qparams.scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 4])
def test_each_stage_lowers_the_error_that_the_diagnostics_tell(make_layer, bits, group_size):
    problem = make_layer(bits=bits, group_size=group_size, observer="mse").problem
    solution = Descent().solve(problem)
    stages = solution.diagnostics["objective"]
    assert len(stages) == 5
    assert stages[0] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(stages))
    assert stages[1] < 1  # some row prefers another factor
    assert stages[2] < stages[1]
    assert stages[-1] < 0.98
    plain = Descent(**PLAIN).solve(problem).qtensor
    told = damped_error(problem, solution.qtensor, 1.0) / damped_error(problem, plain, 1.0)
    assert told == pytest.approx(stages[-1], rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3])
def test_better_than_gptq_and_qep_on_tokens_that_it_never_saw(make_layer, bits):
    ratios = {"gptq": [], "qep": []}
    for seed in range(6):
        problem = make_layer(bits=bits, seed=seed, observer="mse").problem
        ours, gptq, qep = (
            problem.held_out.output_error(problem.weight, solver.solve(problem).qtensor.dequantize())
            for solver in (Descent(), Gptq(), Qep(residual_strength=1.0))
        )
        ratios["gptq"].append(ours / gptq)
        ratios["qep"].append(ours / qep)
    assert max(ratios["gptq"]) < 1
    assert sum(ratios["qep"]) / 6 < 0.97


def test_equal_streams_leave_no_shift(make_layer):
    problem = no_residual(make_layer().problem)
    with_strength, without = (Descent(residual_strength=a).solve(problem).qtensor for a in (1.0, 0.0))
    assert torch.equal(with_strength.codes, without.codes)
    assert torch.equal(with_strength.qparams.scale, without.qparams.scale)


def test_what_it_refuses(make_layer):
    problem = make_layer().problem
    with pytest.raises(RecipeError, match="so they must be per channel or per group"):
        Descent().solve(replace(problem, spec=replace(problem.spec, granularity=PerTensor())))
    with pytest.raises(
        RecipeError, match=r"at least one scale factor, but solver\.scale_factors is empty; set \[1\.0\]"
    ):
        Descent(scale_factors=())
    with pytest.raises(ValueError, match="descent needs the moments G and C of its input"):
        Descent().solve(replace(problem, fit=None))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_scales_are_those_that_are_stored(make_layer, scale_dtype):
    problem = make_layer(group_size=4).problem
    problem = replace(problem, spec=replace(problem.spec, scale_dtype=scale_dtype))
    for keys in ({}, {"rounds": 0, "sweeps": 0}):
        scale = Descent(**keys).solve(problem).qtensor.qparams.scale
        assert torch.equal(scale.to(scale_dtype).float(), scale)


def test_the_last_sweep_uses_the_last_scales(make_layer):
    stages = [Descent(rounds=1).solve(make_layer(bits=2, seed=s).problem).diagnostics["objective"] for s in range(5)]
    assert any(one[-1] < one[-2] for one in stages)


def test_rows_are_solved_some_at_a_time(make_layer, monkeypatch):
    problem = make_layer(out=12, width=16).problem
    whole = Descent().solve(problem).qtensor
    sizes = []
    original = descent.column_sweep

    def seen(stacked, *arguments):
        sizes.append(len(stacked))
        return original(stacked, *arguments)

    monkeypatch.setattr(descent, "column_sweep", seen)
    monkeypatch.setattr(descent, "STACKED_ENTRIES", 7 * 16 * 5)
    pieces = Descent().solve(problem).qtensor
    assert sizes == [35, 35, 14]
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.qparams.scale, whole.qparams.scale)


def test_zero_rows_dead_inputs_and_a_shorter_last_group(make_layer):
    layer = make_layer(out=6, width=18, observer="mse")
    spec = replace(layer.problem.spec, granularity=PerGroup(4, ragged=True))
    weight = layer.problem.weight.clone()
    weight[2] = 0
    G, C, D = (m.clone() for m in (layer.problem.fit.G, layer.problem.fit.C, layer.problem.fit.D))
    for m in (G, C, D):
        m[5], m[:, 5] = 0, 0
    problem = replace(layer.problem, weight=weight, spec=spec, fit=replace(layer.problem.fit, G=G, C=C, D=D, _known={}))
    qtensor = Descent().solve(problem).qtensor
    assert qtensor.qparams.scale.shape == (6, 5)
    assert qtensor.dequantize().isfinite().all()
    assert not qtensor.dequantize()[2].any()
