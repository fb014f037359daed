from dataclasses import replace

import pytest
import torch

from bitmend.errors import RecipeError
from bitmend.linalg.column_sweep import column_sweep
from bitmend.linalg.moments import MomentSums
from bitmend.linalg.strength import StrengthMeter, StrengthSolver, solve_at
from bitmend.numerics.granularity import PerChannel, PerGroup, PerTensor
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid

FORMS = ("gptaq", "shift", "rescomp", "rescomp_first")


def moments(seed, tokens=500, width=12, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    drift = torch.randn(width, width, generator=torch.Generator().manual_seed(98)) / width**0.5
    x_fp = torch.randn(tokens, width, generator=generator) @ mixing
    x = x_fp + noise * x_fp @ drift + 0.1 * torch.randn(tokens, width, generator=generator)
    sums = MomentSums(width, cross=True, residual=True, device=x.device)
    sums.add_(x, x_fp)
    return sums.means()


WEIGHT = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
FINE = QuantSpec(UniformGrid(8, symmetric=True), PerChannel(), "minmax")
COARSE = QuantSpec(UniformGrid(3, symmetric=True), PerChannel(), "minmax")


def solver(spec, form, grid="original"):
    return StrengthSolver(WEIGHT, spec, moments(0), form=form, grid=grid, damping=0.01, order="diagonal")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grid", ["original", "shifted"])
def test_one_sweep_for_all_strengths_equals_one_each(form, grid):
    if grid == "shifted" and form != "shift":
        with pytest.raises(RecipeError, match="grid 'shifted' needs a moved target"):
            solver(COARSE, form, grid)
        return
    strengths = [0.0, 0.3, 1.0]
    together = solver(COARSE, form, grid).solve(strengths)
    for strength, solution in zip(strengths, together, strict=True):
        alone = solver(COARSE, form, grid).solve([strength])[0]
        assert torch.equal(solution.codes, alone.codes)
        assert torch.equal(solution.qparams.scale, alone.qparams.scale)


def test_the_meter_agrees_with_the_moments():
    judged = moments(1)
    meter = StrengthMeter(WEIGHT, solver(COARSE, "shift").direction(), judged)
    solution = solver(COARSE, "shift").solve([0.5])[0]
    expected = judged.output_error(WEIGHT, solution.dequantize()) / judged.output_energy(WEIGHT)
    assert meter.measure(solution.dequantize(torch.float64)).error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", ["gptaq", "shift"])
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.3])
def test_without_rounding_the_error_is_the_distance_to_the_closed_form(form, strength):
    direction = solver(COARSE, form).direction()
    meter = StrengthMeter(WEIGHT, direction, moments(1))
    seen = meter.measure(WEIGHT.double() + strength * direction)
    assert seen.projection == pytest.approx(meter.closed_form - strength, abs=1e-6)  # products in float32


def test_the_closed_form_has_the_smallest_error_on_its_line():
    direction = solver(COARSE, "shift").direction()
    meter = StrengthMeter(WEIGHT, direction, moments(1))
    errors = [
        meter.measure(WEIGHT.double() + (meter.closed_form + step) * direction).error for step in (-0.1, 0.0, 0.1)
    ]
    assert errors[1] < min(errors[0], errors[2])
    # The curvature of J / energy along the direction is its relative gain.
    assert errors[0] - errors[1] == pytest.approx(0.01 * meter.relative_gain, rel=1e-5)  # products in float32


@pytest.mark.parametrize("form", FORMS)
def test_the_direction_is_how_a_fine_solution_moves(form):
    fine = solver(FINE, form)
    near, far = (one.dequantize(torch.float64) for one in fine.solve([0.0, 0.1]))
    moved, direction = (far - near) / 0.1, fine.direction()
    cosine = torch.sum(moved * direction) / (moved.norm() * direction.norm())
    # The second term of ResComp pulls part of the move back; it is no part of the direction.
    assert float(cosine) > (0.8 if form.startswith("rescomp") else 0.9)


def test_one_scale_for_all_rows_is_refused():
    spec = QuantSpec(UniformGrid(3, symmetric=True), PerTensor(), "minmax")
    with pytest.raises(RecipeError, match="their scales must be per channel or per group"):
        solver(spec, "gptaq")


class Keep:
    """Rounds nothing, and remembers each column as it stood when its turn came."""

    def __init__(self, like):
        self.kept = torch.empty_like(like)

    def round(self, column, values):
        self.kept[:, column] = values
        return values


