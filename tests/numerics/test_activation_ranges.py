from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmend.errors import NumericsError, RecipeError
from bitmend.numerics.activation_ranges import SAMPLE_LIMIT, RangeSample, choose_range
from bitmend.numerics.activations import ActivationSpec
from bitmend.numerics.log_sqrt2 import LogSqrt2Spec
from bitmend.numerics.twin_uniform import TwinGeluSpec, TwinSoftmaxSpec

SYMMETRIC, ASYMMETRIC = ActivationSpec(4, ranges=()), ActivationSpec(4, symmetric=False, ranges=())
OPEN = [SYMMETRIC, ASYMMETRIC, LogSqrt2Spec(4), TwinSoftmaxSpec(4, 0), TwinGeluSpec(4)]
OBSERVERS = ("minmax", "percentile", "mse")


def sample_of(*batches, limit=SAMPLE_LIMIT):
    sample = RangeSample(limit)
    for batch in batches:
        sample.add_(torch.as_tensor(batch))
    return sample


def drawn(seed, count=3000):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def squared_error(spec, values):
    return float((spec.round(values) - values).double().square().sum())


# ------------------------------------------------------------------------------------------------ the sample
def test_a_sample_by_hand():
    # At most four: of ten values first 0, 1, 2, 3 are kept; then the stride becomes sqrt(5) = 2.236 (places 0, 2, 4, 6, 8,
    # which are five) and then twice that (0, 4, 8).
    sample = sample_of([0.0, 1.0, 2.0, 3.0], limit=4)
    assert sample.values.tolist() == [0.0, 1.0, 2.0, 3.0]
    sample.add_(torch.tensor([[4.0, 5.0], [6.0, 7.0]]))  # eight are 0, 2, 4, 6
    assert sample.values.tolist() == [0.0, 2.0, 4.0, 6.0]
    sample.add_(torch.tensor([8.0, 9.0]).bfloat16())
    assert sample.values.tolist() == [0.0, 4.0, 8.0]
    assert sample.values.dtype == torch.float32
    assert (sample.count, sample.lowest, sample.highest) == (10, 0.0, 9.0)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 60), max_size=8), st.integers(1, 40))
