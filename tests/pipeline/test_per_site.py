from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from bitmend.errors import FactorizationError, NumericsError
from bitmend.linalg.moments import Moments, MomentSums, merge, relative_errors
from bitmend.numerics.granularity import PerChannel
from bitmend.numerics.qtensor import QTensor, QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.pipeline.per_site import PerSite, _Rows, _scale_events
from bitmend.protocols import BlockSolver, Event, Need, Problem, Solution
from bitmend.routing import Expert, ExpertTokens
from bitmend.sites import Block, LinearSite, SiteGroup
from bitmend.solvers.gptq import Gptq
from bitmend.solvers.rtn import Rtn

WIDTH, OUT = 12, 10
SPEC = QuantSpec(UniformGrid(3, True), PerChannel(), "minmax")
PATHS = ("q", "k", "v")


def moments_of(x):
    sums = MomentSums(x.shape[1], cross=False, residual=False, device=x.device)
    sums.add_(x, None)
    return sums.means()


def copied(moments):
    return replace(moments, G=moments.G.clone(), _known={})


@dataclass
class Rows:
    """Stands for the calibration data at a block."""

    fit: Moments
    held_out: Moments | None

    def moments(self, group_index, needs):
        self.asked = (group_index, needs)
        # Copies, as from the streams: whoever asks may write to them.
        return copied(self.fit), None if self.held_out is None else copied(self.held_out)

    def expert_tokens(self, group_index):
        return None


@pytest.fixture
def inputs():
    """Correlated inputs, so that GPTQ has something to repair."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    return torch.randn(60, WIDTH, generator=generator) @ mixing


@pytest.fixture
def rows(inputs):
    return Rows(moments_of(inputs[:40]), moments_of(inputs[40:]))


@pytest.fixture
def block():
    torch.manual_seed(1)
    module = nn.ModuleDict({path: nn.Linear(WIDTH, OUT, bias=False) for path in PATHS})
    sites = tuple(LinearSite(f"m.0.{path}", path, "linear", (OUT, WIDTH)) for path in PATHS)
    return Block("m.0", 0, module, (SiteGroup("{q,k,v}", sites, None),))


def solve(solver, block, rows, *, refit=True, names=PATHS):
    schemes = {f"m.0.{name}": SPEC for name in names}
    solved = PerSite(solver, "mine", refit).solve_block(block, rows, schemes)
    return [(one.site, one.solution, one.report) for one in solved]


def relative_error(this, qtensor, moments):
    return relative_errors(this.weight, [qtensor.dequantize()], moments)[0]


def fit_error(this, qtensor, rows):
    """The error on the fit rows, by the measure that all errors of a site have: the energy on the held-out rows."""
    return rows.fit.output_error(this.weight, qtensor.dequantize()) / rows.held_out.output_energy(this.weight)


def problem(block, path="q"):
    site = next(site for site in block.sites if site.path == path)
    return Problem(site, site.weight(block.module), SPEC)


@dataclass(frozen=True)
class RandomCodes:
    """Bad on purpose."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT})

    def solve(self, problem):
        base = Rtn().solve(problem).qtensor
        problem.fit.inverse_factor(0.01, "natural")
        codes = torch.randint(-4, 4, base.codes.shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
        return Solution(QTensor(codes, base.qparams, base.spec), events=(Event("told", problem.site.name, "anyway"),))


@dataclass(frozen=True)
class BadAt:
    """GPTQ, but random codes at one site."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT})
    path: str

    def solve(self, problem):
        return (RandomCodes() if problem.site.path == self.path else Gptq()).solve(problem)


@dataclass(frozen=True)
class Chooses:
    """Looks at the held-out rows itself."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT, Need.HELD_OUT})

    def solve(self, problem):
        seen = {"held_out": problem.held_out is not None, "rows": problem.fit.num_tokens}
        return replace(Gptq().solve(problem), diagnostics=seen)

    def solve_again(self, problem, judged):
        assert problem.held_out is None
        seen = {**judged.diagnostics, "rows_again": problem.fit.num_tokens}
        return replace(Gptq().solve(problem), diagnostics=seen)


def test_it_is_a_block_solver():
    assert isinstance(PerSite(Rtn(), "rtn", True), BlockSolver)


# ------------------------------------------------------------------------------------------------ the gate
def test_a_bad_candidate_is_dropped_and_said_so(block, rows):
    for site, solution, report in solve(RandomCodes(), block, rows):
        base = Rtn().solve(problem(block, site.path)).qtensor
        bad = RandomCodes().solve(replace(problem(block, site.path), fit=rows.fit)).qtensor
        assert torch.equal(solution.qtensor.codes, base.codes)
        assert not torch.equal(solution.qtensor.codes, bad.codes)
        assert (report.accepted, report.solver, report.refitted) == (False, "rtn", False)
        assert report.held_out_error == relative_error(problem(block, site.path), bad, rows.held_out)
        assert report.base_held_out_error == relative_error(problem(block, site.path), base, rows.held_out)
        assert report.held_out_error > report.base_held_out_error
        assert report.fit_error == pytest.approx(fit_error(problem(block, site.path), bad, rows), rel=1e-5)
        kinds = [event.kind for event in solution.events]
        assert kinds == ["told", "dropped"]  # what the candidate had to tell is kept
        message = solution.events[-1].message
        assert message.startswith("mine was worse than round-to-nearest on held-out rows (")
        assert f"{report.held_out_error:.4g} against {report.base_held_out_error:.4g}" in message
        assert solution.events[-1].where == site.name


def test_an_accepted_candidate_is_fitted_again_on_all_rows(block, rows):
    changed = 0
    for site, solution, report in solve(Gptq(), block, rows):
        this = problem(block, site.path)
        candidate = Gptq().solve(replace(this, fit=rows.fit)).qtensor
        refitted = Gptq().solve(replace(this, fit=merge(rows.fit, rows.held_out))).qtensor
        changed += not torch.equal(candidate.codes, refitted.codes)
        assert torch.equal(solution.qtensor.codes, refitted.codes)
        assert (report.accepted, report.solver, report.refitted) == (True, "mine", True)
        assert report.held_out_error == relative_error(this, candidate, rows.held_out)
        assert report.fit_error == pytest.approx(fit_error(this, candidate, rows), rel=1e-5)
        assert report.held_out_error < report.base_held_out_error
        assert report.seconds > 0
    assert changed  # else the refit could not be told from the candidate


def test_without_refit_the_candidate_is_stored(block, rows):
    for site, solution, report in solve(Gptq(), block, rows, refit=False):
        candidate = Gptq().solve(replace(problem(block, site.path), fit=rows.fit)).qtensor
        assert torch.equal(solution.qtensor.codes, candidate.codes)
        assert (report.accepted, report.refitted) == (True, False)


def test_a_candidate_equal_to_the_base_is_kept(block, rows):
    @dataclass(frozen=True)
    class RtnWithRows(Rtn):
        needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT})

    for _, solution, report in solve(RtnWithRows(), block, rows):
        assert report.held_out_error == report.base_held_out_error
        assert report.accepted
        assert solution.events == ()


