import numpy as np
import pytest
import torch

from bitmend.linalg.least_squares import (
    LinearMap,
    RegressionSums,
    add_up,
    best_constant,
    best_scale,
    explaining_directions,
    reduce_rank,
    ridge_map,
    with_mean,
)


def rows(n=400, d=6, m=4, seed=0, targets=1, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    scales = torch.tensor([1.0, 3.0, 0.2, 10.0, 1.0, 0.05], dtype=torch.float64)[:d]
    x = torch.randn(n, d, generator=draw, dtype=torch.float64) * scales + 5 * scales
    y = torch.randn(n, m, generator=draw, dtype=torch.float64) + 1
    weights = torch.randn(d, m, generator=draw, dtype=torch.float64)
    errors = []
    for _ in range(targets):
        noise = torch.randn(n, m, generator=draw, dtype=torch.float64)
        errors.append(x @ weights + 0.3 * y + noise - 2)
    return x.to(dtype), y.to(dtype), [one.to(dtype) for one in errors]


def sums_of(x, y, errors, weights=None, shift=None):
    sums = RegressionSums(x.shape[1], y.shape[1], len(errors), x.float().mean(0) if shift is None else shift)
    sums.add_(x, y, errors, weights)
    return sums


def left(map, x, y, e):
    return float((e - map.apply(x, y)).square().sum(1).mean())


@pytest.mark.parametrize("kind", ["constant", "scale", "ridge", "blocks", "rank"])
def test_errors_from_sums_equal_those_of_the_rows(kind):
    x, y, (e,) = rows()
    moments = sums_of(x, y, [e]).moments()
    maps = {
        "constant": best_constant(moments),
        "scale": best_scale(moments, 1e-3),
        "ridge": ridge_map(moments, 1e-3),
        "blocks": ridge_map(moments, 1e-3, groups=2),
    }
    down, up = reduce_rank(maps["ridge"], explaining_directions(maps["ridge"], moments), 2)
    maps["rank"] = with_mean(LinearMap(maps["ridge"].b, W=down @ up), moments)
    other = rows(seed=1)
    judged = sums_of(other[0], other[1], other[2]).moments()
    # Products are taken in float32, which is what the tolerance is for: e is 1,000 times what is left of it.
    allowed = 1e-6 * moments.energy(0)
    assert moments.error(maps[kind], 0) == pytest.approx(left(maps[kind], x, y, e), abs=allowed)
    assert judged.error(maps[kind], 0) == pytest.approx(left(maps[kind], other[0], other[1], other[2][0]), abs=allowed)
    assert moments.energy(0) == pytest.approx(float(e.square().sum(1).mean()), rel=1e-6)
    assert moments.variance(0) == pytest.approx(float(e.var(0, correction=0).sum()), rel=1e-5)


def test_ridge_is_least_squares_on_standardised_rows():
    x, y, (e,) = rows()
    found = ridge_map(sums_of(x, y, [e]).moments(), 0.1)
    mean, deviation = x.mean(0), x.std(0, correction=0)
    standard = ((x - mean) / deviation).numpy()
    stacked = np.concatenate([standard, np.sqrt(0.1 * len(x)) * np.eye(6)])
    wanted = np.concatenate([(e - e.mean(0)).numpy(), np.zeros((6, 4))])
    solution = np.linalg.lstsq(stacked, wanted, rcond=None)[0] / deviation.numpy()[:, None]
    np.testing.assert_allclose(found.W.numpy(), solution, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.b.numpy(), (e.mean(0) - mean @ found.W).numpy(), rtol=1e-6)


def test_blocks_are_regressions_of_their_own():
    x, y, (e,) = rows()
    found = ridge_map(sums_of(x, y, [e]).moments(), 1e-3, groups=2).W
    alone = ridge_map(sums_of(x[:, 3:], y[:, 2:], [e[:, 2:]]).moments(), 1e-3).W
    assert torch.equal(found[:3, 2:], torch.zeros(3, 2))
    assert torch.allclose(found[3:, 2:], alone, rtol=1e-4, atol=1e-6)


def test_scale_is_a_regression_of_each_channel():
    x, y, (e,) = rows()
    found = best_scale(sums_of(x, y, [e]).moments(), 0.0)
    for channel in range(4):
        slope, offset = np.polyfit(y[:, channel].numpy(), e[:, channel].numpy(), 1)
        assert float(found.a[channel]) == pytest.approx(slope, rel=1e-4)
        assert float(found.b[channel]) == pytest.approx(offset, rel=1e-4)


def test_no_product_of_that_rank_leaves_less():
    x, y, (e,) = rows()
    moments = sums_of(x, y, [e]).moments()
    full = ridge_map(moments, 1e-9)
    down, up = reduce_rank(full, explaining_directions(full, moments), 2)
    best = moments.error(with_mean(LinearMap(full.b, W=down @ up), moments), 0)
    draw = torch.Generator().manual_seed(3)
    for _ in range(50):
        moved = (down + 0.01 * down.norm() * torch.randn(down.shape, generator=draw, dtype=torch.float64)) @ up
        assert moments.error(with_mean(LinearMap(full.b, W=moved), moments), 0) >= best
    u, s, v = torch.linalg.svd(full.W)
    truncated = u[:, :2] * s[:2] @ v[:2]
    assert best < moments.error(with_mean(LinearMap(full.b, W=truncated), moments), 0)
    assert (down.shape, up.shape) == ((6, 2), (2, 4))


def test_sums_of_parts_are_sums_of_all():
    x, y, (e,) = rows()
    shift = x[:50].float().mean(0)
    parts = [sums_of(x[part], y[part], [e[part]], shift=shift) for part in (slice(0, 150), slice(150, None))]
    whole, all_rows = add_up(parts), sums_of(x, y, [e], shift=shift)
    assert whole.num_rows == 400
    for one, other in ((whole.moments().C, all_rows.moments().C), (whole.moments().P, all_rows.moments().P)):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="shift"):
        add_up([parts[0], sums_of(x, y, [e])])


