from dataclasses import replace

import pytest
import torch

from bitmend.compensation import Compensation, CompensationShape
from bitmend.compensators.qwt import QwT
from bitmend.linalg.least_squares import RegressionSums
from bitmend.protocols import CompensationProblem

D = 16


def drawn(n, seed, noise=0.1, d=D, quiet=()):
    """Rows with e = x W + 0.2 y + b + noise, W of rank 2."""
    draw = torch.Generator().manual_seed(7)
    W = torch.randn(d, 2, generator=draw) @ torch.randn(2, d, generator=draw) / d
    b = torch.randn(d, generator=draw)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw) * torch.logspace(-1, 1, d) + 1
    x[:, list(quiet)] = 0
    y = torch.randn(n, d, generator=draw)
    e = x @ W + 0.2 * y + b + noise * torch.randn(n, d, generator=draw)
    return x, y, e


def problem_of(n=800, held_out=200, noise=0.1, d=D, targets=1, quiet=()):
    shift = torch.ones(d)
    parts = []
    for fold, size in enumerate([n // 4] * 4 + [held_out]):
        sums = RegressionSums(d, d, targets, shift)
        if size:
            x, y, e = drawn(size, fold, noise, d, quiet)
            sums.add_(x, y, [e / (1 + target) for target in reversed(range(targets))])
        parts.append(sums)
    *folds, last = parts
    return CompensationProblem("block", CompensationShape("bias", d, d), folds, last if held_out else None)


def left_of(found, n=500, noise=0.1, d=D):
    """Return the error that is left on new rows, and that without a map."""
    x, y, e = drawn(n, 99, noise, d)
    map = Compensation(found.shape, found.tensors)
    missing = e - (map(x, y) - y)
    return float(missing.square().sum(1).mean()), float(e.square().sum(1).mean())


def test_three_rows_by_hand():
    # x = -1, 0, 1 and e = 2 x + 0.5, the example of the module; the same rows in each fold.
    folds = []
    for _ in range(5):
        sums = RegressionSums(1, 1, 1, torch.zeros(1))
        x = torch.tensor([[-1.0], [0.0], [1.0]])
        sums.add_(x, x, [2 * x + 0.5])
        folds.append(sums)
    problem = CompensationProblem("block", CompensationShape("bias", 1, 1), folds[:4], folds[4])
    full = QwT(structure="full").fit(problem)
    assert float(full.tensors["weight"][0, 0]) == pytest.approx(2.0, rel=1e-5)
    assert float(full.tensors["bias"][0]) == pytest.approx(0.5, rel=1e-5)
    assert full.diagnostics["in_sample_r2"] == pytest.approx(1.0, abs=1e-6)
    constant = QwT(structure="bias").fit(problem)
    assert float(constant.tensors["bias"][0]) == pytest.approx(0.5)
    # What the constant leaves is mean (2 x)^2 = 8/3 of mean e^2 = 8/3 + 1/4.
    assert constant.diagnostics["removed_held_out"] == pytest.approx(0.25 / (8 / 3 + 0.25))


@pytest.mark.parametrize("structure", ["bias", "affine", "low_rank", "block_diagonal", "full", "auto"])
def test_what_is_stored_does_what_was_promised(structure):
    keys = {"low_rank": {"rank": 2}, "block_diagonal": {"groups": 2}}.get(structure, {})
    found = QwT(structure=structure, **keys).fit(problem_of())
    assert found.shape is not None
    assert found.shape.shapes == {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
    error, energy = left_of(found)
    assert 1 - error / energy == pytest.approx(found.diagnostics["removed_held_out"], abs=0.05)
    assert error < energy
    assert found.diagnostics["bytes"] == sum(tensor.nbytes for tensor in found.tensors.values())


def test_the_order_of_the_structures():
    methods = {name: QwT(structure=name) for name in ("bias", "affine", "full")}
    methods["low_rank"] = QwT(structure="low_rank", rank=2)
    errors = {name: left_of(method.fit(problem_of()))[0] for name, method in methods.items()}
    assert errors["full"] < errors["affine"] < errors["bias"]
    # W has rank 2, so that nothing is lost by it.
    assert errors["low_rank"] == pytest.approx(errors["full"], rel=0.02)
    assert errors["full"] == pytest.approx(D * (0.1**2 + 0.2**2), rel=0.15)  # the noise, and y, which x does not tell


def test_auto_takes_what_is_best_on_other_rows():
    free = replace(problem_of(), num_weights=10**9)  # bytes beside so many weights are nothing
    found = QwT(structure="auto").fit(free)
    assert found.shape.structure in ("low_rank", "full")
    # Fewer rows than inputs and no signal but the mean: a matrix can only do harm.
    few = QwT(structure="auto").fit(problem_of(n=40, noise=30.0))
    assert few.shape is None or few.shape.structure in ("bias", "affine")


def test_auto_weighs_bytes_against_wider_codes():
    """Noise leaves 0.8 of the error at best: worth 0.16 bits a weight, which a matrix costs with few weights in the block."""
    problem = problem_of(noise=2.0)
    found = {n: QwT(structure="auto").fit(replace(problem, num_weights=n)) for n in (1000, 10**9)}
    assert found[10**9].diagnostics["bytes"] > found[1000].diagnostics["bytes"]
    assert found[10**9].diagnostics["removed_in_folds"] > found[1000].diagnostics["removed_in_folds"]


def test_a_map_that_does_harm_on_held_out_rows_is_dropped():
    problem = problem_of(n=40, held_out=400, noise=30.0)
    found = QwT(structure="full", solve="float32_inverse").fit(problem)
    assert found.shape is None
    assert not found.tensors
    assert [event.kind for event in found.events] == ["dropped"]
    assert found.diagnostics["removed_held_out"] < 0
    assert found.diagnostics["bytes"] == 0
    kept = QwT(structure="full", solve="float32_inverse", gate="in_sample").fit(problem)
    assert kept.shape is not None  # the paper keeps it: it fits its own rows
    assert kept.diagnostics["in_sample_r2"] > 0.3


def test_the_ridge_makes_harmless_what_the_inverse_spoils():
    problem = problem_of(n=40, held_out=400, noise=3.0)
    ridge, inverse = QwT(structure="full").fit(problem), QwT(structure="full", solve="float32_inverse").fit(problem)
    assert ridge.diagnostics["removed_held_out"] > inverse.diagnostics["removed_held_out"]
    assert ridge.diagnostics["ridge"] >= 1e-2


def test_the_papers_inverse_equals_ours_where_the_moments_are_good():
    ours = QwT(structure="full", dtype="float32").fit(problem_of())
    papers = QwT(structure="full", solve="float32_inverse", dtype="float32").fit(problem_of())
    assert torch.allclose(ours.tensors["weight"], papers.tensors["weight"], atol=0.02)


def test_dead_inputs_end_the_papers_inverse_only():
    problem = problem_of(quiet=(3, 5))
    ours = QwT(structure="full").fit(problem)
    assert ours.shape is not None
    assert torch.equal(ours.tensors["weight"][:, [3, 5]], torch.zeros(D, 2, dtype=torch.bfloat16))
    papers = QwT(structure="full", solve="float32_inverse", gate="in_sample").fit(problem)
    assert papers.shape is None  # torch finds the matrix singular
    assert papers.diagnostics["in_sample_r2"] == 0


def test_mix_takes_the_share_that_the_last_target_asks_for():
    # The first target is half of the second, so that only all of the second will do.
    found = QwT(structure="full", target="mix").fit(problem_of(targets=2))
    assert found.diagnostics["trajectory_share"] == 1.0
    assert QwT(target="mix").targets == ("local", "trajectory")
    assert QwT().targets == ("trajectory",)
    assert QwT(target="local").targets == ("local",)


def test_held_out_rows_are_never_fitted_to():
    """They prove the map, and then the maps behind it and the whole model."""
    problem = problem_of(n=80, held_out=400)
    method = QwT(structure="full")
    proved, without = method.fit(problem), method.fit(replace(problem, held_out=None))
    assert torch.equal(proved.tensors["weight"], without.tensors["weight"])
    assert without.diagnostics["removed_held_out"] is None


def test_nothing_is_kept_that_no_row_proves():
    sums = problem_of().folds[0]
    alone = CompensationProblem("block", CompensationShape("bias", D, D), [sums])
    found = QwT(structure="full").fit(alone)
    assert found.shape is None
    assert "nothing proves the map" in found.events[0].message


@pytest.mark.parametrize(("width", "asked", "expected"), [(200, 0, 2), (64, 3, 2), (64, 0, 1), (256, 0, 4), (7, 5, 1)])
def test_blocks_on_the_diagonal_divide_the_width(width, asked, expected):
    method = QwT(structure="block_diagonal", groups=asked)
    assert method.largest(CompensationShape("bias", width, width)).groups == expected


def test_the_papers_inverse_has_no_other_structures():
    with pytest.raises(ValueError, match="float32_inverse"):
        QwT(solve="float32_inverse")


@pytest.mark.parametrize(("key", "structure"), [("rank", "auto"), ("rank", "full"), ("groups", "low_rank")])
def test_a_key_of_another_structure_is_refused(key, structure):
    with pytest.raises(ValueError, match=f"{key} is of structure"):
        QwT(structure=structure, **{key: 4})


def test_numbers_beyond_float16_are_stored_in_bfloat16():
    problem = problem_of()
    sums = []
    for fold in range(5):
        x, y, e = drawn(200, fold)
        one = RegressionSums(D, D, 1, torch.ones(D))
        one.add_(x, y, [e * 1e6])
        sums.append(one)
    huge = QwT(structure="full", dtype="float16").fit(replace(problem, folds=sums[:4], held_out=sums[4]))
    assert huge.tensors["weight"].dtype == torch.bfloat16
    assert [event.kind for event in huge.events] == ["fallback"]
    assert QwT(structure="full", dtype="float16").fit(problem).tensors["weight"].dtype == torch.float16


def test_no_rows_at_all():
    with pytest.raises(ValueError, match="rows"):
        QwT().fit(problem_of(n=0, held_out=0))


def test_a_constant_that_changes_from_fold_to_fold_is_drawn_to_zero():
    """Four folds with the means +2, -2, +2, -2 and noise: what is left of their mean is an accident."""
    folds = []
    for fold in range(4):
        sums = RegressionSums(1, 1, 1, torch.zeros(1))
        x = torch.zeros(50, 1)
        sums.add_(x, x, [x + 2 * (-1) ** fold + 0.01])
        folds.append(sums)
    method = QwT(structure="bias", gate="in_sample")
    unsteady = method.fit(CompensationProblem("block", CompensationShape("bias", 1, 1), folds))
    assert float(unsteady.tensors["bias"][0]) == 0
    assert unsteady.diagnostics["steady_share_of_constant"] == 0
    # The means 1.5 and 0.5 twice: variance 0.25 / 3 of their mean over a mean of 1, so that 11/12 of it stay.
    for fold, sums in enumerate(folds):
        folds[fold] = RegressionSums(1, 1, 1, torch.zeros(1))
        folds[fold].add_(torch.zeros(50, 1), torch.zeros(50, 1), [torch.full((50, 1), 0.5 + fold % 2)])
        del sums
    steadier = method.fit(CompensationProblem("block", CompensationShape("bias", 1, 1), folds))
    assert float(steadier.tensors["bias"][0]) == pytest.approx(11 / 12)


def test_one_fold_that_loses_is_enough_to_drop_a_map():
    problem = problem_of()
    x, y, e = drawn(200, 3)
    turned = RegressionSums(D, D, 1, torch.ones(D))
    turned.add_(x, y, [-e])
    assert QwT(structure="full").fit(problem).shape is not None
    found = QwT(structure="full").fit(replace(problem, folds=[*problem.folds[:3], turned]))
    assert found.shape is None
    assert min(found.diagnostics["removed_in_folds"]) < 0
