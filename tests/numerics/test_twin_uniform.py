import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.errors import RecipeError
from bitmend.numerics.activations import ActivationRounding
from bitmend.numerics.twin_uniform import TwinGeluSpec, TwinSoftmaxSpec

softmax_specs = st.builds(TwinSoftmaxSpec, st.integers(2, 8), st.integers(0, 19))
gelu_specs = st.builds(TwinGeluSpec, st.integers(2, 8), st.floats(0.125, 64, width=32))
seeds = st.integers(0, 1000)


def softmax_levels(bits, exponent):
    """All levels in float64, as the paper has them: two ranges of 2^(bits - 1) codes, the upper one from the split on."""
    half, split = 2 ** (bits - 1), 2.0**-exponent
    low = [code * split / half for code in range(half)]
    high = [code / (half - 1) for code in range(half) if code / (half - 1) >= split]
    return torch.tensor(low + high, dtype=torch.float64)


def gelu_levels(bits, largest):
    half = 2 ** (bits - 1)
    low = [-code * 0.16997 / half for code in range(1, half + 1)]
    high = [code * largest / (half - 1) for code in range(half)]
    return torch.tensor(low + high, dtype=torch.float64)


def in_order(values):
    values = values.sort(dim=-1).values
    values[0, 0] = 0
    return values.sort(dim=-1).values


