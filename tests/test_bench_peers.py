"""The parts of benchmarks/peers that decide what its tables say: measuring, failing loudly, resuming, ratios, bits."""

import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

PEERS = Path(__file__).parent.parent / "benchmarks" / "peers"
PREAMBLE = f"import sys, time\nsys.path.append({str(PEERS)!r})\nimport protocol\nrun = protocol.start()\n"
MIB = 2**20


@pytest.fixture(autouse=True)
def peers_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(PEERS))


def module(name):
    return importlib.import_module(name)


def run_fake(tmp_path, body, **options):
    script = tmp_path / "quantise.py"
    script.write_text(PREAMBLE + body)
    (tmp_path / "output" / "model").mkdir(parents=True)
    request = {"model": "m", "rows": None, "method": "x", "bits": 4, "group_size": 128, "threads": 1}
    request |= {"settings": {}, "output": str(tmp_path / "output")}
    work = tmp_path / "work"
    return module("measure").run_script(sys.executable, script, request, work, environment=dict(os.environ), **options)


# ---------------------------------------------------------------------------------------------- one run
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_counted_above_the_baseline_and_with_descendants(tmp_path):
    body = f"""
before = bytearray({80 * MIB})
run.take_baseline()
with run.phase("quantise"):
    after = bytearray(b"1") * {64 * MIB}
    import subprocess
    child = "x = bytearray(b'1') * {48 * MIB}; import time; time.sleep(0.5)"
    subprocess.run([sys.executable, "-c", child], check=True)
    del after
run.finish(run.output / "model", "folder")
"""
    record = run_fake(tmp_path, body)
    assert record["status"] == "ok"
    assert record["checkpoint"] == "model"
    assert 105 * MIB < record["memory"]["anonymous"] < 145 * MIB  # 64 and 48, and the child's interpreter
    assert record["seconds"]["wall"] > record["seconds"]["quantise"] > 0.5
    assert 0 < record["cpu"]["quantise"] < record["seconds"]["quantise"]  # it slept for half a second
    if "rss_high_water" in record["memory"]:  # of the main process alone
        assert 60 * MIB < record["memory"]["rss_high_water"] < 80 * MIB


def test_a_failure_carries_the_last_line_of_the_exception(tmp_path):
    record = run_fake(tmp_path, 'print("some noise")\nraise ValueError("no such kernel")\n')
    assert record["status"] == "failed"
    assert record["reason"] == "ValueError: no such kernel"


def test_a_script_that_ends_well_without_an_answer_has_failed(tmp_path):
    assert run_fake(tmp_path, "")["reason"] == "ended with exit code 0 and said nothing"


def test_what_a_tool_cannot_do_is_no_failure(tmp_path):
    record = run_fake(tmp_path, 'protocol.unsupported("packs 4 and 8 bits only")\n')
    assert (record["status"], record["reason"]) == ("unsupported", "packs 4 and 8 bits only")


def test_a_run_that_takes_too_long_is_ended(tmp_path):
    record = run_fake(tmp_path, "time.sleep(60)\n", timeout=0.5)
    assert (record["status"], record["reason"]) == ("failed", "stopped after 0.5 s")


