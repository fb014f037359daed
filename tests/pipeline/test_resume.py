"""Runs that are stopped at many points and gone on with: the files must be those of a run that was never stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from bitmend.errors import CheckpointError, OutputError, RequestError, ResumeError
from bitmend.formats.folder_lock import FolderLock
from bitmend.formats.record import read_record, write_record
from bitmend.formats.writer import CheckpointWriter
from bitmend.linalg.moments import Moments
from bitmend.pipeline import resume as module
from bitmend.pipeline import run as run_module
from bitmend.pipeline.per_site import PerSite
from bitmend.pipeline.resume import Journal, finished_run, report_from_json
from bitmend.pipeline.run import check_request, report_to_json
from bitmend.protocols import Event, Need, SilentProgress
from bitmend.solvers.rtn import Rtn

NUM_SITES = 14


class Killed(BaseException):
    """Stands for SIGKILL: the run is given no chance to tidy up."""


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def timeless(value):
    """Return nested JSON values without what clocks and memory put there."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not is_measured(key)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def is_measured(key):
    return key in ("seconds", "peak_memory_bytes", "forecast", "output") or key.endswith("_seconds")


def assert_same(one, other):
    """Compare two outputs byte by byte, run.json apart from clocks, memory and its own address."""
    found, expected = snapshot(one), snapshot(other)
    assert set(found) == set(expected)
    for name in set(expected) - {"run.json"}:
        assert found[name] == expected[name], name
    reports = [json.loads(files["run.json"]) for files in (found, expected)]
    assert timeless(reports[0]) == timeless(reports[1])


@pytest.fixture
def kill_at(monkeypatch):
    """Return a context in which a function raises at its k-th call, before or after it has done its work.

    With `Killed` nothing is tidied up, as the process were gone: what lies on the disk stays as it is.
    """

    class At:
        def __init__(self, place, name, k, *, before=False, kind=Killed):
            self.place, self.name, self.k, self.before, self.kind = place, name, k, before, kind

        def __enter__(self):
            self.patch = pytest.MonkeyPatch()
            original, calls = getattr(self.place, self.name), []

            def counted(*arguments, **options):
                calls.append(None)
                if self.before and len(calls) == self.k:
                    raise self.kind
                result = original(*arguments, **options)
                if not self.before and len(calls) == self.k:
                    raise self.kind
                return result

            self.patch.setattr(self.place, self.name, counted)
            if self.kind is Killed:
                self.patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)

        def __exit__(self, *reason):
            self.patch.undo()

    return At


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """What runs of the usual request have left, so that each is made once."""
    return tmp_path_factory.mktemp("earlier")


@pytest.fixture
def whole(run_tiny, earlier, tmp_path):
    """Return the output of a run of the usual request that was never stopped."""
    kept = earlier / "whole"
    if not kept.exists():
        run_tiny("whole")
        shutil.copytree(tmp_path / "whole", kept)
        shutil.rmtree(tmp_path / "whole")
    return kept


@pytest.fixture
def stopped(run_tiny, kill_at, earlier, tmp_path):
    """Return a function that leaves a run behind after its k-th site, killed without a chance to tidy up."""

    def stop(k, output="out", **request):
        kept = earlier / f"after-{k}"
        if request or output != "out" or not kept.exists():
            with pytest.raises(Killed), kill_at(Journal, "keep_site", k):
                run_tiny(output, **request)
            if not request and output == "out":
                shutil.copytree(tmp_path / "out.partial", kept)
        else:
            shutil.copytree(kept, tmp_path / "out.partial")

    return stop


class Said(SilentProgress):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


# ------------------------------------------------------------------------------------------------ bit for bit
QUICK_SITES = (1, 4, 7, 11, NUM_SITES)  # the first, inside a group, the last of a block, inside the next, the last


