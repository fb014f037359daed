from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.errors import RecipeError
from bitmend.numerics import observers
from bitmend.numerics.granularity import PerChannel, PerGroup, PerTensor
from bitmend.numerics.observers import MSE_POWER, choose_qparams
from bitmend.numerics.qtensor import QParams, QuantSpec, quantize
from bitmend.numerics.uniform import UniformGrid
from bitmend.testing.laws.strategies import matrices, specs


def spec(bits=4, *, symmetric=True, granularity=None, observer="minmax", dtype=torch.float32):
    return QuantSpec(UniformGrid(bits, symmetric), granularity or PerChannel(), observer, dtype)


def test_minmax_by_hand():
    weight = torch.tensor([[-1.5, 0.5, 0.0], [0.0, 3.0, 1.0]])
    symmetric = choose_qparams(weight, spec(2))
    assert symmetric.scale.tolist() == [[1.0], [2.0]]
    asymmetric = choose_qparams(weight, spec(2, symmetric=False))
    assert torch.allclose(asymmetric.scale, torch.tensor([[2 / 3], [1.0]]))
    assert asymmetric.zero_point.tolist() == [[0.0], [-2.0]]


def test_one_sign_bit_takes_the_best_scale_for_squares_nearly():
    # For -s, +s and an exponent of 2 the best s is mean |w|; the 80-step search with exponent 2.4 lands above it, below max.
    weight = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    scale = float(choose_qparams(weight, spec(1, observer="mse")).scale)
    assert float(weight.abs().mean()) < scale < 1.5 * float(weight.abs().mean())


@given(weight=matrices(), data=st.data())
def test_mse_is_never_worse_than_minmax_in_its_own_measure(weight, data):
    chosen = replace(data.draw(specs(weight.shape[1])), observer="mse")
    plain = replace(chosen, observer="minmax")
    errors = [
        (quantize(weight, choose_qparams(weight, s), s).dequantize() - weight).abs().double().pow(MSE_POWER).sum()
        for s in (chosen, plain)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [32, 128, 1024])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one outlier", "few levels"])
def test_ranked_steps_give_what_all_steps_give(bits, size, kind, monkeypatch):
    generator = torch.Generator().manual_seed(bits + size)
    weight = torch.randn(64, 4096, generator=generator)
    if kind == "heavy tails":
        weight *= torch.randn(64, 4096, generator=generator).exp()
    elif kind == "one outlier":
        weight[:, ::size] = 50.0
    elif kind == "few levels":
        weight = weight.mul(2).round()
    weight[3] = 0.0
    wanted = spec(bits, granularity=PerGroup(size), observer="mse", dtype=torch.bfloat16)
    ranked = choose_qparams(weight, wanted).scale
    monkeypatch.setattr(observers, "RANKED_BITS", 0)
    everything = choose_qparams(weight, wanted).scale
    assert (ranked != everything).float().mean() < 1e-3
    groups = weight.view(64, -1, size)
    errors = [observers._rounding_error(groups, QParams(s, None), wanted.grid) for s in (ranked, everything)]
    assert torch.all(errors[0] <= errors[1] * 1.01)


def test_mse_clips_a_lone_outlier():
    weight = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 8.0
    plain, searched = (choose_qparams(weight, spec(3, observer=name)).scale for name in ("minmax", "mse"))
    assert float(searched) < 0.8 * float(plain)


def test_percentile_ignores_a_lone_outlier():
    weight = torch.randn(1, 10_000, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 100.0
    plain, cut = (choose_qparams(weight, spec(4, observer=name)).scale for name in ("minmax", "percentile"))
    assert float(plain) == pytest.approx(100 / 7.5)
    assert float(cut) < 0.05 * float(plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_exact_in_their_type(dtype):
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    scale = choose_qparams(weight, spec(dtype=dtype, granularity=PerGroup(4), observer="mse")).scale
    assert scale.shape == (5, 3)
    assert torch.equal(scale.to(dtype).float(), scale)


def test_a_scale_too_small_for_its_type_becomes_the_smallest_normal_number():
    weight = torch.full((1, 4), 1e-12)
    assert float(choose_qparams(weight, spec(dtype=torch.float16)).scale) == pytest.approx(2.0**-14)


def test_an_all_zero_row_comes_back_as_zeros():
    weight = torch.zeros(2, 4)
    for symmetric in (True, False):
        for observer in ("minmax", "percentile", "mse"):
            s = spec(3, symmetric=symmetric, observer=observer)
            assert torch.equal(quantize(weight, choose_qparams(weight, s), s).dequantize(), weight)


def test_per_tensor_and_ragged_groups():
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    assert choose_qparams(weight, spec(granularity=PerTensor())).scale.shape == (1, 1)
    ragged = choose_qparams(weight, spec(granularity=PerGroup(4, ragged=True)))
    assert ragged.scale.shape == (3, 2)
    assert torch.equal(ragged.scale[:, 1:], choose_qparams(weight[:, 4:], spec()).scale)
    with pytest.raises(RecipeError, match="whose divisors are 1, 7"):
        choose_qparams(weight, spec(granularity=PerGroup(4)))


def test_the_answer_does_not_depend_on_how_many_rows_are_searched_at_a_time(monkeypatch):
    weight = torch.randn(9, 8, generator=torch.Generator().manual_seed(3))
    s = spec(3, symmetric=False, observer="mse", granularity=PerGroup(4))
    whole = choose_qparams(weight, s)
    monkeypatch.setattr(observers, "CHUNK_ENTRIES", 16)
    pieces = choose_qparams(weight, s)
    assert torch.equal(whole.scale, pieces.scale)
    assert torch.equal(whole.zero_point, pieces.zero_point)


@pytest.mark.parametrize(("bits", "outlier", "share"), [(1, 10.0, 0.45), (2, 20.0, 0.45)])
def test_few_bits_do_not_follow_a_lone_outlier(bits, outlier, share):
    weight = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = outlier
    s = spec(bits, observer="mse")
    error = (quantize(weight, choose_qparams(weight, s), s).dequantize() - weight)[0, 1:].square().mean()
    assert float(error) < share  # 2.1 and 0.65 when the range may not shrink below a fifth of the outlier


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_ranges_that_are_skipped_would_not_have_won(bits, symmetric, monkeypatch):
    """The bound by the largest entry alone leaves the answer of the full search, with fewer entries looked at."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(40, 64, generator=generator)
    weight[:8] **= 3  # heavy tails: small ranges win
    weight[8:12] = 0
    weight[12:16] = 0.25
    specs = [QuantSpec(UniformGrid(bits, symmetric), granularity) for granularity in (PerChannel(), PerGroup(16))]
    original, looked_at = observers._rounding_error, {"with": 0, "without": 0}

    def with_bound(groups, qparams, grid, *, largest=False):
        looked_at["with"] += 0 if largest else groups.numel()
        return original(groups, qparams, grid, largest=largest)

    def without_bound(groups, qparams, grid, *, largest=False):
        if largest:
            return torch.full_like(qparams.scale, -1.0)
        looked_at["without"] += groups.numel()
        return original(groups, qparams, grid)

    monkeypatch.setattr(observers, "_rounding_error", with_bound)
    found = [choose_qparams(weight, spec) for spec in specs]
    monkeypatch.setattr(observers, "_rounding_error", without_bound)
    for spec, one in zip(specs, found, strict=True):
        full = choose_qparams(weight, spec)
        assert torch.equal(one.scale, full.scale)
        if one.zero_point is not None:
            assert torch.equal(one.zero_point, full.zero_point)
    assert looked_at["with"] < (1.0 if bits < 3 else 0.9) * looked_at["without"]
