"""Coordinate descent: a case by hand, against every possible matrix, and laws."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmend.linalg import coordinate_descent as module
from bitmend.linalg.coordinate_descent import judge, row_objectives, select_rows
from bitmend.numerics.granularity import PerChannel, PerGroup, PerTensor
from bitmend.numerics.observers import choose_qparams
from bitmend.numerics.qtensor import QParams, QTensor, QuantSpec, quantize
from bitmend.numerics.uniform import UniformGrid


def make(seed, rows=5, columns=12, bits=2, symmetric=True, group=-1, scale_dtype=torch.float32, correlation=3.0):
    """Return a target, a correlated H and the target rounded to nearest."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    H = mixing @ torch.diag(torch.logspace(0, -correlation, columns, dtype=torch.float64)) @ mixing.T
    H = (H + H.T) / 2 + 1e-3 * torch.eye(columns, dtype=torch.float64)
    spec = QuantSpec(
        UniformGrid(bits, symmetric), PerChannel() if group == -1 else PerGroup(group), scale_dtype=scale_dtype
    )
    return target, H, quantize(target, choose_qparams(target, spec), spec)


def descend_codes(qtensor, target, H, sweeps):
    """Also check that what it tells of its result is true."""
    found = module.descend_codes(judge(qtensor, target, H), target, H, sweeps)
    torch.testing.assert_close(found.objectives, row_objectives(found.qtensor, target, H), rtol=1e-9, atol=1e-12)
    return found.qtensor


def refit_scales(qtensor, target, H):
    found = module.refit_scales(judge(qtensor, target, H), target, H)
    told, true = found.objectives, row_objectives(found.qtensor, target, H)
    # f is told as a difference of numbers of the size of the target's own energy.
    energy = ((target.double() @ H) * target.double()).sum(1)
    assert ((told - true).abs() <= 1e-11 * (energy + true)).all()
    return found.qtensor


def total(qtensor, target, H):
    return float(row_objectives(qtensor, target, H).sum())


def test_by_hand():
    # T = (0.4, 0.4), H = (1 0.9; 0.9 1), levels -2, -1, 0, 1 of scale 1, start (0, 0).
    # E = (-0.4, -0.4), R = E H = (-0.76, -0.76). Column 0: nearest level to 0 + 0.76 is 1; R becomes (0.24, 0.14).
    # Column 1: nearest to 0 - 0.14 is 0. f falls from 0.4^2 (1 + 1 + 1.8) = 0.608 to
    # 0.6^2 + 0.4^2 - 2 * 0.9 * 0.6 * 0.4 = 0.088.
    spec = QuantSpec(UniformGrid(2, symmetric=True))
    start = QTensor(torch.zeros(1, 2, dtype=torch.int8), QParams(torch.ones(1, 1), None), spec)
    target, H = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    assert total(start, target, H) == pytest.approx(0.608)
    found = descend_codes(start, target, H, sweeps=1)
    assert found.codes.tolist() == [[1, 0]]
    assert total(found, target, H) == pytest.approx(0.088)
    # Best scale for the levels (1, 0): t H z / z H z = (0.4 + 0.36) / 1; f = 0.608 - 0.76^2 / 1 = 0.0304.
    refitted = refit_scales(found, target, H)
    assert refitted.qparams.scale.item() == pytest.approx(0.76)
    assert total(refitted, target, H) == pytest.approx(0.0304)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_between_brute_force_and_its_start(bits, symmetric):
    closed = []
    for seed in range(8):
        target, H, start = make(seed, rows=1, columns=6 if bits == 1 else 4, bits=bits, symmetric=symmetric)
        codes = range(start.spec.grid.min_code, start.spec.grid.max_code + 1)
        every = [
            replace(start, codes=torch.tensor([one], dtype=torch.int8))
            for one in itertools.product(codes, repeat=target.shape[1])
        ]
        best = min(total(one, target, H) for one in every)
        before, after = total(start, target, H), total(descend_codes(start, target, H, sweeps=10), target, H)
        assert best - 1e-9 <= after <= before
        closed.append((before - after) / (before - best) if before > best * (1 + 1e-9) else 1.0)
    assert sum(closed) / len(closed) > 0.5  # it does most of what can be done


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(1, 4),
    symmetric=st.booleans(),
    group=st.sampled_from([-1, 4, 5]),
    scale_dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_no_row_ever_gets_worse(seed, bits, symmetric, group, scale_dtype):
    columns = 10 if group == 5 else 12
    target, H, start = make(seed, 4, columns, bits, symmetric, group, scale_dtype)
    stages = [start]
    for _ in range(2):
        stages.append(descend_codes(stages[-1], target, H, sweeps=2))
        stages.append(refit_scales(stages[-1], target, H))
    rows = [row_objectives(stage, target, H) for stage in stages]
    for earlier, later in itertools.pairwise(rows):
        assert (later <= earlier).all()
    last = stages[-1]
    assert torch.equal(last.qparams.scale.to(scale_dtype).float(), last.qparams.scale)
    assert (last.qparams.scale > 0).all()
    assert last.codes.min() >= last.spec.grid.min_code
    assert last.codes.max() <= last.spec.grid.max_code


