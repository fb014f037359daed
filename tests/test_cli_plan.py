"""`bitmend plan` as typed."""

import json
import sys
from pathlib import Path

import pytest

from bitmend import cli
from bitmend.pipeline import machine

FIXED = ["--group-size", "8", "--sequence-length", "12"]


@pytest.fixture
def bitmend(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bitmend", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capsys.readouterr()

    return run


def test_without_calibration_the_rows_of_the_recipe_are_assumed(bitmend, tiny_model, tmp_path):
    code, out, err = bitmend("plan", tiny_model, "--recipe", "gptq", *FIXED)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "forecast\tneeded\tavailable"
    assert "2 blocks, 1,536 calibration tokens, activations in memory" in out
    assert list(tmp_path.iterdir()) == []


def test_with_calibration_its_rows_count(bitmend, tiny_model, tiny_text):
    code, out, _ = bitmend(
        "plan",
        tiny_model,
        "--recipe",
        "marr",
        *FIXED,
        "--calibration",
        tiny_text,
        "--sequences",
        8,
        "--json",
        "plan.json",
    )
    assert code == 0
    assert "2 blocks, 96 calibration tokens" in out
    found = json.loads(Path("plan.json").read_text())
    assert found["host_bytes"] >= max(sum(stage["host"].values()) for stage in found["stages"]) - 1
    assert found["seconds"]["total"] == pytest.approx(
        sum(value for phase, value in found["seconds"].items() if phase != "total")
    )
    assert set(found["available"]) == {"memory", "device", "disk"}
    assert found["activations"] == "memory"


def test_a_run_that_does_not_fit_is_exit_code_2(bitmend, monkeypatch, tiny_model):
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    code, out, err = bitmend("plan", tiny_model, "--recipe", "gptq", *FIXED)
    assert (code, out) == (2, "")
    assert err.startswith("error: the run would take ")
    assert err.endswith("use a machine with more memory\n")


def test_a_wrong_request_is_exit_code_2(bitmend, tiny_model):
    assert bitmend("plan", tiny_model, "--recipe", "gptk")[0] == 2
    assert bitmend("plan", tiny_model, "--json", "none/plan.json")[0] == 2
