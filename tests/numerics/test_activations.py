import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitmend.errors import RecipeError
from bitmend.numerics.activations import ActivationRounding, ActivationSpec


def test_by_hand():
    # Largest magnitude 7 over 7 levels: steps of 1. 2.6 -> 3, -0.4 -> 0.
    values = torch.tensor([[7.0, 2.6, -0.4, -7.0], [0.0, 0.0, 0.0, 0.0]])
    assert ActivationSpec(4).round(values).tolist() == [[7.0, 3.0, 0.0, -7.0], [0.0, 0.0, 0.0, 0.0]]
    # Two groups of two, each with steps of its own: 7 / 7, then 0.7 / 7.
    rounded = ActivationSpec(4, group_size=2).round(torch.tensor([7.0, 2.6, 0.7, -0.24]))
    assert torch.allclose(rounded, torch.tensor([7.0, 3.0, 0.7, -0.2]))
    # Clipped to half: steps of 0.5, and what lies beyond 3.5 (or -4, the lowest code) goes to the end.
    assert ActivationSpec(4, clip_ratio=0.5).round(torch.tensor([7.0, -7.0, 1.1])).tolist() == [3.5, -4.0, 1.0]
    # From 0 to 15 with a zero point: steps of 1, all 16 levels on one side.
    assert ActivationSpec(4, symmetric=False).round(torch.tensor([15.0, 0.0, 6.4])).tolist() == [15.0, 0.0, 6.0]


@given(st.integers(2, 8), st.booleans(), st.sampled_from([-1, 4]), st.integers(0, 100))
def test_laws(bits, symmetric, group_size, seed):
    spec = ActivationSpec(bits, symmetric, group_size)
    values = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(seed))
    rounded = spec.round(values)
    groups, levels = (
        values.reshape(3, 2, -1, 8 if group_size == -1 else 4),
        rounded.reshape(3, 2, -1, 8 if group_size == -1 else 4),
    )
    # At most 2^bits levels a group; no value moves by more than half a step; a token does not depend on its neighbours.
    reach = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
    if not symmetric:
        reach = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / (2**bits - 1)
    # A zero point is a whole number, so that the ends of the range may move by half a step more.
    slack = 0.5001 if symmetric else 1.0001
    assert bool(((groups - levels).abs().amax(-1) <= slack * reach + 1e-7).all())
    assert all(len(torch.unique(group)) <= 2**bits for group in levels.reshape(-1, levels.shape[-1]))
    assert torch.equal(spec.round(values[1:2]), rounded[1:2])
    # A power of two passes through.
    assert torch.equal(spec.round(values * 8), rounded * 8)
    assert torch.equal(spec.round(-values), -rounded) or not symmetric


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_on_the_grid_stays(symmetric):
    spec = ActivationSpec(4, symmetric)
    once = spec.round(torch.randn(50, 16))
    assert torch.allclose(spec.round(once), once, rtol=0, atol=1e-6)


def test_dtype_is_kept_and_computed_in_float32():
    values = torch.randn(4, 16).bfloat16()
    rounded = ActivationSpec(8).round(values)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, ActivationSpec(8).round(values.float()).bfloat16())