def test_without_held_out_rows_there_is_no_proof(block, rows):
    for site, solution, report in solve(Gptq(), block, Rows(rows.fit, None)):
        candidate = Gptq().solve(replace(problem(block, site.path), fit=rows.fit)).qtensor
        assert torch.equal(solution.qtensor.codes, candidate.codes)
        assert (report.held_out_error, report.base_held_out_error) == (None, None)
        assert report.fit_error == relative_error(problem(block, site.path), candidate, rows.fit)
        assert (report.accepted, report.refitted) == (True, False)


def test_without_held_out_rows_even_a_bad_solver_stays(block, rows):
    assert all(report.accepted for _, _, report in solve(RandomCodes(), block, Rows(rows.fit, None)))


def test_a_solver_without_needs_measures_nothing(block):
    for site, solution, report in solve(Rtn(), block, None):
        assert torch.equal(solution.qtensor.codes, Rtn().solve(problem(block, site.path)).qtensor.codes)
        assert (report.fit_error, report.held_out_error, report.base_held_out_error) == (None, None, None)
        assert (report.accepted, report.refitted, solution.events) == (True, False, ())


def test_a_solver_that_needs_data_says_so(block):
    with pytest.raises(ValueError, match="solver mine needs calibration data"):
        solve(Gptq(), block, None)


def test_only_a_solver_that_asks_sees_the_held_out_rows(block, rows):
    for _, _, report in solve(Chooses(), block, rows):
        assert report.diagnostics["held_out"] is True
        assert report.diagnostics["rows"] == 40
        assert report.diagnostics["rows_again"] == rows.fit.num_tokens + rows.held_out.num_tokens
        assert report.refitted

    @dataclass(frozen=True)
    class Nosy(Chooses):
        needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT})

    for _, _, report in solve(Nosy(), block, rows):
        assert report.diagnostics == {"held_out": False, "rows": rows.fit.num_tokens + rows.held_out.num_tokens}


def test_a_solver_that_chooses_must_be_able_to_keep_to_its_choice():
    @dataclass(frozen=True)
    class Forgetful:
        needs: ClassVar[frozenset[Need]] = frozenset({Need.HELD_OUT})

        def solve(self, problem):
            return Gptq().solve(problem)

    with pytest.raises(TypeError, match="solver mine asks for held-out rows, so it must have a method solve_again"):
        PerSite(Forgetful(), "mine", refit=True)