def probabilities(seed, rows=60):
    """Small and large ones alike, from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(1, rows, generator=generator) * -24
    return in_order(torch.cat([torch.exp2(exponents), torch.rand(1, rows, generator=generator)], dim=-1))


def distances(values, levels):
    return (values.double().unsqueeze(-1) - levels).abs().amin(-1)


def check_laws(spec, values, levels, largest):
    rounded = spec.round(values)
    assert torch.allclose((values.double() - rounded).abs(), distances(values, levels), rtol=0, atol=1e-6 * largest)
    assert torch.equal(spec.round(rounded), rounded)
    assert bool((rounded.diff(dim=-1) >= 0).all())
    assert len(rounded.unique()) <= len(levels) <= 2**spec.bits
    assert bool((distances(rounded, levels) <= 1e-6 * largest).all())
    assert bool((rounded[values == 0] == 0).all())
    on_levels = levels.float().unsqueeze(0)
    assert torch.allclose(spec.round(on_levels), on_levels, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ softmax
def test_softmax_by_hand():
    # Three bits, split at 1/4: 0, 1/16, 2/16, 3/16 in fine steps; of 0, 1/3, 2/3, 1 those from the split on.
    spec = TwinSoftmaxSpec(3, 2)
    # 0.09 is 1.44 fine steps; 0.17 is 2.72. Between 3/16 and 1/3 the middle is 0.2604. 0.4 is 1.2 coarse steps, 0.51 1.53.
    values = torch.tensor([0.09, 0.17, 0.26, 0.261, 0.4, 0.51, 1.0, 0.0])
    wanted = torch.tensor([1 / 16, 3 / 16, 3 / 16, 1 / 3, 1 / 3, 2 / 3, 1.0, 0.0])
    assert torch.equal(spec.round(values), wanted)
    # What lies outside goes to the ends.
    assert spec.round(torch.tensor([-0.1, 1.2])).tolist() == [0.0, 1.0]
    # Two bits: 0 and half the split, and 1.
    assert TwinSoftmaxSpec(2, 1).round(torch.tensor([0.1, 0.2, 0.6, 0.7])).tolist() == [0.0, 0.25, 0.25, 1.0]


@given(softmax_specs, seeds)
def test_laws_of_softmax(spec, seed):
    check_laws(spec, probabilities(seed), softmax_levels(spec.bits, spec.split_exponent), 1.0)


@given(softmax_specs, seeds)
def test_no_probability_moves_further_than_half_a_step_of_its_range(spec, seed):
    values = probabilities(seed)
    moved = (values.double() - spec.round(values)).abs()
    half, split = 2 ** (spec.bits - 1), 2.0**-spec.split_exponent
    last = split - split / half
    assert bool((moved[values <= last] <= 0.5001 * split / half).all())
    levels = softmax_levels(spec.bits, spec.split_exponent)
    first = float(levels[levels >= split].min())
    assert bool((moved[values >= first] <= 0.5001 / (half - 1)).all())
    between = (values > last) & (values < first)
    assert bool((moved[between] <= 0.5001 * (first - last)).all())


def test_above_the_split_the_lower_range_is_not_added():
    # In two clipped parts that are added, 1 would come out as 1 + 1/4.
    assert float(TwinSoftmaxSpec(4, 2).round(torch.ones(1))) == 1.0


def test_a_split_below_the_steps_of_the_upper_range_makes_no_zeros():
    # Eight bits, split at 2^-10: the coarse step is 1 / 127, and 0.003 is 0.38 of it; the last fine level is nearer to it.
    rounded = float(TwinSoftmaxSpec(8, 10).round(torch.tensor([0.003])))
    assert rounded == pytest.approx(127 / 128 * 2**-10)


# ------------------------------------------------------------------------------------------------ GELU
def test_gelu_by_hand():
    # Three bits, up to 3: steps of 1 above 0; four steps of 0.0424925 below it, the last at -0.16997.
    spec = TwinGeluSpec(3, 3.0)
    values = torch.tensor([5.0, 2.6, 0.4, 0.0, -0.02, -0.03, -0.16, -0.5])
    wanted = torch.tensor([3.0, 3.0, 0.0, 0.0, 0.0, -0.0424925, -0.16997, -0.16997])
    assert torch.allclose(spec.round(values), wanted, rtol=1e-6, atol=0)
    # Two bits: 0 and the range, half of the depth and all of it.
    assert torch.allclose(
        TwinGeluSpec(2, 3.0).round(torch.tensor([1.4, 1.6, -0.05, -0.15])),
        torch.tensor([0.0, 3.0, -0.084985, -0.16997]),
        rtol=1e-6,
        atol=0,
    )


@given(gelu_specs, seeds)
def test_laws_of_gelu(spec, seed):
    generator = torch.Generator().manual_seed(seed)
    values = in_order(torch.nn.functional.gelu(torch.randn(1, 80, generator=generator) * spec.range / 2))
    check_laws(spec, values, gelu_levels(spec.bits, spec.range), max(spec.range, 1))
    moved = (values.double() - spec.round(values)).abs()
    half = 2 ** (spec.bits - 1)
    inside = (values >= 0) & (values <= spec.range)
    assert bool((moved[inside] <= 0.5001 * spec.range / (half - 1)).all())
    below = (values < 0) & (values >= -0.16997)
    assert bool((moved[below] <= 0.5001 * 0.16997 / half).all())


def test_gelu_never_falls_below_its_depth():
    values = torch.nn.functional.gelu(torch.linspace(-0.76, -0.74, 2001, dtype=torch.float64))
    assert float(values.min()) == pytest.approx(-0.16997, abs=5e-6)


def test_a_range_that_is_not_known_yet_is_the_largest_of_what_comes():
    values = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(TwinGeluSpec(4).round(values), TwinGeluSpec(4, float(values.max())).round(values))
    assert torch.equal(TwinGeluSpec(4).round(torch.zeros(2, 3)), torch.zeros(2, 3))
    # Nothing above 0: the other side is as it always is.
    assert torch.equal(TwinGeluSpec(4).round(-values.abs()), TwinGeluSpec(4, 1.0).round(-values.abs()))


# ------------------------------------------------------------------------------------------------ both
@pytest.mark.parametrize("spec", [TwinSoftmaxSpec(4, 3), TwinGeluSpec(4, 1.0), TwinGeluSpec(4)], ids=str)
def test_what_is_not_finite_is_seen(spec):
    assert isinstance(spec, ActivationRounding)
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert bool(spec.round(torch.tensor([0.5, bad]))[1].isnan())


@pytest.mark.parametrize("spec", [TwinSoftmaxSpec(4, 3), TwinGeluSpec(4, 1.0)], ids=str)
def test_dtype_is_kept_and_computed_in_float32(spec):
    values = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = spec.round(values)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, spec.round(values.float()).bfloat16())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwinSoftmaxSpec(1, 3), "activation bits must be a whole number from 2 to 8; got 1"),
        (lambda: TwinSoftmaxSpec(4, -1), "split_exponent of activations must be a whole number from 0 to 19; got -1"),
        (lambda: TwinSoftmaxSpec(4, 20), "split_exponent of activations must be a whole number from 0 to 19; got 20"),
        (lambda: TwinGeluSpec(9, 1.0), "activation bits must be a whole number from 2 to 8; got 9"),
        (lambda: TwinGeluSpec(4, -1.0), "the range of activations must be positive and finite; got -1"),
        (lambda: TwinGeluSpec(4, float("inf")), "the range of activations must be positive and finite; got inf"),
    ],
)
def test_impossible_grids_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_in_words():
    assert str(TwinSoftmaxSpec(4, 3)) == "activations of 4 bits, in fine steps below 2^-3 and coarse ones up to 1"
    words = "activations of 4 bits, each side of 0 in its own steps, one range for all tokens"
    assert str(TwinGeluSpec(4, 1.0)) == words
