"""The laws over every registered compensator, in all its structures; and laws that fail when they should."""

from dataclasses import replace

import pytest
import torch

from bitmend.compensation import CompensationShape
from bitmend.compensators.qwt import QwT
from bitmend.linalg.least_squares import RegressionSums
from bitmend.protocols import COMPENSATORS, Compensated, CompensationProblem
from bitmend.testing.laws import compensator as laws

WIDTH = 12
METHODS = [
    pytest.param(
        QwT(structure=structure, target=target, groups=3 if structure == "block_diagonal" else 0),
        id=f"qwt-{structure}-{target}",
    )
    for structure in ("bias", "affine", "low_rank", "block_diagonal", "full", "auto")
    for target in ("local", "mix")
] + [pytest.param(QwT(structure="full", solve="float32_inverse"), id="qwt-papers-inverse")]


def rows(count, seed, lacking=1.0):
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH
    x, y, noise = (torch.randn(count, WIDTH, generator=draw) for _ in range(3))
    return x + 1, y, lacking * (x @ W + 0.3 * y + 0.2 + 0.5 * noise)


def problem_of(method, lacking=1.0, count=60):
    parts = []
    for fold in range(method.folds + 1):
        x, y, e = rows(count, fold, lacking)
        sums = RegressionSums(WIDTH, WIDTH, len(method.targets), torch.ones(WIDTH))
        sums.add_(x, y, [e] * len(method.targets))
        parts.append(sums)
    return CompensationProblem("block", CompensationShape("bias", WIDTH, WIDTH), parts[:-1], parts[-1], 10**6)


def test_all_registered_ones_are_here():
    assert {type(method.values[0]) for method in METHODS} == {entry.part for entry in COMPENSATORS}


@pytest.mark.parametrize("method", METHODS)
def test_laws(method):
    problem = problem_of(method)
    laws.tensors_are_those_of_the_shape(method, problem)
    laws.sums_are_not_changed(method, problem)
    laws.kept_maps_help(method, problem, rows(60, method.folds))
    laws.nothing_is_added_where_nothing_lacks(method, problem_of(method, lacking=0.0), rows(5, 9)[0])


class Worse(QwT):
    def fit(self, problem):
        found = super().fit(problem)
        tensors = {name: -tensor for name, tensor in found.tensors.items()}
        return replace(found, tensors=tensors)


class Writes(QwT):
    def fit(self, problem):
        problem.folds[0]._xx.mul_(1.01)
        return super().fit(problem)


class Shapeless(QwT):
    def fit(self, problem):
        return Compensated(CompensationShape("full", WIDTH, WIDTH), {"bias": torch.zeros(WIDTH)})


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (Worse(structure="full"), lambda m: laws.kept_maps_help(m, problem_of(m), rows(60, 4))),
        (Writes(structure="full"), lambda m: laws.sums_are_not_changed(m, problem_of(m))),
        (Shapeless(), lambda m: laws.tensors_are_those_of_the_shape(m, problem_of(m))),
    ],
)
def test_a_law_fails_when_it_is_broken(method, law):
    with pytest.raises(AssertionError):
        law(method)