def test_sites_without_a_scheme_are_left_alone(block, rows):
    assert [site.path for site, _, _ in solve(Gptq(), block, rows, names=("v",))] == ["v"]
    untouched = Rows(rows.fit, rows.held_out)
    assert solve(Gptq(), block, untouched, names=()) == []
    assert not hasattr(untouched, "asked")


# ------------------------------------------------------------------------------------------------ events of a group
def with_dead_columns(inputs):
    inputs = inputs.clone()
    inputs[:, [2, 5]] = 0
    return Rows(moments_of(inputs[:40]), moments_of(inputs[40:]))


def shifted(moments, amount):
    """Moments with one direction of negative energy, in units of the mean diagonal."""
    values, vectors = torch.linalg.eigh(moments.G)
    mean = moments.G.diagonal().mean()
    values[0] = -amount * mean
    return Moments(vectors @ values.diag() @ vectors.T, None, None, moments.num_tokens)


def events_of(solved, kind):
    return [event for _, solution, _ in solved for event in solution.events if event.kind == kind]


@pytest.mark.parametrize("solver", [Gptq(), BadAt("q"), BadAt("v"), RandomCodes(), Chooses()], ids=str)
@pytest.mark.parametrize("held_out", [True, False])
def test_dead_columns_are_told_once_a_group(block, inputs, solver, held_out):
    """Whichever of the candidates are kept or dropped."""
    rows = with_dead_columns(inputs)
    events = events_of(solve(solver, block, rows if held_out else Rows(rows.fit, None)), "dead_columns")
    assert len(events) == 1
    assert events[0].message.startswith(
        "2 of 12 inputs were zero on every calibration token; their weights are rounded"
    )


@pytest.mark.parametrize("solver", [Gptq(), BadAt("q"), RandomCodes(), Chooses()], ids=str)
def test_a_raised_damping_is_told_once_a_group(block, rows, solver):
    bad = Rows(shifted(rows.fit, 0.03), shifted(rows.held_out, 0.03))
    events = events_of(solve(solver, block, bad), "damping_raised")
    assert len(events) == 1
    assert events[0].message == "the moments were indefinite with damping 0.01; solved with 0.05"
    assert events[0].where.startswith("m.0.")


def test_a_damping_that_is_raised_for_a_later_site_only_is_told_too(block, rows):
    """The candidate of the first site is dropped, so that the moments of all rows are factored for the second."""
    bad = Rows(rows.fit, shifted(rows.held_out, 0.2))
    solved = solve(BadAt("q"), block, bad)
    assert [report.accepted for _, _, report in solved] == [False, True, True]
    assert len(events_of(solved, "damping_raised")) == 1


def test_good_moments_raise_no_event(block, rows):
    assert [solution.events for _, solution, _ in solve(Gptq(), block, rows)] == [(), (), ()]


# ------------------------------------------------------------------------------------------------ what goes wrong
def test_indefinite_moments_name_solver_and_site(block, rows):
    sentence = (
        r"^solver mine at m\.0\.q: the second moment of the inputs must be positive definite, but stays indefinite"
    )
    with pytest.raises(FactorizationError, match=sentence):
        solve(Gptq(), block, Rows(shifted(rows.fit, 3.0), rows.held_out))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_weight_names_the_site(block, rows, bad):
    with torch.no_grad():
        block.module["k"].weight[0, :2] = bad
    with pytest.raises(
        NumericsError, match=r"the weight of m\.0\.k must be finite, but 2 of its entries are NaN or Inf"
    ):
        solve(Gptq(), block, rows)


def test_the_weight_itself_is_not_changed(block, rows):
    before = {path: block.module[path].weight.clone() for path in PATHS}
    solve(Gptq(), block, rows)
    assert all(torch.equal(block.module[path].weight, before[path]) for path in PATHS)


def test_scales_that_their_type_cannot_hold_are_told():
    site = LinearSite("model.layers.0.proj", "proj", "linear", (2, 4))
    spec = QuantSpec(UniformGrid(4, symmetric=True), PerChannel(), "minmax", torch.float16)
    weight = torch.tensor([[1e-9, 0, 0, -1e-9], [1.0, 0.5, 0, 0]])
    solution = Rtn().solve(Problem(site, weight, spec))
    (event,) = _scale_events(site, solution.qtensor)
    assert event.degrades
    assert event.kind == "scale_clamped"
    assert event.message.startswith("1 of 2 scales lie outside the range of float16")
    assert _scale_events(site, Rtn().solve(Problem(site, 1e6 * weight, spec)).qtensor)[0].message.startswith("1 of 2")
    fine = replace(spec, scale_dtype=torch.bfloat16)
    assert not _scale_events(site, Rtn().solve(Problem(site, weight, fine)).qtensor)
    sign = replace(spec, grid=UniformGrid(1, symmetric=True))
    assert not _scale_events(site, Rtn().solve(Problem(site, torch.zeros(2, 4), sign)).qtensor)


