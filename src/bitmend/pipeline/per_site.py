"""Lift a solver of one matrix to a solver of a block, and prove each of its results on rows that it was not fitted to.

For each site the candidate is fitted on the fit split. It is kept if its held-out error is not above that of
round-to-nearest at the same bits on the same rows; else round-to-nearest is stored and the report says so. A kept candidate
is then fitted once more on all rows (`refit`). The held-out number in the report always speaks of the candidate before that.

A matrix of an expert that too few calibration tokens reach is solved on all tokens of its layer, or rounded to nearest, as
the recipe says; either is an event.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from bitmend.errors import FactorizationError, NumericsError
from bitmend.linalg.cholesky import InverseFactor
from bitmend.linalg.moments import (
    Moments,
    energy_and_errors,
    merge,
    merge_,
    relative,
    relative_errors,
)
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec
from bitmend.protocols import (
    BlockStreams,
    ChoosingSolver,
    Event,
    Need,
    Problem,
    SiteReport,
    SiteSolver,
    Solution,
    SolvedSite,
)
from bitmend.routing import ExpertTokens
from bitmend.sites import Block, LinearSite, SiteGroup
from bitmend.solvers.rtn import Rtn

FULL_PRECISION_STREAM = frozenset({Need.CROSS_MOMENT, Need.RESIDUAL_MOMENT})
BOTH_STREAMS = FULL_PRECISION_STREAM | {Need.INPUT_MOMENT}


@dataclass(frozen=True)
class PerSite:
    """A block solver made of a site solver.

    Attributes:
        solver: works on one matrix.
        name: its name in the report.
        refit: fit accepted candidates again on all rows.
        two_streams: measure errors against the full-precision network, whatever the solver itself asks for.
    """

    solver: SiteSolver
    name: str
    refit: bool
    two_streams: bool = False

    def __post_init__(self) -> None:
        if self._chooses and not isinstance(self.solver, ChoosingSolver):
            raise TypeError(f"solver {self.name} asks for held-out rows, so it must have a method solve_again")

    def solve_block(
        self,
        block: Block,
        streams: BlockStreams | None,
        schemes: Mapping[str, QuantSpec],
        known: Mapping[str, SolvedSite] | None = None,
    ) -> Iterator[SolvedSite]:
        """Yield each site's solution, a known one as it is; the caller stores it before asking for the next.

        Raises:
            FactorizationError: the moments of a site stay indefinite; names the site.
            NumericsError: a weight holds NaN or Inf; names the site.
        """
        for index, group in enumerate(block.groups):
            sites = [site for site in group.sites if site.name in schemes]
            solved = {site.name: known[site.name] for site in sites if known and site.name in known}
            factors = _Factors()
            for one in solved.values():
                factors = factors | _Factors.from_json(one.carried)
            candidates: dict[str, _Candidate] = {}
            rows = None
            if len(solved) < len(sites):
                rows = self._measure(index, group, streams)
                for site in sites:
                    if site.name not in solved:
                        candidates[site.name] = self._candidate(site, block, schemes[site.name], rows)
                factors = factors.with_those_of(rows)
                # Only now that all candidates have been judged: the moments of all rows take the place of the others.
                rows = rows.joined_(shared=group.expert is not None)
            for site in sites:
                if site.name in solved:
                    yield solved[site.name]
                    continue
                assert rows is not None
                solution, report = self._refitted(candidates.pop(site.name), block, rows)
                factors = factors.with_those_of(rows)
                events = [*solution.events, *_scale_events(site, solution.qtensor), *self._rare_events(site, rows.sent)]
                events += [] if rows.shared_input else self._grouped_events(site)
                if site is sites[-1]:  # factors are the group's: told once, when all of them have been computed
                    events += _factor_events(site, factors)
                yield SolvedSite(site, replace(solution, events=tuple(events)), report, factors.to_json())

    def _candidate(self, site: LinearSite, block: Block, spec: QuantSpec, rows: "_Rows") -> "_Candidate":
        """Solve a site on the fit rows and judge it on the others."""
        started = time.perf_counter()
        # Under no name that outlives this call: it holds the moments of the fit rows.
        problem = Problem(site, finite_weight(site, block), spec, rows.fit)
        with self._named(site):
            solution, report = self._rounded(problem) if rows.too_few else self._solve_site(problem, rows)
        if rows.sent is not None:
            report.diagnostics["expert_tokens_fit"] = rows.sent.fit
            report.diagnostics["expert_tokens_held_out"] = rows.sent.held_out
        report.seconds = time.perf_counter() - started
        return _Candidate(site, spec, solution, report, problem.known_qparams)

    def _refitted(self, candidate: "_Candidate", block: Block, rows: "_Rows") -> tuple[Solution, SiteReport]:
        """Fit an accepted candidate again on all rows; other candidates stay."""
        solution, report = candidate.solution, candidate.report
        if rows.both is None or not report.accepted or rows.too_few or not self.solver.needs:
            return solution, report
        started = time.perf_counter()
        weight = finite_weight(candidate.site, block)
        with self._named(candidate.site):
            problem = Problem(candidate.site, weight, candidate.spec, rows.both).knowing(candidate.qparams)
            if self._chooses and isinstance(self.solver, ChoosingSolver):
                refitted = self.solver.solve_again(problem, solution)
            else:
                refitted = self.solver.solve(problem)
        report.diagnostics = {**dict(refitted.diagnostics), **_expert_counts(report)}
        report.refitted = True
        report.seconds += time.perf_counter() - started
        return replace(refitted, proved=solution.qtensor), report

    @property
    def _chooses(self) -> bool:
        """Whether the solver makes choices of its own on held-out rows."""
        return Need.HELD_OUT in self.solver.needs

    @contextmanager
    def _named(self, site: LinearSite) -> Iterator[None]:
        try:
            yield
        except FactorizationError as error:
            raise FactorizationError(f"solver {self.name} at {site.name}: {error}") from error

    @staticmethod
    def _rounded(problem: Problem) -> tuple[Solution, SiteReport]:
        """Round to nearest a matrix of which nothing was measured."""
        return Rtn().solve(problem), SiteReport(problem.site.name, str(problem.spec), "rtn")

    def _measure(self, group_index: int, group: SiteGroup, streams: BlockStreams | None) -> "_Rows":
        if streams is None and self.solver.needs:
            raise ValueError(f"solver {self.name} needs calibration data")
        needs = self.solver.needs | BOTH_STREAMS if self.two_streams else self.solver.needs
        if streams is None or not needs:
            return _Rows(None, None, None)
        if not all(site.view.one_input for site in group.sites):
            return _Rows(None, None, None, shared_input=False)
        sent = streams.expert_tokens(group_index) if group.expert is not None else None
        if sent is not None and sent.treatment == "rtn":
            return _Rows(None, None, None, sent)
        fit, held_out = streams.moments(group_index, needs)
        return _Rows(fit, held_out, None, sent, self.refit)

    def _solve_site(self, problem: Problem, rows: "_Rows") -> tuple[Solution, SiteReport]:
        if self._chooses:
            problem = replace(problem, held_out=rows.held_out)
        solution = self.solver.solve(problem)
        candidate = solution.qtensor
        report = SiteReport(problem.site.name, str(problem.spec), self.name)
        report.diagnostics = dict(solution.diagnostics)
        if rows.fit is None:
            return solution, report
        report.streams = 1 if rows.fit.D is None else 2
        report.chosen_on_held_out = self._chooses and rows.held_out is not None
        rounded = candidate.dequantize()
        if rows.held_out is None:
            (report.fit_error,) = relative_errors(problem.weight, [rounded], rows.fit)
            return solution, report
        base = Rtn().solve(problem)
        both = [rounded, base.qtensor.dequantize()]
        energy, errors = energy_and_errors(problem.weight, both, rows.held_out)
        report.held_out_error, report.base_held_out_error = (relative(error, energy) for error in errors)
        fit_error = solution.fit_error
        if fit_error is None:
            _, (fit_error,) = energy_and_errors(problem.weight, [rounded], rows.fit, energy)
        report.fit_error = relative(fit_error, energy)
        if not report.held_out_error <= report.base_held_out_error:  # NaN, too, is no proof
            return _dropped(solution, base, report)
        return solution, report

    def _grouped_events(self, site: LinearSite) -> list[Event]:
        """Return what the user must know of a layer whose output channels read different inputs."""
        message = "each group of channels reads inputs of its own, which no solver takes yet; rounded to nearest"
        return [] if isinstance(self.solver, Rtn) else [Event("grouped", site.name, message, degrades=True)]

    def _rare_events(self, site: LinearSite, sent: ExpertTokens | None) -> list[Event]:
        """Return what the user must know of an expert that too few calibration tokens reach."""
        if sent is None or sent.treatment == "own":
            return []
        if sent.treatment == "pool":
            return [
                Event("pooled_expert", site.name, f"{sent.shortage()}; measured on all tokens of its layer instead")
            ]
        degrades = not isinstance(self.solver, Rtn)
        return [Event("rare_expert", site.name, f"{sent.shortage()}; rounded to nearest", degrades)]


@dataclass(frozen=True)
class _Rows:
    """Moments of one group: of the fit split and of the held-out split, later of both together."""

    fit: Moments | None
    held_out: Moments | None
    both: Moments | None
    sent: ExpertTokens | None = None  # of a group that belongs to an expert
    refit: bool = False
    shared_input: bool = True  # whether all rows of the matrix read the same input

    def joined_(self, *, shared: bool) -> "_Rows":
        """Return what refitting needs, and let the moments of the splits go; `shared` ones of experts stay as they are."""
        if not self.refit or self.fit is None or self.held_out is None:
            return _Rows(None, None, None, self.sent, shared_input=self.shared_input)
        join = merge if shared else merge_
        return _Rows(None, None, join(self.fit, self.held_out), self.sent)

    @property
    def too_few(self) -> bool:
        """Whether the group is rounded to nearest: too few tokens reach its expert, or there are no rows for a product."""
        return not self.shared_input or (self.sent is not None and self.sent.treatment == "rtn")


def finite_weight(site: LinearSite, block: Block) -> Any:
    """Return a site's weight in float32.

    Raises:
        NumericsError: it holds NaN or Inf.
    """
    weight = site.weight(block.module).float()
    if not bool(weight.isfinite().all()):
        count = int((~weight.isfinite()).sum())
        raise NumericsError(f"the weight of {site.name} must be finite, but {count} of its entries are NaN or Inf")
    return weight


def _scale_events(site: LinearSite, qtensor: QTensor) -> list[Event]:
    """Return what the user must know of scales that the type they are stored in could not hold."""
    limits = torch.finfo(qtensor.spec.scale_dtype)
    scale = qtensor.qparams.scale
    at_limit = int((((scale > 0) & (scale <= limits.tiny)) | (scale >= limits.max)).sum())
    if not at_limit:
        return []
    kind = str(qtensor.spec.scale_dtype).removeprefix("torch.")
    message = f"{at_limit} of {scale.numel()} scales lie outside the range of {kind} and were moved to its end"
    return [Event("scale_clamped", site.name, f"{message}; set weights.scale_dtype = 'float32'", degrades=True)]


def _dropped(solution: Solution, base: Solution, report: SiteReport) -> tuple[Solution, SiteReport]:
    message = (
        f"{report.solver} was worse than round-to-nearest on held-out rows "
        f"({report.held_out_error:.4g} against {report.base_held_out_error:.4g}); round-to-nearest is stored"
    )
    event = Event("dropped", report.name, message)
    report.accepted, report.solver = False, "rtn"
    return replace(base, events=(*solution.events, event)), report


@dataclass(frozen=True)
class _Candidate:
    """A site solved on the fit rows and judged; its scales, where they were searched on the weight alone."""

    site: LinearSite
    spec: QuantSpec
    solution: Solution
    report: SiteReport
    qparams: QParams | None


def _expert_counts(report: SiteReport) -> dict[str, Any]:
    return {key: value for key, value in report.diagnostics.items() if key.startswith("expert_tokens_")}


_Facts = tuple[float, float, int]  # of a factor: the damping that was requested, that was needed, dead columns


@dataclass(frozen=True)
class _Factors:
    """What the factors of a group were like, up to one of its sites; in plain numbers, which a resumed run can read.

    Attributes:
        fit: of the moments of the fit split.
        both: of those of all rows.
    """

    fit: tuple[_Facts, ...] = ()
    both: tuple[_Facts, ...] = ()

    def with_those_of(self, rows: _Rows) -> "_Factors":
        """Return also the factors that have been computed of some moments."""
        return _Factors(_joined(self.fit, rows.fit), _joined(self.both, rows.both))

    def __or__(self, other: "_Factors") -> "_Factors":
        return _Factors(tuple(dict.fromkeys([*self.fit, *other.fit])), tuple(dict.fromkeys([*self.both, *other.both])))

    @property
    def stored(self) -> tuple[_Facts, ...]:
        """Those behind the stored codes: of all rows where candidates were refitted, else of the fit rows."""
        return self.both or self.fit

    def to_json(self) -> dict[str, Any]:
        return {"fit": [list(facts) for facts in self.fit], "both": [list(facts) for facts in self.both]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "_Factors":
        fit, both = (tuple((one, two, count) for one, two, count in values[key]) for key in ("fit", "both"))
        return cls(fit, both)


def _joined(known: tuple[_Facts, ...], moments: Moments | None) -> tuple[_Facts, ...]:
    factors: tuple[InverseFactor, ...] = () if moments is None else moments.factors
    found = [(factor.requested_damping, factor.damping, factor.dead_columns) for factor in factors]
    return tuple(dict.fromkeys([*known, *found]))


def _factor_events(site: LinearSite, factors: _Factors) -> list[Event]:
    """Return what the user must know of a factorisation: a raised damping, inputs that were zero on every token."""
    events = []
    for requested, damping, dead_columns in factors.stored:
        if damping > requested:
            message = f"the moments were indefinite with damping {requested}; solved with {damping}"
            events.append(Event("damping_raised", site.name, message))
        if dead_columns:
            message = f"{dead_columns} of {site.shape[1]} inputs were zero on every calibration token"
            events.append(Event("dead_columns", site.name, f"{message}; their weights are rounded to nearest"))
    return list(dict.fromkeys(events))  # one solver may use several factors of the same moments
