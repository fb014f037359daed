"""Every registered transform obeys every law on every family that it takes, unasked."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from bitmend.errors import ModelError
from bitmend.models.hf_causal_lm import HfCausalLm
from bitmend.protocols import TRANSFORMS, TokenBatch, Transformed
from bitmend.testing.laws.transform import TRANSFORM_LAWS, applying_is_repeatable, exact_keeps_the_function

BATCH = TokenBatch(torch.arange(3, 27).view(2, 12))
# Norms that stand behind what is added to the residual stream do not let a rotation of it pass; and in opt-projected the
# residual stream itself is read by layers.
NOT_ROTATED = {"gemma2", "gemma3", "opt-projected"}
REFUSED = {
    "quarot": NOT_ROTATED,
    "spinquant": NOT_ROTATED,
    "smooth": {"opt-projected"},
    "repq": {"opt-projected"},
}


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    known = {}

    def folder(family):
        if family not in known:
            known[family] = tiny.save(tmp_path_factory.mktemp("models") / family, tiny.build(family))
        return known[family]

    return folder


# Transforms that take seconds a block, and mixtures of experts: on one family of a kind in `make test`, on all in
# `make test-slow`.
SLOW = {"duquant", "spinquant"}  # before it has learned anything, spinquant is quarot
OF_EACH_KIND = {"llama", "gpt2", "qwen2-moe"}


def _is_slow(name, family, tiny):
    return family not in OF_EACH_KIND and (name in SLOW or family in tiny.EXPERT_FAMILIES)


def pytest_generate_tests(metafunc):
    if "any_family" in metafunc.fixturenames:
        tiny = __import__("sys").modules["bitmend_test_families"]
        cases = [
            pytest.param(
                entry.name,
                family,
                marks=[pytest.mark.slow] if _is_slow(entry.name, family, tiny) else [],
            )
            for entry in TRANSFORMS
            for family in (*tiny.FAMILIES, *tiny.EXPERT_FAMILIES)
        ]
        metafunc.parametrize(("name", "any_family"), cases)


@pytest.mark.parametrize("law", TRANSFORM_LAWS, ids=lambda law: law.__name__)
def test_transform(folders, name, law, any_family):
    def opened():
        return HfCausalLm.open(folders(any_family), dtype=torch.float64)

    if any_family in REFUSED.get(name, ()):
        with pytest.raises(ModelError, match=r"set residual = false|wired in a way"):
            law(TRANSFORMS[name](), opened, BATCH)
    else:
        law(TRANSFORMS[name](), opened, BATCH)


@dataclass(frozen=True)
class Shrinks:
    """A wrong transform: says that it is exact, and makes one layer smaller."""

    exact: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = False

    def apply_(self, block, wiring, streams):
        site = block.sites[-1]
        site.store_(block.module, site.weight(block.module) * (1 - 1e-3))
        return Transformed()


@dataclass(frozen=True)
class Draws:
    """A wrong transform: another one each time."""

    exact: ClassVar[bool] = True
    needs_rows: ClassVar[bool] = False

    def apply_(self, block, wiring, streams):
        site = block.sites[-1]
        site.store_(block.module, site.weight(block.module) * (1 + 1e-12 * float(torch.rand(()))))
        return Transformed()


def test_the_laws_find_wrong_transforms(folders, monkeypatch):
    def opened():
        return HfCausalLm.open(folders("llama"), dtype=torch.float64)

    monkeypatch.setattr(
        "bitmend.pipeline.transforming.SLACK", {torch.float64: 1.0}
    )  # the engine would refuse it itself
    with pytest.raises(AssertionError):
        exact_keeps_the_function(Shrinks(), opened, BATCH)
    with pytest.raises(AssertionError):
        applying_is_repeatable(Draws(), opened, BATCH)