@given(st.integers(2, 8), st.booleans(), st.sampled_from([-1, 4]), st.sampled_from([0.5, 0.9, 1.0]), st.integers(0, 50))
def test_what_is_kept_comes_back_as_it_was_rounded(bits, symmetric, group_size, clip_ratio, seed):
    spec = ActivationSpec(bits, symmetric, group_size, clip_ratio, scale_bits=16)
    values = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 3)
    values[0, 0] = values[0, 0].abs()  # all on one side: the whole range of codes is used
    values[1, 1] = 0
    kept = spec.encode(values)
    assert kept.codes.dtype == torch.int8
    assert kept.scale.dtype == torch.bfloat16
    assert int(kept.codes.min()) >= -(2 ** (bits - 1))
    assert int(kept.codes.max()) <= 2 ** (bits - 1) - 1
    for dtype in (torch.float32, torch.bfloat16):
        inputs = values.to(dtype)
        assert torch.equal(spec.decode(spec.encode(inputs), dtype), spec.round(inputs))
    # Sixteen bits for the scale move a value by no more than their rounding does.
    fine = ActivationSpec(bits, symmetric, group_size, clip_ratio).round(values)
    step = kept.scale.float().repeat_interleave(8 // kept.scale.shape[-1], -1)
    assert bool(((spec.round(values) - fine).abs() <= step * (1.01 + 2**bits / 256)).all())


def test_bits_of_what_is_kept_by_hand():
    # Codes of 4 bits, a scale of 16 and a zero point of 8 for 64 features: 4 + 24 / 64.
    assert ActivationSpec(4, symmetric=False, scale_bits=16).bits_per_value(64) == 4.375
    assert ActivationSpec(4, group_size=32, scale_bits=16).bits_per_value(64) == 4.5


def test_a_spoiled_token_stays_spoiled_when_it_is_kept():
    spec = ActivationSpec(4, symmetric=False, scale_bits=16)
    back = spec.decode(spec.encode(torch.tensor([[1.0, float("nan")], [1.0, 0.5]])), torch.float32)
    assert not bool(back[0].isfinite().any())
    assert bool(back[1].isfinite().all())


def test_nothing_that_is_not_finite_is_hidden():
    for bad in (float("nan"), float("inf")):
        rounded = ActivationSpec(4).round(torch.tensor([[1.0, bad], [1.0, 0.5]]))
        assert not bool(rounded[0].isfinite().all())
        assert bool(rounded[1].isfinite().all())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bits": 1}, "bits must be a whole number from 2 to 8; got 1"),
        ({"bits": 4, "clip_ratio": 0.0}, "clip_ratio must lie above 0"),
        ({"bits": 4, "group_size": 0}, "group_size must be -1"),
    ],
)
def test_impossible_grids_are_refused(keys, message):
    with pytest.raises(RecipeError, match=message):
        ActivationSpec(**keys)


def test_a_group_size_that_does_not_fit_names_the_divisors():
    with pytest.raises(RecipeError, match=r"got 5 for 8 features, whose divisors are 1, 2, 4, 8"):
        ActivationSpec(4, group_size=5).round(torch.zeros(2, 8))


def test_static_by_hand():
    # A range of 3.5 over 7 levels: steps of 0.5 for every token; what lies outside goes to the ends, -8 and 7 steps.
    values = torch.tensor([[7.0, 2.6, -0.4, -7.0], [0.1, 0.3, -0.2, 0.0]])
    spec = ActivationSpec(4, ranges=(3.5,))
    assert spec.round(values).tolist() == [[3.5, 2.5, -0.5, -4.0], [0.0, 0.5, 0.0, 0.0]]
    # Half the range: steps of 0.25.
    assert ActivationSpec(4, ranges=(3.5,), clip_ratio=0.5).round(values[1]).tolist() == [0.0, 0.25, -0.25, 0.0]
    # One range for each of two heads.
    heads = torch.ones(1, 2, 1, 4) * 0.6
    assert ActivationSpec(4, ranges=(7.0, 3.5)).round(heads).flatten().tolist() == [1.0] * 4 + [0.5] * 4


def test_a_range_that_is_not_known_yet_is_that_of_what_comes():
    values = torch.randn(2, 3, 5, 8)
    largest = values.abs().amax((0, 2, 3))
    known = ActivationSpec(4, ranges=tuple(largest.tolist()))
    assert torch.equal(ActivationSpec(4, ranges=()).round(values), known.round(values))
    flat = values.reshape(-1, 8)
    assert torch.equal(
        ActivationSpec(4, ranges=()).round(flat), ActivationSpec(4, ranges=(float(flat.abs().max()),)).round(flat)
    )


@pytest.mark.parametrize("ranges", [(), (2.0,)])
def test_what_is_not_finite_is_seen_behind_a_static_range(ranges):
    rounded = ActivationSpec(4, ranges=ranges).round(torch.tensor([[1.0, float("inf")], [float("nan"), 0.5]]))
    assert bool(rounded.isnan().all())  # the whole token, as with a scale of its own


