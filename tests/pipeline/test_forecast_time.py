"""The forecast of time: laws, and one product counted by hand."""

from dataclasses import replace

import pytest

from bitmend.calibrate.forward_cost import ForwardCost, Growth
from bitmend.calibrate.kept_results import PlannedRun
from bitmend.linalg.solver_cost import ONE_SWEEP
from bitmend.numerics.granularity import PerGroup
from bitmend.numerics.qtensor import QuantSpec
from bitmend.numerics.uniform import UniformGrid
from bitmend.pipeline.forecast import BatchShape, BlockShape, Facts, SiteShape
from bitmend.pipeline.forecast_time import FINISH_RATE, SECONDS_A_FILE, seconds_of
from bitmend.pipeline.rates import Rates

SITE = SiteShape(32, 64, QuantSpec(UniformGrid(4, symmetric=True), PerGroup(8)))
FORWARD = ForwardCost((Growth(0.0, 1.0),), Growth(0.0, 0.0), 0.0, 0.0, seconds=0.5, timed_tokens=10)
ENDLESS = Rates(*[1e30] * 7, 0.0, 0.0)
FACTS = Facts(
    blocks=(BlockShape(3, ((SITE,),), 2 * SITE.entries, 2 * SITE.entries, FORWARD),),
    batches=(BatchShape(1, 100),),
    hidden=32,
    dtype_bytes=2,
    outside_bytes=0,
    ends=(),
    companion_bytes=0,
    cost=ONE_SWEEP,
    moments=1,
    refit=False,
    keep_inputs=False,
)
RATES = Rates(*[1e9] * 7, 1e-6, 1e-9)


def test_passes_are_those_of_the_timed_one():
    # Ten tokens take half a second, so a hundred take five; two whole passes, and none before the only group; three blocks.
    assert seconds_of(FACTS, ENDLESS)["forward"] == pytest.approx(3 * 2 * 5.0)


def test_a_later_group_runs_what_comes_before_it_again():
    runs = (PlannedRun(0, False, 0), PlannedRun(32, True, SITE.entries), PlannedRun(32, True, 2 * SITE.entries))
    block = replace(FACTS.blocks[0], groups=((SITE,), (SITE,)), runs=runs)
    # The timed half second is now that of two sites, and the second group runs the first site once more.
    assert seconds_of(replace(FACTS, blocks=(block,)), ENDLESS)["forward"] == pytest.approx(3 * 2.5 * 5.0)


def test_results_of_wide_layers_that_are_kept_are_not_computed_again():
    runs = (PlannedRun(0, False, 0), PlannedRun(32, True, SITE.entries), PlannedRun(32, True, 2 * SITE.entries))
    wide = (*runs[:2], PlannedRun(32, True, SITE.entries))
    block = replace(FACTS.blocks[0], groups=((SITE,), (SITE,)), runs=runs, wide_runs=wide)
    facts = replace(FACTS, blocks=(block,))
    once, again = (seconds_of(replace(facts, keep_wide=keep), ENDLESS)["forward"] for keep in (True, False))
    assert (once, again) == (pytest.approx(3 * 2 * 5.0), pytest.approx(3 * 2.5 * 5.0))


def test_moments_by_hand():
    rates = replace(ENDLESS, product=1e6)
    assert seconds_of(FACTS, rates)["moments"] == pytest.approx(3 * 2 * 100 * 64**2 / 1e6)


def test_the_proof_by_hand():
    rates = replace(ENDLESS, product=1e6)
    sweep = 3 * 32 * 64 * 64 / 1e6  # in products, out in^2 operations
    # An energy and an error of the fit rows, each a product of (32, 64) and (64, 64).
    assert seconds_of(FACTS, rates)["solve"] == pytest.approx(sweep + 3 * 2 * 2 * 32 * 64 * 64 / 1e6)


def test_time_is_linear_in_blocks_and_in_batches():
    def total(count, batches):
        blocks = (replace(FACTS.blocks[0], count=count),)
        return seconds_of(replace(FACTS, blocks=blocks, batches=(BatchShape(1, 100),) * batches), RATES)["total"]

    assert total(6, 2) == pytest.approx(2 * total(3, 2))
    assert total(3, 3) - total(3, 2) == pytest.approx(total(3, 2) - total(3, 1))


def test_finished_blocks_are_run_again_but_not_solved():
    whole, rest = seconds_of(FACTS, RATES), seconds_of(FACTS, RATES, finished_blocks=2)
    assert rest["solve"] == pytest.approx(whole["solve"] / 3)
    assert rest["forward"] == whole["forward"]


def test_the_total_is_the_sum():
    found = seconds_of(FACTS, RATES, before=1.5)
    assert found["open"] == 1.5
    assert found["total"] == pytest.approx(sum(value for phase, value in found.items() if phase != "total"))


def test_codes_are_packed_twice_on_their_way_to_the_file():
    files = 3 * 2 * SECONDS_A_FILE  # a site and a block, three times
    written = 3 * 3 * FACTS.blocks[0].written_bytes / FINISH_RATE
    slow = replace(ENDLESS, pack=1e3)
    assert seconds_of(FACTS, slow)["write"] == pytest.approx(3 * 2 * 32 * 64 / 1e3 + files + written)


def test_rows_that_pass_before_solving_take_the_time_of_a_pass():
    facts = replace(FACTS, rows_before=4)  # of a hundred tokens
    assert seconds_of(FACTS, ENDLESS)["prepare"] == 0
    assert seconds_of(facts, ENDLESS)["prepare"] == pytest.approx(3 * 4 * 5.0)
    assert seconds_of(facts, ENDLESS)["total"] == pytest.approx(seconds_of(FACTS, ENDLESS)["total"] + 3 * 4 * 5.0)
