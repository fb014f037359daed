from types import SimpleNamespace

import pytest
import torch

from bitmend.linalg.cholesky import factor_inverse
from bitmend.linalg.column_sweep import Residual, UniformRounder, column_sweep
from bitmend.numerics.granularity import PerChannel, PerGroup
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec
from bitmend.numerics.uniform import UniformGrid

ROWS, COLUMNS = 7, 24


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    G = (x.T @ x / 200).double()
    W = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    spec = QuantSpec(UniformGrid(3, symmetric=True), PerGroup(8))
    P = 0.05 * torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64).triu(1)
    return SimpleNamespace(
        W=W, spec=spec, qparams=choose_qparams(W.float(), spec), G=G, factor=factor_inverse(G, 0.01, "diagonal"), P=P
    )


def sweep(case, weight, qparams, residual=None, **options):
    rounder = UniformRounder(qparams, case.spec, tuple(weight.shape), weight.dtype)
    column_sweep(weight, case.factor, rounder, () if residual is None else (residual,), **options)
    return rounder.codes()


@pytest.mark.parametrize("leaf", [1, 5, 8, 24, 100])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_cut_into_leaves_changes_nothing(case, leaf, with_residual):
    residual = Residual(case.P, torch.full((ROWS,), 0.7, dtype=torch.float64)) if with_residual else None
    assert torch.equal(
        sweep(case, case.W, case.qparams, residual), sweep(case, case.W, case.qparams, residual, leaf_columns=leaf)
    )


def test_stacked_candidates_equal_separate_sweeps(case):
    strengths = [0.0, 0.25, 1.0]
    stacked = sweep(
        case,
        case.W.repeat(3, 1),
        QParams(case.qparams.scale.repeat(3, 1), None),
        Residual(case.P, torch.tensor(strengths, dtype=torch.float64).repeat_interleave(ROWS)),
    )
    for position, strength in enumerate(strengths):
        alone = sweep(case, case.W, case.qparams, Residual(case.P, torch.full((ROWS,), strength, dtype=torch.float64)))
        assert torch.equal(stacked[position * ROWS : (position + 1) * ROWS], alone)


def test_strength_zero_is_no_residual(case):
    nothing = Residual(case.P, torch.zeros(ROWS, dtype=torch.float64))
    assert torch.equal(sweep(case, case.W, case.qparams, nothing), sweep(case, case.W, case.qparams))


def test_a_strong_residual_does_something(case):
    everything = Residual(case.P, torch.ones(ROWS, dtype=torch.float64))
    assert not torch.equal(sweep(case, case.W, case.qparams, everything), sweep(case, case.W, case.qparams))


def test_the_weight_is_not_changed(case):
    before = case.W.clone()
    sweep(case, case.W, case.qparams)
    assert torch.equal(before, case.W)


def test_the_error_it_tells_is_that_of_each_row(case):
    rounder = UniformRounder(case.qparams, case.spec, (ROWS, COLUMNS), case.W.dtype)
    told = column_sweep(case.W, case.factor, rounder)
    E = QTensor(rounder.codes(), case.qparams, case.spec).dequantize(torch.float64) - case.W
    torch.testing.assert_close(told, ((E @ case.factor.damped(case.G)) * E).sum(1), rtol=1e-5, atol=0)


def test_one_column():
    spec = QuantSpec(UniformGrid(2, symmetric=True), PerChannel())
    W = torch.tensor([[0.4], [-3.0]])
    qparams = QParams(torch.ones(2, 1), None)
    rounder = UniformRounder(qparams, spec, (2, 1), W.dtype)
    column_sweep(W, factor_inverse(torch.ones(1, 1, dtype=torch.float64), 0.01, "natural"), rounder)
    assert rounder.codes().tolist() == [[0], [-2]]