def test_what_is_not_finite_comes_back_from_a_cache_as_such():
    values = torch.randn(1, 2, 3, 4)
    values[0, 1, 2, 0] = float("inf")
    for spec in (ActivationSpec(4, ranges=(1.0, 2.0), scale_bits=16), ActivationSpec(4, scale_bits=16)):
        back = spec.decode(spec.encode(values), torch.float32)
        assert bool(back[0, 1, 2].isnan().all())
        assert torch.equal(back.nan_to_num(7), spec.round(values).nan_to_num(7))


def test_static_values_come_back_from_a_cache():
    spec = ActivationSpec(4, ranges=(1.0, 2.0, 3.0), scale_bits=16)
    values = torch.randn(2, 3, 5, 8)
    kept = spec.encode(values)
    assert kept.scale.shape == (2, 3, 5, 1)
    assert torch.equal(spec.decode(kept, torch.float32), spec.round(values))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"group_size": 4}, "static ranges need a grid without groups"),
        ({"symmetric": False, "lows": (-1.0,), "group_size": 4}, "static ranges need a grid without groups"),
        ({"ranges": (0.0,)}, "static ranges must be positive and finite"),
        ({"ranges": (1e300,)}, "static ranges must be positive and finite"),
        ({"ranges": (1.0, float("nan"))}, "static ranges must be positive and finite"),
        ({"lows": (-1.0,)}, r"lows are the lower ends of static ranges with zero points.*got symmetric = True"),
        ({"symmetric": False, "ranges": None, "lows": (-1.0,)}, r"lows are the lower ends.*and ranges = None"),
        ({"symmetric": False}, "need as many lows as ranges; got 0 lows and 1 ranges"),
        (
            {"symmetric": False, "ranges": (1.0, 2.0), "lows": (-1.0,)},
            "need as many lows as ranges; got 1 lows and 2 ranges",
        ),
        ({"symmetric": False, "ranges": (), "lows": (-1.0,)}, "need as many lows as ranges; got 1 lows and 0 ranges"),
        ({"symmetric": False, "lows": (0.5,)}, "must be finite, hold 0 and something besides"),
        ({"symmetric": False, "lows": (0.0,), "ranges": (0.0,)}, "must be finite, hold 0 and something besides"),
        ({"symmetric": False, "lows": (-1.0,), "ranges": (-0.5,)}, "must be finite, hold 0 and something besides"),
        ({"symmetric": False, "lows": (float("nan"),)}, "must be finite, hold 0 and something besides"),
        ({"symmetric": False, "lows": (float("-inf"),)}, "must be finite, hold 0 and something besides"),
        ({"symmetric": False, "lows": (-3e38,), "ranges": (3e38,)}, "must be finite, hold 0 and something besides"),
    ],
)
def test_static_ranges_that_cannot_be(keys, message):
    with pytest.raises(RecipeError, match=message):
        ActivationSpec(4, **{"ranges": (1.0,), **keys})


def test_ranges_of_heads_need_as_many_heads():
    spec = ActivationSpec(4, ranges=(1.0, 2.0))
    with pytest.raises(RecipeError, match=r"2 ranges need values of as many heads.*got \(1, 3, 4, 8\)"):
        spec.round(torch.randn(1, 3, 4, 8))
    with pytest.raises(RecipeError, match="2 ranges need values of as many heads"):
        spec.round(torch.randn(4, 8))


