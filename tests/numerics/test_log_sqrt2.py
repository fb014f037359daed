import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.errors import RecipeError
from bitmend.numerics.activations import ActivationRounding
from bitmend.numerics.log_sqrt2 import LogSqrt2Spec
from bitmend.online import AttentionScheme

specs = st.builds(LogSqrt2Spec, st.integers(2, 8), st.floats(2.0**-8, 2.0**8, width=32))
seeds = st.integers(0, 1000)


def spread(seed, largest, rows=40):
    """Values from far below the smallest level of few bits to above the range, in order, a zero among them."""
    exponents = torch.rand(1, rows, generator=torch.Generator().manual_seed(seed)) * 24 - 23
    values = (torch.exp2(exponents) * largest).sort(dim=-1).values
    values[0, 0] = 0
    return values


def test_by_hand():
    # Two bits, delta 1: levels 1, 0.70711, 0.5, and 0. With -2 log2 x: 0.8 -> 0.644, 1; 0.55 -> 1.725, 2; 0.43 -> 2.435, 2;
    # 0.42 -> 2.503, 3, which is the code of zero. 1.7 -> -1.531, and goes to the end.
    values = torch.tensor([1.7, 1.0, 0.8, 0.55, 0.43, 0.42, 0.0])
    root = 2**-0.5
    wanted = torch.tensor([1.0, 1.0, root, 0.5, 0.5, 0.0, 0.0])
    assert torch.allclose(LogSqrt2Spec(2, 1.0).round(values), wanted, rtol=1e-6, atol=0)
    # Three bits go on to 2^-3 = 0.125; a range of 4 is four times all that.
    assert float(LogSqrt2Spec(3, 1.0).round(torch.tensor([0.12]))) == pytest.approx(2**-3)
    assert torch.allclose(LogSqrt2Spec(2, 4.0).round(4 * values), 4 * wanted, rtol=1e-6, atol=0)


@given(specs, seeds)
def test_as_the_formula_in_float64(spec, seed):
    values = spread(seed, spec.range)
    wanted, sure = [], []
    for value in values[0].double().numpy():
        code = np.inf if value == 0 else -2 * np.log2(value / spec.range)
        rounded = max(np.round(code), 0)
        wanted.append(0.0 if rounded >= 2**spec.bits - 1 else spec.range * 2 ** (-rounded / 2))
        sure.append(not bool(abs(code % 1 - 0.5) < 1e-4))  # float32 decides ties as it will
    sure = torch.tensor(sure)
    found = spec.round(values)[0]
    assert torch.allclose(found[sure], torch.tensor(wanted, dtype=torch.float32)[sure], rtol=1e-6, atol=0)


@given(specs, seeds)
def test_laws(spec, seed):
    values = spread(seed, spec.range)
    rounded = spec.round(values)
    assert torch.equal(spec.round(rounded), rounded)
    assert bool((rounded.diff(dim=-1) >= 0).all())
    assert rounded[0, 0] == 0
    # A quarter of an octave is the furthest that a level may be, above the smallest.
    smallest = spec.range * 2 ** (-(2**spec.bits - 2) / 2)
    covered = (values >= smallest) & (values <= spec.range)
    assert bool((torch.log2(rounded[covered] / values[covered]).abs() <= 0.2501).all())
    assert bool(((rounded == 0) | (rounded >= smallest * 0.9999)).all())


@given(st.integers(2, 8), st.floats(2.0**-8, 2.0**8, width=32))
def test_there_are_as_many_levels_as_codes(bits, largest):
    levels = torch.tensor([largest]) * torch.exp2(-torch.arange(2**bits - 1) / 2)
    spec = LogSqrt2Spec(bits, largest)
    assert torch.equal(spec.round(levels), levels)
    dense = torch.exp2(torch.linspace(-(2.0 ** (bits - 1)) - 2, 1, 5000)) * largest
    assert len(spec.round(dense).unique()) == 2**bits


def test_a_range_that_is_not_known_yet_is_the_largest_of_what_comes():
    values = torch.rand(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LogSqrt2Spec(4).round(values), LogSqrt2Spec(4, float(values.max())).round(values))
    assert torch.equal(LogSqrt2Spec(4).round(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_what_is_not_finite_is_seen_and_negative_values_are_zero():
    for spec in (LogSqrt2Spec(4, 1.0), LogSqrt2Spec(4)):
        rounded = spec.round(torch.tensor([0.5, float("nan")]))
        assert bool(rounded[1].isnan())
        assert bool(spec.round(torch.tensor([0.5, float("inf")]))[1].isnan())
    rounded = LogSqrt2Spec(4, 1.0).round(torch.tensor([-0.5, 0.5, float("-inf")]))
    assert rounded.nan_to_num(7).tolist() == [0.0, 0.5, 7.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_computed_in_float32(dtype):
    values = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = LogSqrt2Spec(4, 1.0).round(values)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, LogSqrt2Spec(4, 1.0).round(values.float()).to(dtype))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bits": 1}, "activation bits must be a whole number from 2 to 8; got 1"),
        ({"bits": 9}, "activation bits must be a whole number from 2 to 8; got 9"),
        ({"bits": 4, "range": 0.0}, r"the range of activations must be positive and finite; got 0\.0"),
        ({"bits": 4, "range": float("nan")}, "must be positive and finite; got nan"),
        ({"bits": 4, "range": 1e300}, "must be positive and finite"),
    ],
)
def test_impossible_grids_are_refused(keys, message):
    with pytest.raises(RecipeError, match=message):
        LogSqrt2Spec(**keys)


def test_attention_takes_it():
    spec = LogSqrt2Spec(4, 1.0)
    assert isinstance(spec, ActivationRounding)
    assert AttentionScheme(probabilities=spec).steps() == [
        "probabilities of 4 bits, in steps of a factor of sqrt(2), one range for all tokens"
    ]
