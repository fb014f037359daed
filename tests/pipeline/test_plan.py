"""Before a run: the spill, the refusals, and the forecast beside what a run really takes."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from bitmend.errors import RequestError
from bitmend.linalg.solver_cost import ONE_SWEEP, SolverCost
from bitmend.pipeline import machine, run
from bitmend.pipeline import plan as module
from bitmend.pipeline.forecast import BatchShape, forecast
from bitmend.pipeline.plan import (
    AMPLE_SHARE,
    Baseline,
    Limits,
    _rows_before,
    asked_batches,
    cost_of,
    duration,
    gather_facts,
    lacks,
    settle,
    size,
)
from bitmend.pipeline.recipe import load_recipe, parse_recipe
from bitmend.protocols import Need, Solution

KEYS = {"weights.group_size": 8, "weights.observer": "minmax", "calibration.sequence_length": 12}


class Said:
    def __init__(self):
        self.lines = []

    def track(self, items, label, total):
        del label, total
        yield from items

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def facts(tiny_model):
    """512 rows of 12 tokens, so that activations are most of what is counted."""
    found = run.plan(tiny_model, "gptaq", overrides={**KEYS, "calibration.sequences": 512}).facts
    return replace(found, held_bytes=0, opening_bytes=0, keep_wide=False)


def at(memory, disk=10**12, device=None):
    return Limits(memory, device, disk)


def enough_on_disk(facts):
    """A memory that holds the run with its activations on disk, and not in memory."""
    inside, outside = (forecast(replace(facts, on_disk=on_disk)).host_bytes_ahead for on_disk in (False, True))
    assert inside > outside
    return (inside + outside) // 2 - facts.outside_bytes


# ---------------------------------------------------------------------------------------------- facts
def test_facts_of_a_tiny_model(tiny_model, facts):
    sizes = sum(path.stat().st_size for path in tiny_model.glob("tokenizer*"))
    assert facts.num_blocks == 2
    assert len(facts.blocks) == 1  # both blocks are alike
    assert facts.tokens == 512 * 12
    assert facts.companion_bytes >= sizes
    assert facts.moments == 3
    assert facts.keep_inputs
    assert [len(group) for group in facts.blocks[0].groups] == [3, 1, 2, 1]


def test_output_of_a_run_is_foretold(tiny_model, tiny_text, tmp_path):
    keys = {**KEYS, "calibration.sequences": 8, "embedding.bits": 8}
    report = run.quantize(tiny_model, "gptq", [tiny_text], output=tmp_path / "out", overrides=keys)
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    companions = sum((tmp_path / "out" / path.name).stat().st_size for path in tiny_model.glob("tokenizer*"))
    assert weights + companions < report.forecast["output_bytes"] < written + 30_000
    assert json.loads((tmp_path / "out" / "run.json").read_text())["forecast"] == report.forecast
    assert report.forecast["seconds"]["total"] > 0
    assert report.forecast["activations"] == "memory"


def test_streams_that_only_one_moment_needs_are_not_stored(tiny_model):
    assert not run.plan(tiny_model, "gptq", overrides=KEYS).facts.keep_inputs
    assert run.plan(tiny_model, "gptq", overrides={**KEYS, "calibration.two_streams": True}).facts.keep_inputs


def test_data_free_solvers_have_no_batches(tiny_model):
    found = run.plan(tiny_model, "rtn", overrides=KEYS)
    assert found.facts.tokens == 0
    assert found.facts.blocks[0].forward is None


def test_rows_that_were_not_drawn_are_split_as_drawn_ones_are():
    batches = asked_batches(10, 1024, 0.25)
    assert sum(batch.rows for batch in batches if batch.held_out) == 2
    assert sum(batch.rows for batch in batches) == 10
    assert max(batch.rows for batch in batches) == 2  # of 1,024 tokens each
    assert not any(batch.held_out for batch in asked_batches(10, 1024, 0.0))


@dataclass(frozen=True)
class Silent:
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT})

    def solve(self, problem) -> Solution:
        raise NotImplementedError


@dataclass(frozen=True)
class Talking(Silent):
    def cost(self) -> SolverCost:
        return SolverCost(sweeps=5)


@dataclass(frozen=True)
class DataFree(Silent):
    needs: ClassVar[frozenset[Need]] = frozenset()


def test_a_solver_may_say_its_cost_or_not():
    assert cost_of(Silent()) == ONE_SWEEP
    assert cost_of(Talking()).sweeps == 5
    assert cost_of(DataFree()) == SolverCost()


def test_the_model_is_left_as_it_was(tiny_model):
    from bitmend.models.hf_causal_lm import HfCausalLm

    adapter = HfCausalLm.open(tiny_model)
    gather_facts(adapter, load_recipe("gptq", KEYS), asked_batches(4, 12, 0.0), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in adapter.block(0).parameters())


def test_a_baseline_that_cannot_be_known_takes_nothing_off(monkeypatch):
    monkeypatch.setattr(machine, "anonymous_bytes", lambda: None)
    found = Baseline.take()
    assert found.now() == 0
    assert found.most_since() == 0


# ---------------------------------------------------------------------------------------------- does it fit?
def test_it_fits(facts, tmp_path):
    found = settle(facts, at(10**12), tmp_path / "out")
    assert not found.facts.on_disk
    assert not found.spilled


def test_wide_results_are_kept_only_where_memory_is_ample(facts, tmp_path):
    wide = replace(facts, keep_wide=True)
    enough = int(forecast(wide).host_bytes_ahead / AMPLE_SHARE) + 1
    found = settle(facts, at(enough), tmp_path / "out")
    assert found.facts == wide
    assert found.to_json()["wide_results_kept"]
    assert found.low_memory_bytes == forecast(facts).host_bytes < found.forecast.host_bytes
    opened = replace(facts, opening_bytes=10 * found.forecast.host_bytes)  # where the most is taken before any block
    assert settle(opened, at(10**12), tmp_path / "out").low_memory_bytes == 0
    saving = settle(facts, at(enough), tmp_path / "out", low_memory=True)
    assert (saving.facts, saving.low_memory_bytes) == (facts, 0)
    last_runs = [
        next(one for one in made.stages if one.name == "quantised forward")
        for made in (found.forecast, forecast(facts))
    ]
    kept, fewer = (one.host["kept results"] for one in last_runs)
    layers = sum(site.out for site in facts.blocks[0].sites if site.out > facts.hidden)
    assert kept - fewer == facts.tokens * facts.dtype_bytes * layers > 0  # what is kept is counted
    for others, limits in (
        (facts, at(enough - 8)),
        (facts, Limits(None, None, None)),
        (replace(facts, on_disk=True), at(10**12)),
        (replace(facts, on_device=True), at(10**12, device=10**12)),
    ):
        assert not settle(others, limits, tmp_path / "out").facts.keep_wide


def test_unknown_limits_are_no_limits(facts, tmp_path):
    found = settle(facts, Limits(None, None, None), tmp_path / "out")
    assert not found.spilled


def test_activations_go_to_disk_by_themselves(facts, tmp_path):
    memory = enough_on_disk(facts)
    found = settle(facts, at(memory), tmp_path / "out")
    assert found.facts.on_disk
    assert found.spilled
    expected = f"activations are kept on disk: in memory the run would take {size(found.in_memory_bytes)}, and "
    assert found.spill_line() == f"{expected}{size(memory)} are available"


def test_no_spill_where_the_disk_is_too_small(facts, tmp_path):
    disk = forecast(replace(facts, on_disk=True)).partial_bytes - 1
    assert disk > forecast(facts).partial_bytes
    with pytest.raises(
        RequestError, match=r"the run would take .* of memory, but .* are available; pass --sequences \d+"
    ):
        settle(facts, at(enough_on_disk(facts), disk), tmp_path / "out")


def test_the_rows_that_are_offered_fit_and_one_more_would_not(facts, tmp_path):
    memory = enough_on_disk(facts)
    limits = at(memory, forecast(facts).partial_bytes)
    with pytest.raises(RequestError, match=r"pass --sequences (\d+)$") as raised:
        settle(facts, limits, tmp_path / "out")
    count = int(str(raised.value).split("--sequences ")[1])
    fewer, more = (replace(facts, batches=tuple(asked_batches(rows, 12, 0.25))) for rows in (count, count + 8))
    assert lacks(fewer, forecast(fewer), limits) is None
    assert lacks(more, forecast(more), limits) == "memory"


def test_nothing_helps(facts, tmp_path):
    with pytest.raises(RequestError, match=r"but 1 MB are available; use a machine with more memory$"):
        settle(facts, at(10**6), tmp_path / "out")


def test_disk_that_activations_alone_fill(facts, tmp_path):
    asked = replace(facts, on_disk=True)
    disk = forecast(facts).partial_bytes
    with pytest.raises(
        RequestError, match=r"of disk at .*; leave out --activations-on-disk, or .*choose an --output on"
    ):
        settle(asked, at(10**12, disk), tmp_path / "out")


def test_disk_that_is_full(facts, tmp_path):
    with pytest.raises(
        RequestError, match=r"of disk at .*, but 0\.001 MB are available; .*free some space or choose an --output"
    ):
        settle(facts, at(10**12, 10**3), tmp_path / "out")


def test_a_device_that_is_too_small(facts, tmp_path):
    on_device = replace(facts, on_device=True)
    with pytest.raises(RequestError, match=r"of device memory, but 1 MB are available; .*pass --device cpu"):
        settle(on_device, at(10**12, device=10**6), tmp_path / "out")


# ---------------------------------------------------------------------------------------------- in a run
def test_a_run_tells_its_forecast_first_and_spills(monkeypatch, tiny_model, tiny_text, tmp_path):
    keys = {**KEYS, "calibration.sequences": 8}
    calls = {"model": tiny_model, "recipe": "gptaq", "calibration": [tiny_text], "overrides": keys}
    plain = run.quantize(**calls, output=tmp_path / "plain")
    real = forecast

    def crowded(facts):  # as if activations took a terabyte
        made = real(facts)
        for stage in made.stages[1:]:
            if not facts.on_disk:
                stage.host["more"] = 1e12
        return replace(made, host_bytes=made.host_bytes)

    monkeypatch.setattr(module, "forecast", crowded)
    monkeypatch.setattr(machine, "available_memory", lambda: 10**11)
    said = Said()
    spilled = run.quantize(**calls, output=tmp_path / "spilled", progress=said)
    assert said.lines[1].startswith("forecast: memory ")
    assert said.lines[2].startswith(
        "activations are kept on disk: in memory the run would take 1e+03 GB, and 100 GB are"
    )
    assert spilled.forecast["activations"] == "disk"
    assert spilled.forecast["spilled"]
    assert plain.forecast["activations"] == "memory"
    same = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "plain", tmp_path / "spilled")]
    assert same[0] == same[1]


def test_a_run_that_does_not_fit_leaves_nothing(monkeypatch, tiny_model, tiny_text, tmp_path):
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    with pytest.raises(RequestError, match=r"the run would take .* of memory, but 0\.001 MB are available"):
        run.quantize(
            tiny_model, "gptq", [tiny_text], output=tmp_path / "out", overrides={**KEYS, "calibration.sequences": 8}
        )
    assert list(tmp_path.iterdir()) == []


STREAMED = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from bitmend.pipeline import machine, quantize as loop
from bitmend.pipeline.run import quantize
seen = []
trim = loop.return_free_memory
def watch():
    trim()
    seen.append(machine.anonymous_bytes())
loop.return_free_memory = watch
quantize(sys.argv[1], "rtn", output=Path(sys.argv[2]), overrides={"weights.observer": "minmax"})
print(max(seen[8:]) - seen[7])
"""