# ------------------------------------------------------------------------------------------------ static, with zero points
def test_static_with_zero_points_by_hand():
    # From -1 to 14 in 15 steps of 1; the level 0 is code -8 + 1. What lies outside goes to -1 and 14.
    spec = ActivationSpec(4, symmetric=False, ranges=(14.0,), lows=(-1.0,))
    values = torch.tensor([[20.0, 6.4, -0.6, -7.0], [0.4, 14.0, -1.0, 0.0]])
    assert spec.round(values).tolist() == [[14.0, 6.0, -1.0, -1.0], [0.0, 14.0, -1.0, 0.0]]
    assert spec.encode(values).codes.tolist() == [[7, -1, -8, -8], [-7, 7, -8, -7]]
    # Half of both ends: from -0.5 to 7 in steps of 0.5.
    half = ActivationSpec(4, symmetric=False, clip_ratio=0.5, ranges=(14.0,), lows=(-1.0,))
    assert half.round(values).tolist() == [[7.0, 6.5, -0.5, -0.5], [0.5, 7.0, -0.5, 0.0]]
    # The range may end at 0 on either side: all levels are then on the other one.
    above = ActivationSpec(2, symmetric=False, ranges=(3.0,), lows=(0.0,))
    assert above.round(values[0]).tolist() == [3.0, 3.0, 0.0, 0.0]
    below = ActivationSpec(2, symmetric=False, ranges=(0.0,), lows=(-3.0,))
    assert below.round(values[0]).tolist() == [0.0, 0.0, -1.0, -3.0]
    # One range for each of two heads: steps of 1 from -3, and of 0.5 from 0.
    heads = ActivationSpec(2, symmetric=False, ranges=(0.0, 1.5), lows=(-3.0, 0.0))
    found = heads.round(torch.tensor([-0.7, 0.7]).expand(1, 2, 1, 2).transpose(2, 3))
    assert found.flatten().tolist() == [-1.0, 0.0, 0.0, 0.5]


@settings(max_examples=40)
@given(
    st.integers(2, 8),
    st.floats(0, 50, width=32),
    st.floats(0.125, 50, width=32),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([16, 32]),
    st.integers(0, 1000),
)
def test_laws_of_static_with_zero_points(bits, depth, largest, ratio, kept_bits, seed):
    spec = ActivationSpec(bits, False, -1, ratio, kept_bits, (largest,), (-depth,))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 32, generator=generator) * 20
    values[0, 5] = 0
    values = values.sort(dim=-1).values
    rounded = spec.round(values)
    # Brute force: the nearest of all levels, which are whole steps away from 0.
    low, high = -depth * ratio, largest * ratio
    kept = spec.encode(values)
    scale = float(kept.scale[0, 0])
    zero_point = int(kept.zero_point[0, 0])
    assert scale == pytest.approx((high - low) / (2**bits - 1), rel=1e-6 if kept_bits == 32 else 2**-8)
    codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    levels = torch.tensor([(code - zero_point) * scale for code in codes], dtype=torch.float64)
    nearest = (values.double().unsqueeze(-1) - levels).abs().amin(-1)
    assert torch.allclose((values.double() - rounded).abs(), nearest, rtol=0, atol=1e-5)
    assert 0.0 in levels.tolist()
    assert bool((rounded[values == 0] == 0).all())
    # At most half a step inside the range, whose ends move by as much because the zero point is whole. (A scale of 16 bits
    # moves them further.)
    inside = (values >= low + scale / 2) & (values <= high - scale / 2)
    if kept_bits == 32:
        assert bool(((values - rounded).abs()[inside] <= 0.5001 * scale).all())
    assert bool((rounded.diff(dim=-1) >= 0).all())
    assert len(rounded.unique()) <= 2**bits
    assert torch.equal(spec.round(rounded), rounded)
    assert torch.equal(spec.decode(kept, torch.float32), rounded)


def test_static_with_zero_points_is_dynamic_where_the_ranges_agree():
    values = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    known = ActivationSpec(4, symmetric=False, ranges=(float(values.max()),), lows=(float(values.min()),))
    assert torch.equal(known.round(values), ActivationSpec(4, symmetric=False).round(values))