def test_a_sample_does_not_depend_on_the_batches(sizes, limit):
    values = torch.arange(float(sum(sizes)))
    pieces = sample_of(*values.split(sizes), limit=limit) if sizes else sample_of(limit=limit)
    whole = sample_of(values, limit=limit)
    assert torch.equal(pieces.values, whole.values)
    assert pieces.count == len(values)
    assert len(pieces.values) <= limit
    assert len(pieces.values) >= min(len(values), limit // 3)  # of a full sample, at most sqrt(5) - 1 of sqrt(5) go
    if len(values):
        assert (pieces.lowest, pieces.highest) == (0.0, float(len(values) - 1))
        # Even: neighbours in the sample are equally far from each other, but for the rounding of places.
        gaps = pieces.values.diff()
        assert len(gaps) == 0 or float(gaps.max() - gaps.min()) <= 1


@pytest.mark.parametrize("width", [64, 192, 320, 384, 768, 1024])
def test_every_feature_is_seen_as_often_as_others(width):
    """A whole stride would see some features of all tokens, and others never."""
    features = torch.arange(float(width)).expand(5000, width)
    seen = torch.bincount(sample_of(*features.split(100), limit=20 * width).values.long(), minlength=width)
    assert int(seen.min()) >= 1
    assert int(seen.max()) <= 4 * int(seen.sum()) / width


def test_ends_are_exact_where_the_sample_misses_them():
    values = drawn(0, 10_000)
    values[[4321, 8765]] = torch.tensor([-50.0, 60.0])
    sample = sample_of(*values.split(999), limit=100)
    assert float(sample.values.abs().max()) < 10
    assert (sample.lowest, sample.highest) == (-50.0, 60.0)
    assert choose_range(sample, ASYMMETRIC, "minmax") == replace(ASYMMETRIC, lows=(-50.0,), ranges=(60.0,))


def test_a_sample_holds_no_batch():
    batch = torch.zeros(1000)
    sample = sample_of(batch, limit=10)
    batch += 1
    assert float(sample.values.sum()) == 0
    assert sample.values.untyped_storage().nbytes() <= 10 * 4


# ------------------------------------------------------------------------------------------------ by hand
def test_minmax_by_hand():
    sample = sample_of([-1.0, 0.5], [3.0, 0.25])
    assert choose_range(sample, SYMMETRIC, "minmax") == ActivationSpec(4, ranges=(3.0,))
    assert choose_range(sample, ASYMMETRIC, "minmax") == ActivationSpec(4, False, ranges=(3.0,), lows=(-1.0,))
    assert choose_range(sample, LogSqrt2Spec(4), "minmax") == LogSqrt2Spec(4, 3.0)
    assert choose_range(sample, TwinGeluSpec(3), "minmax") == TwinGeluSpec(3, 3.0)
    # The range always holds 0.
    above, below = sample_of([2.0, 3.0]), sample_of([-3.0, -2.0])
    assert choose_range(above, ASYMMETRIC, "minmax") == replace(ASYMMETRIC, lows=(0.0,), ranges=(3.0,))
    assert choose_range(below, ASYMMETRIC, "minmax") == replace(ASYMMETRIC, lows=(-3.0,), ranges=(0.0,))
    assert choose_range(below, SYMMETRIC, "minmax") == replace(SYMMETRIC, ranges=(3.0,))


def test_what_was_there_before_is_replaced_and_the_rest_stays():
    sample = sample_of([-1.0, 3.0])
    before = ActivationSpec(6, False, -1, 0.9, 16, (7.0,), (-7.0,))
    assert choose_range(sample, before, "minmax") == ActivationSpec(6, False, -1, 0.9, 16, (3.0,), (-1.0,))
    assert choose_range(sample, ActivationSpec(4), "minmax") == ActivationSpec(4, ranges=(3.0,))  # becomes static
    assert choose_range(sample, LogSqrt2Spec(5, 7.0), "minmax") == LogSqrt2Spec(5, 3.0)
    with pytest.raises(RecipeError, match="static ranges need a grid without groups"):
        choose_range(sample, ActivationSpec(4, group_size=8), "minmax")


def test_a_split_by_hand():
    # Two bits: half the split, and 1. Of 1/2, 1/4, 1/8, ... 1/8 is the level of the split at 1/4.
    assert choose_range(sample_of([0.125] * 5 + [1.0]), TwinSoftmaxSpec(2, 0), "minmax") == TwinSoftmaxSpec(2, 2)
    assert choose_range(sample_of([2.0**-20, 1.0]), TwinSoftmaxSpec(2, 0), "mse") == TwinSoftmaxSpec(2, 19)


def test_a_lone_outlier_is_clipped_by_percentile_and_mse():
    values = torch.cat([drawn(0, 50_000), torch.tensor([80.0])])
    sample = sample_of(values)
    plain, percentile, mse = (choose_range(sample, SYMMETRIC, observer).ranges[0] for observer in OBSERVERS)
    assert plain == 80
    assert percentile < 8
    assert mse < 0.75 * plain


# ------------------------------------------------------------------------------------------------ references
def reference_candidates(values, low, high, observer):
    """Ends as the papers have them, in float64 by numpy."""
    if observer == "minmax":
        return [(low, high)]
    if observer == "mse":
        return [(low * (1 - step * 0.01), high * (1 - step * 0.01)) for step in range(90)]
    pairs = [np.quantile(values.astype(np.float64), (1 - share, share)) for share in (0.999, 0.9999, 0.99999)]
    return [(min(float(below), 0), max(float(above), 0)) for below, above in pairs]


@pytest.mark.parametrize(
    ("observer", "seed", "shift", "bits"),
    [
        ("minmax", 0, 0.0, 4),
        ("percentile", 1, 0.0, 4),
        ("percentile", 2, 5.0, 2),
        ("percentile", 3, -5.0, 8),
        ("mse", 4, 0.0, 3),
        ("mse", 5, -5.0, 4),
    ],
)
def test_the_range_with_the_least_error_of_all_is_found(observer, seed, shift, bits):
    values = drawn(seed, 400) ** 3 + shift
    sample = sample_of(*values.split(150))
    low, high = min(float(values.min()), 0), max(float(values.max()), 0)
    ends = reference_candidates(values.numpy(), low, high, observer)
    makers = {
        ActivationSpec(bits): lambda low, high: ActivationSpec(bits, ranges=(max(-low, high),)),
        ActivationSpec(bits, False): lambda low, high: ActivationSpec(bits, False, ranges=(high,), lows=(low,)),
    }
    if high > 0:
        makers[LogSqrt2Spec(bits)] = lambda low, high: LogSqrt2Spec(bits, high)
        makers[TwinGeluSpec(bits)] = lambda low, high: TwinGeluSpec(bits, high)
    for spec, make in makers.items():
        errors = [squared_error(make(*pair), values) for pair in ends]
        found = choose_range(sample, spec, observer)
        assert squared_error(found, values) == pytest.approx(min(errors), rel=1e-5)


@settings(max_examples=20)
@given(seed=st.integers(0, 100), bits=st.integers(2, 8), sharpness=st.sampled_from([0.5, 2.0, 8.0]))
def test_the_split_with_the_least_error_of_all_is_found(seed, bits, sharpness):
    values = (drawn(seed, 400).view(20, 20) * sharpness).softmax(-1)
    errors = [squared_error(TwinSoftmaxSpec(bits, exponent), values) for exponent in range(20)]
    found = choose_range(sample_of(values), TwinSoftmaxSpec(bits, 0), "percentile")
    assert squared_error(found, values) == min(errors)


@pytest.mark.parametrize("spec", OPEN, ids=lambda spec: type(spec).__name__ + str(getattr(spec, "symmetric", "")))
@pytest.mark.parametrize("observer", OBSERVERS)
def test_nothing_reaches_beyond_the_ends(spec, observer):
    values = drawn(3).abs() ** 2 - 0.1
    found = choose_range(sample_of(values), spec, observer)
    if isinstance(found, ActivationSpec):
        assert 0 < found.ranges[0] <= float(values.abs().max())
        assert found.lows is None or float(values.min()) <= found.lows[0] <= 0
    elif not isinstance(found, TwinSoftmaxSpec):
        assert 0 < found.range <= float(values.max())


def test_mse_is_no_worse_than_minmax_and_takes_the_wider_of_equals():
    values = drawn(1)
    sample = sample_of(values)
    for spec in OPEN:
        errors = [squared_error(choose_range(sample, spec, observer), values) for observer in ("mse", "minmax")]
        assert errors[0] <= errors[1]
    # 0 and 1 are levels whichever the split.
    assert choose_range(sample_of([0.0, 1.0]), TwinSoftmaxSpec(4, 7), "mse") == TwinSoftmaxSpec(4, 0)


# ------------------------------------------------------------------------------------------------ odd samples
@pytest.mark.parametrize("spec", OPEN, ids=lambda spec: type(spec).__name__ + str(getattr(spec, "symmetric", "")))
@pytest.mark.parametrize("observer", OBSERVERS)
def test_there_may_be_nothing_to_go_by(spec, observer):
    assert choose_range(sample_of(), spec, observer) is None
    assert choose_range(sample_of(torch.empty(0, 4)), spec, observer) is None
    assert choose_range(sample_of(torch.zeros(5), -torch.zeros(5)), spec, observer) is None
    below = choose_range(sample_of([-1.0, -2.0]), spec, observer)
    assert (below is not None) == isinstance(spec, ActivationSpec)
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(NumericsError, match="must be chosen from finite values"):
            choose_range(sample_of([1.0, 2.0], [bad], [3.0]), spec, observer)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_one_value_is_enough(observer):
    # As all of the range it is a level, so that no smaller one can have a smaller error.
    assert choose_range(sample_of([3.0]), ASYMMETRIC, observer) == replace(ASYMMETRIC, lows=(0.0,), ranges=(3.0,))


def test_where_all_quantiles_are_zero_the_ends_are_taken():
    values = torch.zeros(150_000)
    values[77] = 3.0
    sample = sample_of(values)
    assert choose_range(sample, ASYMMETRIC, "percentile") == replace(ASYMMETRIC, lows=(0.0,), ranges=(3.0,))
    assert choose_range(sample, LogSqrt2Spec(4), "percentile") == LogSqrt2Spec(4, 3.0)
    values[78] = -1.0  # which leaves no quantile above 0 either
    assert choose_range(sample_of(values), TwinGeluSpec(4), "percentile") == TwinGeluSpec(4, 3.0)


def test_huge_values_have_a_range():
    found = choose_range(sample_of([3e38, 3e38, -1e38]), SYMMETRIC, "mse")
    assert found.ranges[0] == pytest.approx(3e38)