@pytest.mark.parametrize("form", ["gptaq", "rescomp", "rescomp_first"])
def test_the_direction_is_the_derivative_of_the_unrounded_sweep(form):
    one, step = solver(COARSE, form), 1e-5
    keeper = Keep(WEIGHT.double())
    terms = one._terms(torch.full((8,), step, dtype=torch.float64))
    column_sweep(WEIGHT.double(), one.factor, keeper, terms)
    moved = (keeper.kept - WEIGHT.double()) / step
    torch.testing.assert_close(moved, one.direction(), rtol=1e-3, atol=1e-4)


def test_equal_streams_have_no_residual():
    same = MomentSums(12, cross=True, residual=True, device=torch.device("cpu"))
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    same.add_(x, x)
    one = StrengthSolver(WEIGHT, COARSE, same.means(), form="gptaq", damping=0.01, order="natural")
    meter = StrengthMeter(WEIGHT, one.direction(), same.means())
    assert meter.no_residual
    assert meter.closed_form == 0.0


def test_cross_moments_are_needed():
    plain = MomentSums(12, cross=False, residual=False, device=torch.device("cpu"))
    plain.add_(torch.ones(3, 12), None)
    with pytest.raises(ValueError, match="needs the cross moment C"):
        StrengthSolver(WEIGHT, COARSE, plain.means(), form="gptaq", damping=0.01, order="natural")
    with pytest.raises(ValueError, match="needs the moments C and D"):
        StrengthMeter(WEIGHT, WEIGHT.double(), plain.means())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("top", [0.7, 1.0])
def test_scales_between_two_strengths_are_interpolated_and_exact_at_both_ends(symmetric, top):
    fitted, spec = moments(0), replace(COARSE, grid=UniformGrid(COARSE.grid.bits, symmetric))
    keys = {"form": "shift", "damping": 0.01, "order": "diagonal"}
    between = StrengthSolver(WEIGHT, spec, fitted, top=top, **keys)
    searched = StrengthSolver(WEIGHT, spec, fitted, **keys)
    low, middle, high = between.solve([0.0, top / 2, top])
    for end, strength in ((low, 0.0), (high, top)):
        expected = searched.solve([strength])[0]
        assert torch.equal(end.qparams.scale, expected.qparams.scale)
        assert torch.equal(end.codes, expected.codes)
    torch.testing.assert_close(middle.qparams.scale, (low.qparams.scale + high.qparams.scale) / 2)
    assert not torch.equal(low.qparams.scale, high.qparams.scale)
    if not symmetric:
        assert torch.equal(middle.qparams.zero_point, middle.qparams.zero_point.round())
    with pytest.raises(ValueError, match="a share from 0 to 1 is required"):
        between.solve([1.1 * top])


def test_where_the_weight_is_zero_scales_grow_from_zero():
    weight = WEIGHT.clone()
    width = weight.shape[1] // 2
    weight[0, :width] = 0
    spec = replace(COARSE, granularity=PerGroup(width))
    solver = StrengthSolver(weight, spec, moments(0), form="shift", damping=0.01, order="diagonal", top=1.0)
    start, middle, end = solver.solve([0.0, 0.5, 1.0])
    assert start.qparams.scale[0, 0] == 1  # stands for nothing
    assert middle.qparams.scale[0, 0] == pytest.approx(end.qparams.scale[0, 0] / 2)
    assert end.qparams.scale[0, 0] < 0.5


def test_a_solution_at_given_scales_on_other_moments():
    fit, everything = moments(0), moments(2)
    first = StrengthSolver(WEIGHT, COARSE, fit, form="shift", damping=0.02, order="natural", top=1.0)
    chosen = first.solve([0.5])[0]
    final, factor = solve_at(WEIGHT, COARSE, everything, "shift", 0.5, chosen.qparams, 0.02, "natural")
    assert torch.equal(final.qparams.scale, chosen.qparams.scale)
    assert not torch.equal(final.codes, chosen.codes)
    assert factor.damping == 0.02
    same, _ = solve_at(WEIGHT, COARSE, fit, "shift", 0.5, chosen.qparams, 0.02, "natural")
    assert torch.equal(same.codes, chosen.codes)


def test_a_tiny_error_is_measured_in_float64():
    judged = moments(1)
    same = replace(judged, C=torch.zeros_like(judged.C), D=torch.zeros_like(judged.D), _known={})
    meter = StrengthMeter(WEIGHT, solver(COARSE, "shift").direction(), same)
    nearly = WEIGHT.double() * (1 + 1e-7)
    E = nearly - WEIGHT.double()
    energy = torch.sum((WEIGHT.double() @ judged.G) * WEIGHT.double())
    assert meter.measure(nearly).error == pytest.approx(float(torch.sum((E @ judged.G) * E) / energy), rel=1e-6)