def test_errors_say_which_streams_they_compare(inputs):
    site = LinearSite("model.layers.0.proj", "proj", "linear", (OUT, WIDTH))
    problem = Problem(site, torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(4)), SPEC)
    one, two = (MomentSums(WIDTH, cross=both, residual=both, device=torch.device("cpu")) for both in (False, True))
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(5))
    one.add_(x, None)
    two.add_(x, 1.5 * x)
    solver = PerSite(Gptq(), "gptq", refit=False)
    found = {}
    for name, sums in (("one", one), ("two", two)):
        rows = _Rows(sums.means(), sums.means(), None)
        found[name] = solver._solve_site(replace(problem, fit=rows.fit), rows)[1]
    assert (found["one"].streams, found["two"].streams) == (1, 2)
    assert found["two"].held_out_error > 0.2 > found["one"].held_out_error  # half of the output is missing
    assert not found["one"].chosen_on_held_out


def test_an_error_that_is_not_a_number_is_no_proof():
    site = LinearSite("model.layers.0.proj", "proj", "linear", (OUT, WIDTH))
    weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(4))
    good = moments_of(torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(5)))
    bad = Moments(torch.full_like(good.G, float("nan")), None, None, 10)
    solution, report = PerSite(Gptq(), "gptq", refit=False)._solve_site(
        Problem(site, weight, SPEC, good), _Rows(good, bad, None)
    )
    assert not report.accepted
    assert torch.equal(solution.qtensor.codes, Rtn().solve(Problem(site, weight, SPEC)).qtensor.codes)


# ------------------------------------------------------------------------------------------------ experts
@dataclass
class ExpertRows(Rows):
    """Stands for the calibration data at an expert that few tokens reach."""

    treatment: str = "own"

    def expert_tokens(self, group_index):
        return ExpertTokens(7, 2, 12, self.treatment)

    def moments(self, group_index, needs):
        assert self.treatment != "rtn", "nothing is measured for an expert that is rounded to nearest"
        return super().moments(group_index, needs)


@pytest.fixture
def expert(block):
    group = replace(block.groups[0], expert=Expert("experts", 0, 0))
    return replace(block, groups=(group,))


@pytest.mark.parametrize("treatment", ["own", "pool"])
def test_tokens_of_an_expert_are_reported(block, expert, rows, treatment):
    few = ExpertRows(rows.fit, rows.held_out, treatment)
    for (_, alone, _), (site, solution, report) in zip(
        solve(Gptq(), block, rows), solve(Gptq(), expert, few), strict=True
    ):
        assert torch.equal(solution.qtensor.codes, alone.qtensor.codes)
        assert report.diagnostics["expert_tokens_fit"] == 7
        assert report.diagnostics["expert_tokens_held_out"] == 2
        told = [(event.where, event.message, event.degrades) for event in solution.events if "expert" in event.kind]
        sentence = (
            "7 calibration tokens of the fit split reach this expert, but 12 are required; measured on all tokens"
        )
        assert told == ([] if treatment == "own" else [(site.name, f"{sentence} of its layer instead", False)])


@pytest.mark.parametrize(("solver", "degrades"), [(Gptq(), True), (Rtn(), False)])
def test_a_rare_expert_may_be_rounded_to_nearest(block, expert, rows, solver, degrades):
    few = ExpertRows(rows.fit, rows.held_out, "rtn")
    schemes = {f"m.0.{name}": SPEC for name in PATHS}
    solved = list(PerSite(solver, "mine", True, two_streams=True).solve_block(expert, few, schemes))
    assert len(solved) == len(PATHS)
    for one, path in zip(solved, PATHS, strict=True):
        assert torch.equal(one.solution.qtensor.codes, Rtn().solve(problem(block, path)).qtensor.codes)
        assert one.report.solver == "rtn"
        assert one.report.held_out_error is None
        assert one.report.diagnostics["expert_tokens_fit"] == 7
        (event,) = one.solution.events
        assert (event.kind, event.degrades) == ("rare_expert", degrades)
        assert event.message.endswith("but 12 are required; rounded to nearest")


def test_a_matrix_that_is_no_experts_has_no_such_numbers(block, rows):
    assert all("expert_tokens_fit" not in report.diagnostics for _, _, report in solve(Gptq(), block, rows))