@pytest.mark.parametrize(
    "k", [pytest.param(k, marks=[] if k in QUICK_SITES else pytest.mark.slow) for k in range(1, NUM_SITES + 1)]
)
def test_a_run_killed_after_any_site_ends_in_the_same_files(run_tiny, whole, stopped, tmp_path, k):
    stopped(k)
    assert not (tmp_path / "out").exists()
    run_tiny(resume=True)
    assert_same(tmp_path / "out", whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


MODELS = {
    "tied": ("llama-tied", torch.float32, {"embedding": {"bits": 4}}),
    "float16": ("llama", torch.float16, {"head": {"bits": 8}, "weights.symmetric": False}),
    "gpt2-bfloat16": ("gpt2", torch.bfloat16, {"overrides": [{"targets": ["re:.*c_proj"], "skip": True}]}),
}
QUICK = {("marr", "tied"), ("descent", "float16"), ("gptaq", "gpt2-bfloat16"), ("gptq", "float16"), ("rtn", "tied")}


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        pytest.param(recipe, kind, marks=[] if (recipe, kind) in QUICK else pytest.mark.slow)
        for recipe in ("rtn", "gptq", "gptaq", "marr", "descent")
        for kind in MODELS
    ],
)
def test_solvers_types_and_ties(run_tiny, stopped, tmp_path, tiny, recipe, kind):
    family, dtype, keys = MODELS[kind]
    source = tiny.save(tmp_path / "source", tiny.build(family, dtype, num_hidden_layers=3))
    request = {"model": source, "recipe": recipe, "keys": {"weights.bits": 3, **keys}}
    whole = run_tiny("whole", **request)
    sites = sum(len(block.sites) for block in whole.blocks)
    stopped(sites // 3 * 2 + 1, **request)
    run_tiny(resume=True, **request)
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("k", [5, 14, *(pytest.param(k, marks=pytest.mark.slow) for k in (13, 29))])
def test_a_mixture_of_experts(run_tiny, stopped, tmp_path, tiny, k):
    """Stopped in and between the steps of the experts, some of which are measured on all tokens."""
    source = tiny.save(tmp_path / "source", tiny.build("qwen3-moe"))
    keys = {"weights.bits": 3, "calibration.min_tokens_per_expert": 30}
    request = {"model": source, "recipe": "marr", "keys": keys}
    whole = run_tiny("whole", **request)
    pooled = [event.where for event in whole.events if event.kind == "pooled_expert"]
    assert 0 < len(pooled) < 24
    stopped(k, **request)
    run_tiny(resume=True, **request)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_a_data_free_run(run_tiny, stopped, tmp_path):
    request = {"recipe": "rtn", "calibration": []}
    run_tiny("whole", **request)
    stopped(9, **request)
    run_tiny(resume=True, **request)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_a_run_may_be_stopped_again_and_again(run_tiny, stopped, tmp_path):
    """Each time it comes two sites further."""
    run_tiny("whole", recipe="marr", keys={"calibration.held_out": 0.5})
    request = {"recipe": "marr", "keys": {"calibration.held_out": 0.5}}
    stopped(2, **request)
    for _ in range(NUM_SITES // 2 - 1):
        stopped(2, resume=True, **request)
    assert not (tmp_path / "out").exists()
    run_tiny(resume=True, **request)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_activations_on_disk_may_differ_between_the_parts_of_a_run(run_tiny, whole, stopped, tmp_path):
    stopped(10, activations_on_disk=True)
    run_tiny(resume=True)
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_an_error_that_may_pass_keeps_a_clean_journal(run_tiny, whole, kill_at, tmp_path, kind):
    with pytest.raises(kind), kill_at(Journal, "keep_site", 9, kind=kind):
        run_tiny(activations_on_disk=True)
    assert {path.name for path in (tmp_path / "out.partial").iterdir()} == {"journal", "parts"}
    assert not list(tmp_path.rglob("*.tmp"))
    run_tiny(resume=True)
    assert_same(tmp_path / "out", whole)


# ------------------------------------------------------------------------------------------------ killed in a write
WRITES = [
    (module, "write_json"),
    (module, "write_record"),
    (Journal, "keep_block"),
    (CheckpointWriter, "add"),
    (CheckpointWriter, "_write_shards"),
    (CheckpointWriter, "_write_document"),
    (CheckpointWriter, "_copy_companions"),
    (CheckpointWriter, "_rename"),
]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("place", "name"), WRITES, ids=[name for _, name in WRITES])
def test_killed_around_a_write(run_tiny, kill_at, tmp_path, place, name, before):
    request = {"recipe": "rtn", "calibration": []}
    run_tiny("whole", **request)
    with pytest.raises(Killed), kill_at(place, name, 1, before=before):
        run_tiny(**request)
    run_tiny(resume=True, **request)
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("k", [1, 2, 6, 10, 17])
@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.slow), 0.99])
def test_killed_in_the_middle_of_a_write(run_tiny, tmp_path, monkeypatch, k, share):
    """The k-th file gets a part of its bytes and no more: what a full page cache and SIGKILL leave."""
    request = {"recipe": "rtn", "calibration": []}
    run_tiny("whole", **request)
    from bitmend.formats import record

    original, calls = record.write_tensors, []

    def torn(path, tensors, metadata):
        calls.append(path)
        original(path, tensors, metadata)
        if len(calls) == k:
            with path.open("r+b") as file:
                file.truncate(int(path.stat().st_size * share))
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_tensors", torn)
        patch.setattr(Path, "unlink", lambda *arguments, **options: None)
        patch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(Killed):
            run_tiny(**request)
    assert calls[-1].exists()
    run_tiny(resume=True, **request)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_killed_between_two_renames_of_an_overwrite(run_tiny, tmp_path, monkeypatch):
    """The old output is put aside, the new one has not its name yet."""
    run_tiny("whole", keys={"weights.bits": 2})
    run_tiny()
    replace = Path.replace

    def kill(self, target):
        if self.name == "model":
            os.fspath(target)
            raise Killed
        if self.name == "out.replaced":
            return None  # a killed process puts nothing back
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill)
        with pytest.raises(Killed):
            run_tiny(keys={"weights.bits": 2}, overwrite=True)
    assert not (tmp_path / "out").exists()
    run_tiny(keys={"weights.bits": 2}, resume=True)
    assert_same(tmp_path / "out", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ real signals
def command(source, text, output, *more):
    arguments = ["quantize", source, "--recipe", "gptq", "--calibration", text, "--output", output]
    arguments += ["--sequences", "8", "--sequence-length", "32", "--group-size", "8", "--quiet", *more]
    return [sys.executable, "-c", "from bitmend.cli import main; main()", *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_real_process_gets_a_signal(tiny, tiny_text, tmp_path, number, code):
    source = tiny.save(tmp_path / "source", tiny.build(num_hidden_layers=24))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(source, tiny_text, tmp_path / "out"), stderr=subprocess.PIPE, text=True, env=environment
    )
    parts, deadline = tmp_path / "out.partial" / "parts", time.monotonic() + 120
    while not (parts.is_dir() and len(list(parts.iterdir())) > 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        assert err.startswith("stopped; ")
        assert err.rstrip().endswith("the same command with --resume goes on")
        assert "finished blocks" in err
        assert not list(tmp_path.rglob("*.tmp"))
    for output, more in (("out", ["--resume"]), ("whole", [])):
        done = subprocess.run(
            command(source, tiny_text, tmp_path / output, *more), capture_output=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seconds"]["before_resume"] > 0


# ------------------------------------------------------------------------------------------------ nothing twice
def test_solved_sites_are_not_solved_and_their_groups_not_measured_again(run_tiny, stopped, monkeypatch):
    """Killed after q, k, v, o and gate of the second block: left are up and down, in two groups."""
    stopped(7 + 5)
    solved, measured = [], []
    solve, measure = PerSite._solve_site, PerSite._measure
    monkeypatch.setattr(
        PerSite,
        "_solve_site",
        lambda self, problem, rows: solved.append(problem.site.path) or solve(self, problem, rows),
    )
    monkeypatch.setattr(
        PerSite, "_measure", lambda self, index, *rest: measured.append(index) or measure(self, index, *rest)
    )
    run_tiny(resume=True)
    assert solved == ["mlp.up_proj", "mlp.down_proj"]
    assert measured == [2, 3]


def test_blocks_are_not_run_again_when_none_is_left(run_tiny, whole, kill_at, tmp_path, monkeypatch):
    with pytest.raises(Killed), kill_at(CheckpointWriter, "finish", 1, before=True):
        run_tiny()
    monkeypatch.setattr("bitmend.pipeline.quantize.DualStream", None)  # would fail if it were reached
    run_tiny(resume=True)
    assert_same(tmp_path / "out", whole)


def test_events_of_a_group_do_not_depend_on_where_a_run_was_stopped(run_tiny, stopped, tmp_path, monkeypatch, add_part):
    """Factors are told with the last site of a group, also those that only an earlier, known site had computed."""

    @dataclass(frozen=True)
    class Factors:
        """The first site of a group is accepted and refitted, all others are dropped."""

        needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_MOMENT})

        def solve(self, problem):
            problem.fit.inverse_factor(0.01, "natural")
            solution = Rtn().solve(problem)
            if problem.site.path.endswith(("q_proj", "gate_proj")):
                return solution
            codes = torch.zeros_like(solution.qtensor.codes)
            return type(solution)(type(solution.qtensor)(codes, solution.qtensor.qparams, solution.qtensor.spec))

    add_part.solver("factors", Factors)
    factor = Moments.inverse_factor

    def with_dead_columns(self, damping, order):
        """As many dead columns as there are tokens: the fit rows and all rows differ."""
        found = factor(self, damping, order)
        return self.remember("told", lambda: type(found)(found.U, found.order, 0.5, damping, self.num_tokens))

    monkeypatch.setattr(Moments, "inverse_factor", with_dead_columns)
    whole = run_tiny("whole", recipe="factors")
    assert any("damping" in event.kind for event in whole.events)
    for k in (1, 2, 5):
        stopped(k, f"out{k}", recipe="factors")
        run_tiny(f"out{k}", recipe="factors", resume=True)
        assert_same(tmp_path / f"out{k}", tmp_path / "whole")


def test_time_before_a_stop_is_counted(run_tiny, stopped):
    stopped(10)
    report = run_tiny(resume=True)
    assert 0 < report.seconds["before_resume"] < report.seconds["total"]
    assert "before_resume" not in run_tiny("whole").seconds


# ------------------------------------------------------------------------------------------------ what resume does
def test_nothing_to_go_on_with_starts_fresh(run_tiny, whole, tmp_path):
    run_tiny(resume=True)
    assert_same(tmp_path / "out", whole)
    (tmp_path / "empty").mkdir()
    run_tiny("empty", resume=True)
    assert_same(tmp_path / "empty", whole)


def test_a_finished_run_is_left_alone(run_tiny, tmp_path, monkeypatch):
    report = run_tiny()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(run_module, "quantise_blocks", None)  # would fail if it were reached
    said = Said()
    again = run_tiny(resume=True, progress=said)
    assert said.lines[-1] == f"nothing to do: {tmp_path / 'out'} is finished, and was made with the same request"
    assert json.dumps(report_to_json(again)) == json.dumps(report_to_json(report))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_finished_but_damaged_output_is_not_taken_for_finished(run_tiny, tmp_path):
    run_tiny()
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="are not those that were written"):
        run_tiny(resume=True)