# ---------------------------------------------------------------------------------------------- the driver
def bench_main(monkeypatch, output, *arguments):
    """Run the driver with no environment installed, and return its exit code."""
    command = ["bench_peers.py", "--output", str(output), "--environments", str(output / "none"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        module("bench_peers").main()
    return ended.value.code


def test_tools_that_are_not_installed_are_rows_and_stop_nobody(tmp_path, monkeypatch, capsys):
    arguments = ("--timing", "--tools", "gptqmodel", "--models", "books-7m", "--threads", "1", "--repeats", "1")
    assert bench_main(monkeypatch, tmp_path, *arguments) == 1
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["key"]["name"] for line in lines] == ["gptqmodel gptq", "gptqmodel gptaq"]
    assert all(line["status"] == "failed" and line["reason"].startswith("not installed") for line in lines)
    assert "failed: " in capsys.readouterr().out
    # A second call repeats nothing, but still tells of it.
    assert bench_main(monkeypatch, tmp_path, *arguments) == 1
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_a_missing_text_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("BITMEND_ASSETS", raising=False)
    assert "wikitext2-test" in bench_main(monkeypatch, tmp_path)


def test_contestants_have_scripts_and_names_of_their_own():
    contestants = module("contestants")
    for group in (contestants.ACCURACY, contestants.TIMING, contestants.TUNE):
        assert len({one.name for one in group}) == len(group)
        assert all((PEERS / one.tool / "quantise.py").is_file() for one in group)
    names = {one.name for one in contestants.TIMING}
    assert all(ours in names and theirs in names for ours, theirs in module("tables").PAIRS)


@pytest.mark.parametrize("peer", ["gptqmodel", "llm-compressor", "auto-round", "hqq"])
def test_requirements_are_exact_and_begin_with_torch(peer):
    assert peer in module("environments").PEERS
    lines = (PEERS / peer / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins[0] == "torch==2.13.0"
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*", pin) for pin in pins)  # no local builds, no addresses
    assert not any(pin.lower().startswith("torchvision") for pin in pins)


# ---------------------------------------------------------------------------------------------- tables
def timing_line(name, repeat, wall, anonymous):
    seconds = {"wall": wall, "load": 0.0, "quantise": wall / 2, "save": 0.0, "solver": 1.0}
    key = {"part": "timing", "name": name, "model": "books-7m", "bits": 4, "threads": 1, "repeat": repeat}
    memory = {"rss": MIB, "anonymous": anonymous * MIB}
    return {"key": key, "status": "ok", "seconds": seconds, "cpu": {"imports": 9.0, "quantise": 2.0}, "memory": memory}


def test_ratios_are_taken_within_a_round():
    lines = [timing_line("bitmend gptq", repeat, wall, 10) for repeat, wall in enumerate((10.0, 40.0, 30.0))]
    lines += [timing_line("gptqmodel gptq", repeat, wall, 40) for repeat, wall in enumerate((20.0, 40.0, 40.0))]
    lines.append(timing_line("bitmend gptq", 3, 99.0, 10))  # nothing to compare it with yet
    row = next(
        line for line in module("tables").timing_table(lines, "timing").splitlines() if "bitmend gptq / " in line
    )
    assert "| 3 | 0.75 (0.50 .. 1.00) |" in row  # not 30 / 40 of the medians over all
    assert row.endswith("| 0.25 (0.25 .. 0.25) |")


def test_reasons_stand_in_the_table():
    key = {"part": "accuracy", "name": "gptqmodel gptq", "model": "books-7m", "bits": 3, "draw": 0}
    table = module("tables").accuracy_table([{"key": key, "status": "unsupported", "reason": "packs 4 bits only"}])
    assert "| gptqmodel gptq | 3 | - | unsupported: packs 4 bits only |" in table


# ---------------------------------------------------------------------------------------------- scores
def test_bits_counted_by_a_script_replace_those_of_its_dense_file(tmp_path):
    from bitmend import assets, ledger

    plain = ledger(assets.path("books-7m"))
    notes = {"quantised_bits": 4.25 * 1000, "quantised_weights": 1000}
    found = module("score").bits_of(tmp_path, notes, assets.path("books-7m"))
    assert found["layers"] == 4.25
    assert found["model"] == pytest.approx(plain.bits_per_weight_model - (16 - 4.25) * 1000 / plain.parameters)


@pytest.mark.slow
def test_the_same_codes_score_the_same_in_anybodys_file(tmp_path):
    import bitmend
    from bitmend import assets
    from bitmend.formats.compressed_tensors import CompressedTensors

    score = module("score")
    model = assets.path("stories-260k")
    keys = {"weights.bits": 4, "weights.group_size": -1}
    bitmend.quantize(model, "rtn", output=tmp_path / "ours", overrides=keys)
    CompressedTensors().export(tmp_path / "ours", tmp_path / "theirs")
    texts, cache = {"books-eval": assets.path("books-eval")}, tmp_path / "cache"
    few = {"windows": 4}
    ours = score.score(tmp_path / "ours", "folder", {}, model, texts, cache, **few)
    theirs = score.score(tmp_path / "theirs", "quantized", {}, model, texts, cache, **few)
    assert theirs["scores"]["books-eval"]["kl"] == pytest.approx(ours["scores"]["books-eval"]["kl"], rel=1e-4)
    assert theirs["bits"]["layers"] == pytest.approx(ours["bits"]["layers"], abs=0.1)