def test_a_range_with_a_zero_point_that_is_not_known_yet_is_that_of_what_comes():
    values = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    values[:, 1] = values[:, 1].abs()  # a head that lies above 0 all over
    low, high = values.amin((0, 2, 3)).clamp(max=0), values.amax((0, 2, 3))
    known = ActivationSpec(4, symmetric=False, ranges=tuple(high.tolist()), lows=tuple(low.tolist()))
    for open_spec in (ActivationSpec(4, symmetric=False, ranges=()), ActivationSpec(4, False, ranges=(), lows=())):
        assert torch.equal(open_spec.round(values), known.round(values))
        flat = values.reshape(-1, 8)
        one = ActivationSpec(4, symmetric=False, ranges=(float(flat.max()),), lows=(float(flat.min()),))
        assert torch.equal(open_spec.round(flat), one.round(flat))
        assert torch.equal(open_spec.round(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_range_rounds_feature_maps_of_any_layout_alike(symmetric):
    maps = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    spec = ActivationSpec(4, symmetric, ranges=(2.0,), lows=None if symmetric else (-0.5,))
    wanted = spec.round(maps.reshape(-1)).reshape(maps.shape)
    assert torch.equal(spec.round(maps), wanted)
    assert torch.equal(spec.round(maps.to(memory_format=torch.channels_last)), wanted)
    assert torch.equal(spec.round(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), wanted)


@pytest.mark.parametrize("lows", [None, (-2.0,)])
def test_what_is_not_finite_is_seen_behind_a_range_with_a_zero_point(lows):
    spec = ActivationSpec(4, symmetric=False, ranges=() if lows is None else (2.0,), lows=lows, scale_bits=16)
    values = torch.tensor([[1.0, float("inf")], [float("nan"), 0.5], [float("-inf"), 0.5]])
    assert bool(spec.round(values).isnan().all())
    if lows is not None:
        values = torch.cat([values, torch.tensor([[1.0, -1.0]])])
        back = spec.decode(spec.encode(values), torch.float32)
        assert bool(back[:3].isnan().all())
        assert torch.equal(back[3], spec.round(values)[3])


def test_heads_with_zero_points_come_back_from_a_cache():
    spec = ActivationSpec(4, False, scale_bits=16, ranges=(1.0, 2.0, 3.0), lows=(-2.0, 0.0, -1.0))
    values = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    kept = spec.encode(values)
    assert kept.scale.shape == kept.zero_point.shape == (2, 3, 5, 1)
    assert torch.equal(spec.decode(kept, torch.float32), spec.round(values))
    with pytest.raises(RecipeError, match=r"3 ranges need values of as many heads.*got \(2, 2, 5, 8\)"):
        spec.round(values[:, :2])


def test_ways_to_round_share_a_protocol():
    assert isinstance(ActivationSpec(4), ActivationRounding)
    assert str(ActivationSpec(4, False, ranges=(1.0,), lows=(0.0,))) == (
        "activations of 4 bits, with zero points, one scale for all tokens"
    )


# ------------------------------------------------------------------------------------------------ gradients
def test_gradient_of_rounding_by_hand():
    # Four bits, largest 1: steps of 1/7. 0.3 is 2.1 steps and goes to 2: what it gives is 0.3 - 0.1 steps, so that it moves
    # with 0.3 as such, and with the largest by -0.1 / 7.
    values = torch.tensor([[1.0, 0.3]], dtype=torch.float64, requires_grad=True)
    ActivationSpec(4).round_with_gradient(values)[0, 1].backward()
    assert values.grad[0].tolist() == pytest.approx([-0.1 / 7, 1.0], abs=1e-6)
    # Clipped to a half, the largest goes to the end of the grid, which moves half as fast as it does.
    values = torch.tensor([[1.0, 0.3]], dtype=torch.float64, requires_grad=True)
    ActivationSpec(4, clip_ratio=0.5).round_with_gradient(values)[0, 0].backward()
    assert values.grad[0].tolist() == pytest.approx([0.5, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        ActivationSpec(4),
        ActivationSpec(3, symmetric=False, group_size=4, clip_ratio=0.9),
        ActivationSpec(4, scale_bits=16),
        ActivationSpec(4, ranges=(1.5,), clip_ratio=0.8),
        ActivationSpec(4, symmetric=False, ranges=(1.5,), lows=(-0.5,), clip_ratio=0.8),
        ActivationSpec(4, symmetric=False, ranges=()),
    ],
    ids=str,
)
def test_rounding_with_a_gradient_rounds_alike(spec):
    values = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    values[2] = 0
    found = spec.round_with_gradient(values.requires_grad_())
    torch.testing.assert_close(found, spec.round(values.detach()), rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert bool(values.grad.isfinite().all())