def test_a_row_of_weight_two_counts_as_two():
    x, y, (e,) = rows(n=60)
    shift = x.float().mean(0)
    twice = torch.ones(60)
    twice[10] = 2
    found = sums_of(x, y, [e], twice, shift).moments()
    doubled = [torch.cat([one, one[10:11]]) for one in (x, y, e)]
    wanted = sums_of(doubled[0], doubled[1], [doubled[2]], shift=shift).moments()
    assert torch.allclose(found.C, wanted.C, rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.P, wanted.P, rtol=1e-5, atol=1e-6)
    assert found.weight == wanted.weight == 61


def test_targets_mix_linearly():
    x, y, errors = rows(targets=2)
    both = sums_of(x, y, errors).moments()
    shares = torch.tensor([0.25, 0.75])
    mixed = ridge_map(both.mixed(shares), 1e-3)
    wanted = ridge_map(sums_of(x, y, [0.25 * errors[0] + 0.75 * errors[1]]).moments(), 1e-3)
    assert torch.allclose(mixed.W, wanted.W, rtol=1e-3, atol=1e-5)


def test_inputs_that_say_nothing_get_no_weight():
    x, y, (e,) = rows()
    x = torch.cat([x, torch.full((400, 1), 7.0), x[:, :1]], 1)  # one never changes, one repeats another
    found = ridge_map(sums_of(x, y, [e]).moments(), 1e-4)
    assert torch.equal(found.W[6], torch.zeros(4, dtype=torch.float64))
    assert bool(found.W.isfinite().all())
    assert torch.allclose(found.W[0], found.W[7], rtol=1e-2, atol=1e-3)


def test_moments_that_are_not_definite_are_cut():
    x, y, (e,) = rows(n=3)  # rank 2 at most
    moments = sums_of(x, y, [e]).moments()
    moments.C.sub_(1e-3 * torch.diag(moments.C.diagonal()))
    found = ridge_map(moments, 1e-9)
    assert bool(found.W.isfinite().all())


def test_centring_survives_a_large_mean():
    x, y, (e,) = rows(n=5000)
    moved = x + 1e4
    plain = ridge_map(sums_of(x, y, [e]).moments(), 1e-4).W
    found = ridge_map(sums_of(moved.float(), y, [e]).moments(), 1e-4).W
    # The rows themselves lose digits in float32 when 10,000 is added; nothing more is lost than that.
    assert float((found - plain)[[0, 1, 3, 4]].norm() / plain.norm()) < 1e-2


def test_what_is_not_finite_is_told():
    x, y, (e,) = rows(n=20)
    assert sums_of(x, y, [e]).is_finite()
    e[3, 1] = torch.nan
    assert not sums_of(x, y, [e]).is_finite()