@pytest.mark.parametrize(("bits", "symmetric", "group"), [(2, True, -1), (3, False, 4), (1, True, -1)])
def test_where_it_stops_no_single_code_can_be_improved(bits, symmetric, group):
    target, H, start = make(3, bits=bits, symmetric=symmetric, group=group, columns=40)
    found = descend_codes(start, target, H, sweeps=100)
    assert not torch.equal(found.codes, start.codes)
    base = row_objectives(found, target, H)
    for column in range(target.shape[1]):
        for code in range(found.spec.grid.min_code, found.spec.grid.max_code + 1):
            codes = found.codes.clone()
            codes[:, column] = code
            changed = row_objectives(replace(found, codes=codes), target, H)
            assert (changed >= base * (1 - 1e-5)).all()  # float32 decides between nearly equal levels


@pytest.mark.parametrize("group", [-1, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_refitted_scales_are_the_least_squares_solution(group, symmetric):
    target, H, start = make(5, group=group, symmetric=symmetric, bits=3)
    found = refit_scales(start, target, H)
    root = torch.linalg.cholesky(H)  # f = |(q - t) root|^2
    zero_point = 0 if start.qparams.zero_point is None else start.qparams.zero_point
    size = 12 if group == -1 else group
    for row in range(len(target)):
        levels = start.codes.double()
        if symmetric is False:
            levels = levels - zero_point.double().repeat_interleave(size, 1)
        columns = torch.zeros(12, 12 // size, dtype=torch.float64)
        for g in range(12 // size):
            columns[g * size : (g + 1) * size, g] = levels[row, g * size : (g + 1) * size]
        best = torch.linalg.lstsq(root.T @ columns, root.T @ target[row].double()).solution
        torch.testing.assert_close(found.qparams.scale[row].double(), best, rtol=1e-5, atol=0)


def test_an_empty_group_keeps_its_scale():
    target, H, start = make(6, group=4, bits=3)
    codes = start.codes.clone()
    codes[:, 4:8] = 0
    start = replace(start, codes=codes)
    found = refit_scales(start, target, H)
    assert torch.equal(found.qparams.scale[:, 1], start.qparams.scale[:, 1])
    assert not torch.equal(found.qparams.scale[:, 0], start.qparams.scale[:, 0])


def test_a_row_whose_best_scale_is_not_positive_is_left_alone():
    target, H, start = make(7, rows=2)
    opposite = torch.stack([-target[0], target[1]])
    found = refit_scales(start, opposite, H)
    assert torch.equal(found.qparams.scale[0], start.qparams.scale[0])
    assert not torch.equal(found.qparams.scale[1], start.qparams.scale[1])


def hard_case(rows=128, columns=64, group=16, bits=4):
    """A few directions of the input have nearly all the energy, and scales are stored coarsely."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, columns, generator=generator, dtype=torch.float64)
    x += (
        300
        * torch.randn(400, 1, generator=generator, dtype=torch.float64)
        * torch.randn(1, columns, generator=generator, dtype=torch.float64)
    )
    H = x.T @ x / 400
    H += 0.01 * H.diagonal().mean() * 1e-4 * torch.eye(columns, dtype=torch.float64)
    target = torch.randn(rows, columns, generator=generator)
    spec = QuantSpec(UniformGrid(bits, symmetric=True), PerGroup(group), scale_dtype=torch.bfloat16)
    return target, H, quantize(target, choose_qparams(target, spec), spec)


def test_the_guard_keeps_rows_that_coarse_scales_would_make_worse(monkeypatch):
    target, H, start = hard_case()
    monkeypatch.setattr(module, "stored_scales", lambda scale, spec: 2 ** scale.log2().round())  # very coarse
    guarded = refit_scales(start, target, H)
    before, after = row_objectives(start, target, H), row_objectives(guarded, target, H)
    assert (after <= before).all()
    monkeypatch.setattr(module, "_better_rows", lambda old, new: new)
    unguarded = row_objectives(refit_scales(start, target, H), target, H)
    assert (unguarded > before).any()  # else this test shows nothing


def test_rounding_scales_one_by_one_beats_rounding_them_all_at_once():
    target, H, start = hard_case()
    joint = replace(start.spec, scale_dtype=torch.float32)
    exact = refit_scales(replace(start, spec=joint), target, H)
    rounded = exact.qparams.scale.bfloat16().float()
    at_once = replace(start, qparams=replace(start.qparams, scale=rounded))
    assert total(refit_scales(start, target, H), target, H) < 0.9 * total(at_once, target, H)


def test_each_row_takes_its_best_candidate():
    target, H, start = make(9, rows=6, bits=3)
    candidates = [
        quantize(target, QParams(start.qparams.scale * factor, None), start.spec) for factor in (1.0, 0.6, 1.5)
    ]
    every = torch.stack([row_objectives(one, target, H) for one in candidates])
    chosen = row_objectives(select_rows(candidates, every), target, H)
    assert torch.equal(chosen, every.min(0).values)
    assert len(set(every.argmin(0).tolist())) > 1


def test_one_scale_for_a_whole_matrix_is_refused():
    spec = QuantSpec(UniformGrid(2, symmetric=True), PerTensor())
    one = QTensor(torch.zeros(2, 3, dtype=torch.int8), QParams(torch.ones(1, 1), None), spec)
    with pytest.raises(ValueError, match="their scales must be per channel or per group"):
        judge(one, torch.zeros(2, 3), torch.eye(3, dtype=torch.float64))
