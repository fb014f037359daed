from dataclasses import replace

import pytest

from bitmend.pipeline import run
from bitmend.pipeline.plan import Limits
from bitmend.report.plan import plan_lines, plan_rows


@pytest.fixture(scope="module")
def found(tiny_model):
    return run.plan(tiny_model, "gptq", overrides={"weights.group_size": 8, "calibration.sequence_length": 12})


def test_rows_say_what_is_needed_and_what_is_there(found):
    header, rows = plan_rows(replace(found, limits=Limits(10**9, None, None)))
    assert header == ["forecast", "needed", "available"]
    assert rows[0][0].startswith("memory, above that of the idle process")
    assert rows[0][2] == "1 GB"
    assert rows[1][2] == "unknown"
    assert [row[0] for row in rows[:3]][1:] == ["disk, while it runs", "disk, when it is done"]
    assert rows[-1][0] == "time"


def test_device_memory_has_a_row_of_its_own(found):
    on_device = replace(found, facts=replace(found.facts, on_device=True))
    assert plan_rows(on_device)[1][1][0] == "device memory"


def test_lines_say_where_the_memory_goes(found):
    lines = list(plan_lines(replace(found, low_memory_bytes=0)))
    assert lines[0] == "2 blocks, 1,536 calibration tokens, activations in memory"
    assert lines[1].startswith("memory is largest at: ")
    kept = list(plan_lines(replace(found, low_memory_bytes=10**8)))
    assert kept[1] == "what wide layers give is kept; with --low-memory it is computed again: 100 MB"
    spilled = replace(found, spilled=True, in_memory_bytes=10**9, limits=Limits(10**8, None, None))
    assert list(plan_lines(spilled))[1].startswith(
        "activations are kept on disk: in memory the run would take 1 GB, and 100 MB"
    )
