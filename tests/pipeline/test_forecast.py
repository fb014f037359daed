"""The forecast counts bytes: by hand for a tiny model, and by laws for all."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmend.calibrate.forward_cost import ForwardCost, Growth
from bitmend.calibrate.kept_results import PlannedRun
from bitmend.linalg.solver_cost import ONE_SWEEP, SolverCost
from bitmend.numerics.granularity import PerGroup
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.pipeline.forecast import (
    KEPT_ALWAYS,
    KEPT_FORWARDS,
    KEPT_WEIGHTS,
    SITE_REPORT_BYTES,
    BatchShape,
    BlockShape,
    Facts,
    SiteShape,
    forecast,
)

SPEC = QuantSpec(UniformGrid(4, symmetric=True), PerGroup(8), scale_dtype=torch.bfloat16)
FORWARD = ForwardCost((Growth(0.0, 100.0),), Growth(0.0, 8.0), 32.0, 16.0, seconds=1e-3, timed_tokens=10)


RUNS = (PlannedRun(0, False, 0), PlannedRun(32, True, 512), PlannedRun(16, False, 1024))


def facts(**changes):
    """Two blocks of width 16 in 16 bits: one group of two (16, 16) sites, then one (16, 64); 3 batches of 2 x 10 tokens."""
    groups = ((SiteShape(16, 16, SPEC), SiteShape(16, 16, SPEC)), (SiteShape(16, 64, SPEC),))
    weights = 2 * (2 * 256 + 1024)
    made = Facts(
        blocks=(BlockShape(2, groups, weight_bytes=weights + 40, site_bytes=weights, forward=FORWARD, runs=RUNS),),
        batches=(BatchShape(2, 10), BatchShape(2, 10), BatchShape(2, 10, held_out=True)),
        hidden=16,
        dtype_bytes=2,
        outside_bytes=1000,
        ends=(),
        companion_bytes=77,
        cost=ONE_SWEEP,
        moments=1,
        refit=True,
        keep_inputs=False,
    )
    return replace(made, **changes)


def stage(made, name, which=0):
    return [one for one in made.stages if one.name == name][which]


ALWAYS = {
    "held by the process": 0,
    "kept by the allocator": KEPT_ALWAYS + KEPT_WEIGHTS * 4 * 1024 + KEPT_FORWARDS * 2000,
    "token numbers": 60 * 16,
    "outside the blocks": 1000,
    "block arguments": 20 * 8,  # one shape of full rows: its tables are kept once
}


def test_a_tiny_model_by_hand():
    made = forecast(facts())
    stream = 60 * 16 * 2
    # All rows in the quantised network; in the full-precision one a third, which is held out.
    streams = {"x_fp, x_q": stream * 4 / 3, "output of a batch": 20 * 16 * 2}
    weights = {"block weights": 2 * 1536 + 40}
    assert stage(made, "full-precision forward").host == {
        **ALWAYS, **weights, "forward of a batch": 20 * 100, **streams
    }  # fmt: skip
    square = 8 * 64 * 64  # of the second group, in float64
    stores = {**streams, "kept results": 60 * (32 + 32 * 2)}
    solved = {"codes of solved sites": 512}
    # One moment of two splits; beside it rows in float32 with their product, or the marks of what is finite.
    assert stage(made, "moments of a group", 1).host == {
        **ALWAYS, **weights, **solved, **stores, "forward of a batch": 2000, "sums of moments": 2 * square,
        "adding to them": max(2 * 20 * 64 * 4 + 4 * 64 * 64, 1.25 * square),
    }  # fmt: skip
    # Moments of fit and held-out rows; a factor, and one square of work.
    assert stage(made, "factorisation", 1).host == {
        **ALWAYS, **weights, **solved, **stores, "moments": 2 * square, "factorisation": (1 + 1) * square
    }  # fmt: skip
    assert stage(made, "solving a site", 1).host == {
        **ALWAYS, **weights, **solved, **stores, "moments": 2 * square, "factors": square, "codes of candidates": 1024,
        "weight in float32": 4 * 1024, "codes": 1024, "solver or proof": 6 * 4 * 1024 + 4 * 64 * 64,
    }  # fmt: skip
    assert stage(made, "quantised forward").host == {
        **ALWAYS, **weights, "codes of solved sites": 1536, "forward of a batch": 2000, **streams,
        "kept results": 60 * 16 * 2,
    }  # fmt: skip
    assert made.host_bytes == max(sum(one.host.values()) for one in made.stages)


def test_the_files_by_hand():
    made = forecast(facts())
    # 4 bits a code, and a scale of two bytes for each 8 codes; the rest of a block is 40 bytes.
    block = 1536 // 2 + 1536 // 8 * 2 + 40
    assert made.output_bytes == 2 * block + 1000 + 77 + SITE_REPORT_BYTES * 6
    # Until the rename the tensors are there twice.
    assert made.partial_bytes == made.output_bytes + 2 * block + 1000


def test_two_streams_take_three_moments_and_the_inputs_of_all_groups():
    one, two = forecast(facts()), forecast(facts(moments=3, keep_inputs=True))
    assert stage(two, "factorisation").host["moments"] == 3 * stage(one, "factorisation").host["moments"]
    assert stage(two, "full-precision forward").host["group inputs"] == 60 * (16 + 64) * 2


def test_activations_on_disk_leave_memory_for_disk():
    inside, outside = forecast(facts()), forecast(facts(on_disk=True))
    kept = 4 / 3 * 60 * 16 * 2 + 20 * 16 * 2 + 60 * 16 * 2
    one, other = stage(inside, "quantised forward"), stage(outside, "quantised forward")
    assert sum(one.host.values()) - sum(other.host.values()) == kept
    assert sum(other.disk.values()) - sum(one.disk.values()) == kept


def test_on_a_device_the_block_is_not_in_host_memory():
    made = forecast(facts(on_device=True))
    one = stage(made, "quantised forward")
    assert {"block weights", "forward of a batch", "outside the blocks"} <= set(one.device)
    assert not set(one.device) & set(one.host)
    assert "x_fp, x_q" in one.host
    assert made.device_bytes > 0
    assert forecast(facts()).device_bytes == 0


def test_a_solver_without_data_has_no_streams():
    made = forecast(facts(batches=(), moments=0, cost=SolverCost()))
    assert {one.name for one in made.stages} == {
        "opening",
        "solving a site",
        "writing a block",
        "embedding, head, shards",
    }
    assert not any("x_fp, x_q" in one.host for one in made.stages)


def test_stacked_copies_take_memory_unless_the_solver_bounds_them():
    wide = SiteShape(4096, 4096, SPEC)
    block = BlockShape(1, ((wide,),), 2 * wide.entries, 2 * wide.entries, FORWARD)
    seven = replace(ONE_SWEEP, copies=7, stacked=7)
    free, bound = (
        stage(forecast(facts(blocks=(block,), cost=cost)), "solving a site").host["solver or proof"]
        for cost in (seven, replace(seven, stacked_entries=4 * wide.entries))
    )
    # Targets, columns, errors and levels in float32; three copies less of each, and U in float32 either way.
    assert free - bound == 3 * 4 * 4 * wide.entries


@given(tokens=st.integers(1, 40), more=st.integers(1, 40), keep=st.booleans(), moments=st.sampled_from([1, 3]))
def test_more_tokens_never_take_less(tokens, more, keep, moments):
    def of(count):
        rows = (BatchShape(count, 10), BatchShape(1, 10, held_out=True))
        return forecast(facts(batches=rows, keep_inputs=keep, moments=moments))

    few, many = of(tokens), of(tokens + more)
    assert many.host_bytes >= few.host_bytes
    assert many.partial_bytes >= few.partial_bytes


def test_memory_is_linear_in_batches_and_does_not_grow_with_blocks():
    def of(batches, count=2):
        made = facts(batches=(BatchShape(2, 1000),) * batches)
        return forecast(replace(made, blocks=(replace(made.blocks[0], count=count),)))

    sizes = [stage(of(count), "quantised forward").host for count in (1, 2, 3)]
    growth = [sum(sizes[k + 1].values()) - sum(sizes[k].values()) for k in (0, 1)]
    assert growth[0] == growth[1] > 0
    assert of(2, 2).host_bytes == of(2, 200).host_bytes
    assert of(2, 200).output_bytes - of(2, 101).output_bytes == pytest.approx(
        99 * (of(2, 2).output_bytes - of(2, 1).output_bytes)
    )


def test_what_opening_took_counts_for_the_peak_but_not_for_what_is_ahead():
    made = forecast(facts(opening_bytes=10**12))
    assert made.host_bytes == 10**12
    assert made.host_bytes_ahead == forecast(facts()).host_bytes
    assert made.largest.name == "opening"