@pytest.mark.skipif(machine.anonymous_bytes() is None, reason="this system does not tell a process's own memory")
def test_memory_does_not_grow_with_the_blocks(tiny, tmp_path):
    """48 MB of weights in twelve blocks and many shards: whoever keeps them, quantised or not, is seen here."""
    sizes = {"hidden_size": 256, "intermediate_size": 1792, "num_hidden_layers": 12, "num_attention_heads": 4}
    model = tiny.build(**sizes, num_key_value_heads=4, head_dim=64, dtype=torch.bfloat16)
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="6MB")
    tiny.tokenizer().save_pretrained(folder)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert len(list(folder.glob("*.safetensors"))) > 4
    command = [sys.executable, "-c", STREAMED, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < weights / 4


# ---------------------------------------------------------------------------------------------- in words
def test_sizes_and_times_in_words():
    assert [size(count) for count in (0, 1.2345e6, 1.5e9)] == ["0 MB", "1.23 MB", "1.5 GB"]
    assert [duration(seconds) for seconds in (0.4, 75, 600, 7200)] == ["0 s", "75 s", "10 min", "2.0 h"]


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ({}, 0),
        ({"transforms": [{"name": "quarot"}]}, 3 * 4),  # reads no rows; the guard runs four held-out rows thrice
        ({"transforms": [{"name": "smooth"}, {"name": "quarot"}]}, 12 + 2 * 3 * 4),
        ({"activations": {"static": True}}, 12),
        ({"activations": {"clip_ratio": "search"}}, 5 * 9 * 12),  # whole batches
        ({"kv_cache": {"clip_ratio": "search", "static": True, "symmetric": True}}, 12 + 2 * 9 * 12),
        ({"prefix": {}}, 12),
        ({"prefix": {"tokens": [1]}}, 0),
    ],
)
def test_rows_that_pass_before_a_block_is_solved(keys, rows):
    batches = [BatchShape(4, 16), BatchShape(8, 16), BatchShape(4, 16, held_out=True)]
    assert _rows_before(parse_recipe(keys), batches, groups=5) == rows