def test_leftovers_of_a_finished_run_are_removed_unless_they_are_in_use(run_tiny, kill_at, tmp_path):
    with pytest.raises(Killed), kill_at(CheckpointWriter, "abort", 1, before=True):
        run_tiny()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]
    lock = FolderLock(tmp_path / "out.partial")
    run_tiny(resume=True)
    assert (tmp_path / "out.partial").exists()
    lock.release()
    run_tiny(resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_model_that_was_replaced_goes_even_if_the_run_is_killed_while_it_removes_it(run_tiny, kill_at, tmp_path):
    run_tiny()
    older = tmp_path / "older"
    shutil.copytree(tmp_path / "out", older)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(Killed), kill_at(CheckpointWriter, "abort", 1, before=True):
        run_tiny()
    older.rename(tmp_path / "out.replaced")  # as it is until the last of it is removed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial", "out.replaced"]
    run_tiny(resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_stopped_overwrite_goes_on_and_replaces(run_tiny, stopped, tmp_path):
    run_tiny("whole", recipe="rtn")
    run_tiny()
    before = snapshot(tmp_path / "out")
    stopped(9, recipe="rtn", overwrite=True)
    assert snapshot(tmp_path / "out") == before
    run_tiny(recipe="rtn", resume=True)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_without_resume_both_ways_are_named(run_tiny, whole, stopped, tmp_path):
    stopped(3)
    sentence = (
        r"out\.partial exists, left by a stopped run .*pass --resume to go on with it, or --overwrite to replace it"
    )
    with pytest.raises(RequestError, match=sentence):
        run_tiny()
    with pytest.raises(RequestError, match="--resume goes on with a run and --overwrite replaces it; pass one of them"):
        run_tiny(resume=True, overwrite=True)
    run_tiny(overwrite=True)
    assert_same(tmp_path / "out", whole)


# ------------------------------------------------------------------------------------------------ another request
def other_version(monkeypatch):
    versions = run_module.versions()
    monkeypatch.setattr(run_module, "versions", lambda: {**versions, "bitmend": "9.9"})


CHANGES = {
    "recipe": {"keys": {"weights.bits": 3}},
    "calibration rows": {"keys": {"calibration.seed": 1}},
    r"versions \(bitmend 0\.1\.0, now bitmend 9\.9\)": other_version,
    r"thread count \(1, now 7\)": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 7),
    r"device kind \(cpu .*, now abacus\)": lambda patch: patch.setattr(
        "bitmend.pipeline.fingerprint._device_kind", lambda device: "abacus"
    ),
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
@pytest.mark.parametrize("part", CHANGES)
def test_another_request_is_refused_and_named(run_tiny, stopped, tmp_path, monkeypatch, part, finished):
    if finished:
        run_tiny(recipe="rtn")
    else:
        stopped(9, recipe="rtn")
    before = snapshot(tmp_path)
    request = {}
    if callable(CHANGES[part]):
        CHANGES[part](monkeypatch)
    else:
        request = CHANGES[part]
    with pytest.raises(
        ResumeError, match=rf"was made with another .*{part}.*; give the same request to go on, or pass --ov"
    ):
        run_tiny(recipe="rtn", resume=True, **request)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_another_model_is_refused(run_tiny, stopped, tmp_path, tiny, file):
    source = tiny.save(tmp_path / "source", tiny.build())
    stopped(9, model=source)
    path = source / file
    path.write_bytes(path.read_bytes().replace(b'"</s>"', b'"</t>"') + b" " if file != "model.safetensors" else b"")
    if file == "model.safetensors":
        with torch.no_grad():
            changed = tiny.build()
            changed.model.norm.weight[0] = 2.0
        changed.save_pretrained(source)
    with pytest.raises(ResumeError, match=r"was made with another model; give the same request"):
        run_tiny(model=source, resume=True)


def test_a_dry_run_says_the_same(stopped, tiny_model, tiny_text, tmp_path):
    keys = {"weights.group_size": 8, "weights.observer": "minmax", "calibration.sequences": 8}
    keys["calibration.sequence_length"] = 12
    stopped(9)
    options = {"output": tmp_path / "out", "resume": True}
    assert check_request(tiny_model, "gptq", [tiny_text], overrides=keys, **options) == tmp_path / "out"
    with pytest.raises(ResumeError, match="was made with another recipe, another calibration rows"):
        check_request(tiny_model, "gptq", [tiny_text], overrides={**keys, "calibration.seed": 1}, **options)


def test_a_model_of_somebody_else_is_neither_gone_on_with_nor_replaced(run_tiny, tmp_path, tiny):
    tiny.save(tmp_path / "out", tiny.build())
    before = snapshot(tmp_path / "out")
    with pytest.raises(ResumeError, match="does not say what it was made with, so it cannot be gone on with"):
        run_tiny(resume=True)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.txt").write_text("")
    with pytest.raises(ResumeError, match="holds no journal of a run, so there is nothing to go on with"):
        run_tiny("other", resume=True)
    assert (tmp_path / "other.partial" / "thesis.txt").exists()
    assert snapshot(tmp_path / "out") == before


def test_a_machine_that_computes_otherwise_is_found_out(run_tiny, stopped, tmp_path, monkeypatch):
    """The fingerprint is equal, but a finished block run again does not give the error that it had."""
    stopped(9)
    monkeypatch.setattr("bitmend.calibrate.dual_stream.DualStream.relative_error", lambda self: 0.25)
    with pytest.raises(
        ResumeError, match=r"model\.layers\.0 was finished with a relative error of .* but run again it has 0\.25"
    ):
        run_tiny(resume=True)
    monkeypatch.undo()
    assert (tmp_path / "out.partial").exists()


# ------------------------------------------------------------------------------------------------ damaged journals
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"journal_version": 1}', b"\xff\xfe", b'{"a": 1, "a": 2}'])
def test_a_damaged_head_is_refused(run_tiny, stopped, tmp_path, content):
    stopped(9)
    (tmp_path / "out.partial" / "journal" / "journal.json").write_bytes(content)
    before = snapshot(tmp_path)
    with pytest.raises(ResumeError, match=r"journal\.json .*pass --overwrite to start again, or choose another output"):
        run_tiny(resume=True)
    assert snapshot(tmp_path) == before
    run_tiny(overwrite=True)


def test_a_journal_of_another_version_is_refused(run_tiny, stopped, tmp_path):
    stopped(9)
    path = tmp_path / "out.partial" / "journal" / "journal.json"
    path.write_text(path.read_text().replace('"journal_version": 2', '"journal_version": 1'))
    with pytest.raises(
        ResumeError, match="has journal_version 1, this release of bitmend goes on with 2; go on with the"
    ):
        run_tiny(resume=True)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_last(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def flip_number(path):
    """A digit in the report, which lies in the header: the file is still well-formed."""
    content = path.read_bytes()
    place = content.index(b"seconds") + 14
    path.write_bytes(content[:place] + (b"3" if content[place : place + 1] != b"3" else b"4") + content[place + 1 :])


DAMAGE = [cut, flip_last, flip_number, Path.unlink, lambda path: path.write_bytes(b"")]


@pytest.mark.parametrize("damage", DAMAGE, ids=["cut", "codes", "report", "gone", "empty"])
@pytest.mark.parametrize("file", ["journal/0001-0001.safetensors", "parts/0000.safetensors"])
def test_damaged_files_are_not_believed(run_tiny, whole, stopped, tmp_path, file, damage):
    """What lies before is kept, what lies behind is done again."""
    stopped(11)
    damage(tmp_path / "out.partial" / file)
    said = Said()
    run_tiny(resume=True, progress=said)
    assert_same(tmp_path / "out", whole)
    assert any("is not believed, and the run goes on from before it" in line for line in said.lines) == (
        damage is not Path.unlink
    )


def test_a_site_of_another_block_is_refused(run_tiny, stopped, tmp_path):
    stopped(9)
    path = tmp_path / "out.partial" / "journal" / "0001-0000.safetensors"
    tensors, values = read_record(path)
    write_record(path, tensors, {**values, "site": "model.layers.7.self_attn.q_proj"})
    with pytest.raises(
        ResumeError, match=r"holds model\.layers\.7\.self_attn\.q_proj, which is no site of model\.layers\.1"
    ):
        run_tiny(resume=True)


@pytest.mark.parametrize("value", [3, [], None, {}])
def test_a_fingerprint_that_is_no_text_is_refused(run_tiny, stopped, tmp_path, value):
    stopped(9)
    path = tmp_path / "out.partial" / "journal" / "journal.json"
    head = json.loads(path.read_text())
    head["fingerprint"]["versions"] = value
    path.write_text(json.dumps(head))
    with pytest.raises(ResumeError, match="must hold a fingerprint and replaces_output"):
        run_tiny(resume=True)


@pytest.mark.parametrize("key", ["blocks", "events", "model", "fingerprint"])
def test_a_finished_report_of_other_values_is_refused(run_tiny, tmp_path, key):
    run_tiny()
    path = tmp_path / "out" / "run.json"
    values = json.loads(path.read_text())
    values[key] = dict.fromkeys(values[key], 3) if key == "fingerprint" else [3]
    if key == "model":
        values["unknown"] = 3
    path.write_text(json.dumps(values))
    with pytest.raises((CheckpointError, ResumeError), match=r"does not hold what a run writes|was made with another"):
        run_tiny(resume=True)


@pytest.mark.parametrize("key", ["report", "seconds", "events", "spec", "shape", "kind", "sites"])
@pytest.mark.parametrize("file", ["journal/0001-0000.safetensors", "parts/0000.safetensors"])
def test_forged_records_are_refused_or_not_believed(run_tiny, whole, stopped, tmp_path, file, key):
    """Values that no run writes, under a checksum that is right."""
    stopped(9)
    path = tmp_path / "out.partial" / file
    tensors, values = read_record(path)
    write_record(path, tensors, {**values, key: [3]})
    try:
        run_tiny(resume=True)
    except (CheckpointError, ResumeError) as error:
        assert re.search(r"does not hold what a run writes there|which is no site of", str(error))  # noqa: PT017
    else:
        assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize("name", ["journal", "parts"])
def test_nothing_is_touched_through_a_link(run_tiny, stopped, tmp_path, name):
    stopped(9)
    inside = tmp_path / "out.partial" / name
    inside.rename(tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path / "elsewhere")
    with pytest.raises(
        ResumeError, match=rf"{name} is a link, and a run makes none; do not trust this folder, and pass"
    ):
        run_tiny(resume=True)
    assert snapshot(tmp_path / "elsewhere") == before


def test_a_folder_in_the_place_of_a_site_is_removed(run_tiny, whole, stopped, tmp_path):
    stopped(9)
    path = tmp_path / "out.partial" / "journal" / "0001-0001.safetensors"
    path.unlink()
    path.mkdir()
    run_tiny(resume=True)
    assert_same(tmp_path / "out", whole)


# ------------------------------------------------------------------------------------------------ folders
def test_a_partial_folder_that_is_a_file(run_tiny, tmp_path):
    (tmp_path / "out.partial").write_text("")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RequestError, match=r"out\.partial is a file; choose another name"):
            run_tiny(**options)


def test_a_partial_folder_that_cannot_be_written(run_tiny, stopped, monkeypatch):
    """The superuser, who runs tests in containers, may write anywhere; so the refusal is played."""
    stopped(9)

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "write_json", refuse)
    with pytest.raises(OutputError, match=r"writing .*out failed: Permission denied"):
        run_tiny(resume=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder(run_tiny, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RequestError, match="cannot be made: Permission denied; choose another"):
        run_tiny()
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_a_second_run_on_the_same_output_is_refused(run_tiny, stopped, tmp_path, options, add_part):
    stopped(9)
    before = snapshot(tmp_path)
    lock = FolderLock(tmp_path / "out.partial")
    with pytest.raises(RequestError, match=r"another run is writing .*out\.partial; wait until it has ended"):
        run_tiny(**options)
    assert snapshot(tmp_path) == before
    lock.release()
    run_tiny(**options)


def test_a_run_holds_the_lock_while_it_works(run_tiny, tmp_path, add_part):
    @dataclass(frozen=True)
    class Looks:
        needs: ClassVar[frozenset] = frozenset()

        def solve(self, problem):
            with pytest.raises(RequestError, match="another run is writing"):
                FolderLock(tmp_path / "out.partial")
            return Rtn().solve(problem)

    add_part.solver("looks", Looks)
    run_tiny(recipe="looks")


# ------------------------------------------------------------------------------------------------ reports
def test_a_report_survives_its_file(run_tiny):
    report = run_tiny(recipe="marr")
    plain = json.loads(json.dumps(report_to_json(report)))
    assert report_to_json(report_from_json(plain)) == plain
    assert report_from_json({**plain, "events": [vars(Event("a", "b", "c", True))]}).events == [
        Event("a", "b", "c", True)
    ]


def test_an_output_that_is_not_there_is_not_finished(tmp_path):
    assert finished_run(tmp_path / "none", {}) is None
    (tmp_path / "empty").mkdir()
    assert finished_run(tmp_path / "empty", {}) is None


def test_a_run_killed_while_it_removes_its_partial_folder_is_tidied_up(run_tiny, tmp_path, monkeypatch):
    """At whichever removal: the journal goes last, so that what is left still says which run it belongs to."""
    original, left = os.unlink, []
    for k in range(1, 30):
        seen = 0

        def unlink(path, *, dir_fd=None, k=k):
            nonlocal seen
            seen += (tmp_path / "out").exists()
            if seen == k:
                raise Killed
            return original(path, dir_fd=dir_fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            try:
                run_tiny(recipe="rtn", calibration=[])
            except Killed:
                left.append((tmp_path / "out.partial").exists())
        if len(left) < k:
            break
        run_tiny(recipe="rtn", calibration=[], resume=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"], k
        shutil.rmtree(tmp_path / "out")
    assert len(left) > 3
    assert all(left)


def test_an_empty_partial_folder_beside_a_finished_output_is_removed(run_tiny, tmp_path):
    run_tiny()
    (tmp_path / "out.partial" / "journal").mkdir(parents=True)
    run_tiny(resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
