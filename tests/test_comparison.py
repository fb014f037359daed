"""Comparisons of recipes on tiny models, as a library call and as a command."""

import errno
import json
import sys
from dataclasses import dataclass, fields
from typing import ClassVar

import pytest

import bitmend
from bitmend import cli
from bitmend import comparison as comparison_module
from bitmend.errors import GuardError, NumericsError, OutputError, RecipeError, RequestError
from bitmend.evaluate.results import TextResult
from bitmend.protocols import Event, Solution
from bitmend.report.comparison import Entry, check_comparison
from bitmend.solvers.rtn import Rtn

KEYS = {
    "weights.bits": 3,
    "weights.group_size": 8,
    "weights.observer": "minmax",
    "calibration.sequences": 8,
    "calibration.sequence_length": 12,
}
FOLDERS = ["comparison.json", "models", "reference-cache"]


@dataclass(frozen=True)
class Breaks:
    """Rounds to nearest until it comes to the second block."""

    needs: ClassVar[frozenset] = frozenset()
    kind: ClassVar[type[BaseException]] = NumericsError

    def solve(self, problem):
        if problem.site.name == "model.layers.1.mlp.up_proj":
            raise self.kind("it broke on the way")
        return Rtn().solve(problem)


@dataclass(frozen=True)
class Degrades:
    """Rounds to nearest, and says at each site that this was not what was asked for."""

    needs: ClassVar[frozenset] = frozenset()

    def solve(self, problem):
        return Solution(Rtn().solve(problem).qtensor, {}, (Event("fallback", problem.site.name, "fell back", True),))


@pytest.fixture(scope="session")
def eval_text(tmp_path_factory, tiny):
    return tiny.write_text(tmp_path_factory.mktemp("texts") / "unseen.txt", 200, seed=1)


@pytest.fixture
def compare_tiny(tmp_path, tiny_model, tiny_text, eval_text):
    """Compare on the tiny llama into `out`; options win over the settings here."""

    def run(*recipes, model=None, calibration=None, output="out", keys=None, **options):
        given = {"texts": [eval_text], "windows": 4, "window_length": 16, **options}
        rows = [tiny_text] if calibration is None else calibration
        overrides = {**KEYS, **(keys or {})}
        return bitmend.compare(
            model or tiny_model, recipes, rows, output=tmp_path / output, overrides=overrides, **given
        )

    return run


@pytest.fixture
def quantised(monkeypatch):
    """The labels that are quantised from now on."""
    labels = []
    original = comparison_module.quantize

    def count(*arguments, output, **options):
        labels.append(output.name)
        return original(*arguments, output=output, **options)

    monkeypatch.setattr(comparison_module, "quantize", count)
    return labels


def record(folder):
    return json.loads((folder / "comparison.json").read_text())


def refuse_constant(name):
    raise AssertionError(f"{name} in a JSON file")


# ------------------------------------------------------------------------------------------------ three recipes
def test_three_recipes_on_the_same_rows(compare_tiny, tmp_path, tiny_model):
    found = compare_tiny("rtn,gptq", "gptaq-1=gptaq:solver.residual_strength=1.0")
    check_comparison(found)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == FOLDERS
    assert [entry.label for entry in found.entries] == ["rtn", "gptq", "gptaq-1"]
    assert {entry.calibration_sha256 for entry in found.entries} == {found.calibration["sha256"]}
    for entry in found.entries:
        folder = out / "models" / entry.label
        assert entry.output == f"models/{entry.label}"
        assert json.loads((folder / "run.json").read_text())["calibration"] == found.calibration
        account = bitmend.ledger(folder)
        assert entry.bits == {
            "quantised_layers": account.bits_per_weight,
            "whole_model": account.bits_per_weight_model,
        }
        assert entry.sites == 14
        assert entry.final_block_error > 0
    rtn, gptq, gptaq = found.entries
    assert rtn.error_ratio == 1.0  # measured like the others, against itself
    assert 0 < gptq.error_ratio <= 1
    assert 0 < gptaq.error_ratio <= 1
    assert gptaq.recipe["solver"] == {"name": "gptaq", "residual_strength": 1.0}
    assert found.reference["bits"] == bitmend.ledger(tiny_model).bits_per_weight_model


def test_rows_leave_room_for_a_prefix(compare_tiny, tiny, tmp_path):
    """Rows as long as the context would refuse the second recipe."""
    model = tiny.save(tmp_path / "model", tiny.build("llama", max_position_embeddings=16))
    keys = {"calibration.sequence_length": None}
    found = compare_tiny("rtn", "front=rtn:prefix.tokens=[1,2]", model=model, keys=keys)
    assert [(entry.label, entry.error) for entry in found.entries] == [("rtn", None), ("front", None)]
    assert found.calibration["longest_sequence"] == 14


def test_scores_are_those_of_evaluate(compare_tiny, tmp_path, tiny_model, eval_text, monkeypatch):
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "cache"))
    found = compare_tiny("rtn,gptq")
    folders = [tiny_model, *(tmp_path / "out" / "models" / label for label in ("rtn", "gptq"))]
    wanted = bitmend.evaluate(folders, texts=[eval_text], reference=tiny_model, windows=4, window_length=16)
    for result, texts in zip(wanted.models, [found.reference["texts"], *(e.texts for e in found.entries)], strict=True):
        assert [text["kl"] for text in texts] == [text.kl for text in result.texts]
        assert [text["perplexity"] for text in texts] == [text.perplexity for text in result.texts]
    assert found.reference["texts"][0]["kl"] == 0.0


def test_the_record(compare_tiny, tmp_path, eval_text):
    found = compare_tiny("rtn,gptq")
    text = (tmp_path / "out" / "comparison.json").read_text()
    plain = json.loads(text, parse_constant=refuse_constant)
    assert text == found.to_json()
    assert set(plain) == {
        "model", "model_sha256", "calibration", "texts", "windows", "window_length", "device", "versions", "reference",
        "entries", "layout",
    }  # fmt: skip
    assert plain["texts"][0]["file"] == str(eval_text)
    assert set(plain["entries"][0]) == {field.name for field in fields(Entry)}
    assert set(plain["entries"][0]["texts"][0]) == {field.name for field in fields(TextResult)}
    assert plain["entries"][1]["texts"][0]["kl_standard_error"] > 0
    assert {"total", "solve", "forward"} <= set(plain["entries"][1]["seconds"])


def test_models_can_be_discarded(compare_tiny, tmp_path):
    found = compare_tiny("rtn", keep_models=False)
    assert found.entries[0].measured
    folder = tmp_path / "out" / "models" / "rtn"
    assert sorted(path.name for path in folder.iterdir()) == ["ledger.json", "recipe.toml", "run.json"]


# ------------------------------------------------------------------------------------------------ going on
def test_resume_runs_only_what_is_missing(compare_tiny, tmp_path, quantised):
    compare_tiny("rtn")
    before = record(tmp_path / "out")
    found = compare_tiny("gptq", resume=True)
    assert quantised == ["rtn", "gptq"]
    assert [entry.label for entry in found.entries] == ["rtn", "gptq"]
    assert record(tmp_path / "out")["entries"][0] == before["entries"][0]
    compare_tiny("rtn,gptq", resume=True)
    assert quantised == ["rtn", "gptq"]


def test_resume_without_anything_starts_anew(compare_tiny, tmp_path, quantised):
    (tmp_path / "out").mkdir()
    compare_tiny("rtn", resume=True)
    assert quantised == ["rtn"]


def test_ctrl_c_keeps_what_is_finished(compare_tiny, tmp_path, add_part, quantised):
    add_part.solver("stops", type("Stops", (Breaks,), {"kind": KeyboardInterrupt}))
    with pytest.raises(KeyboardInterrupt):
        compare_tiny("rtn,stops,gptq")
    assert [entry["label"] for entry in record(tmp_path / "out")["entries"]] == ["rtn"]
    models = tmp_path / "out" / "models"
    assert {path.name for path in models.iterdir()} == {"rtn", "stops.partial"}
    add_part.solver("stops", Rtn)
    found = compare_tiny("rtn,stops,gptq", resume=True)
    assert quantised == ["rtn", "stops", "stops", "gptq"]
    assert {path.name for path in models.iterdir()} == {"rtn", "stops", "gptq"}
    check_comparison(found)


def test_a_model_that_was_not_scored_is_made_again(compare_tiny, tmp_path, monkeypatch, quantised):
    original = comparison_module.evaluate

    def stop(models, **options):
        if models[0].name == "rtn":
            raise KeyboardInterrupt
        return original(models, **options)

    monkeypatch.setattr(comparison_module, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        compare_tiny("rtn")
    monkeypatch.setattr(comparison_module, "evaluate", original)
    compare_tiny("rtn", resume=True)
    assert quantised == ["rtn", "rtn"]


def test_another_fingerprint_is_refused_by_part(compare_tiny, tiny, tmp_path, eval_text, quantised):
    compare_tiny("rtn,a=gptq")
    before = record(tmp_path / "out")
    other_model = tiny.save(tmp_path / "other", tiny.build(initializer_range=0.3))
    other_text = tiny.write_text(tmp_path / "other.txt", 200, seed=2)
    cases = [
        ("model", "rtn", {"model": other_model}),
        ("calibration rows", "rtn", {"keys": {"calibration.seed": 5}}),
        ("evaluation texts", "rtn", {"texts": [other_text]}),
        ("evaluation texts", "rtn", {"texts": [eval_text, other_text]}),
        ("evaluation windows", "rtn", {"windows": 3}),
        ("recipe 'a'", "a=gptq:solver.damping=0.5", {}),
        ("evaluation windows, another recipe 'a'", "a=rtn", {"window_length": 8}),
    ]
    for words, recipes, options in cases:
        sentence = rf"out holds a comparison with another {words}; choose another output, or pass --overwrite"
        if "calibration.seed" in options.get("keys", {}):  # the seed is a recipe's key as well
            sentence = r"with another calibration rows, another recipe 'rtn'; choose"
        with pytest.raises(RequestError, match=sentence) as caught:
            compare_tiny(recipes, resume=True, **options)
        assert caught.value.exit_code == 2
    assert record(tmp_path / "out") == before
    assert quantised == ["rtn", "a"]


def test_texts_may_move(compare_tiny, tmp_path, eval_text, quantised):
    compare_tiny("rtn")
    moved = tmp_path / "moved.txt"
    moved.write_bytes(eval_text.read_bytes())
    found = compare_tiny("rtn", resume=True, texts=[moved])
    assert found.texts[0]["file"] == str(moved)
    assert quantised == ["rtn"]


def test_overwrite_begins_anew_and_touches_nothing_else(compare_tiny, tmp_path, quantised):
    compare_tiny("rtn,gptq")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    found = compare_tiny("a=rtn", overwrite=True, windows=2)
    assert [entry.label for entry in found.entries] == ["a"]
    assert [path.name for path in (tmp_path / "out" / "models").iterdir()] == ["a"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*FOLDERS, "notes.txt"])
    assert quantised == ["rtn", "gptq", "a"]


# ------------------------------------------------------------------------------------------------ failures
def test_a_failed_recipe_does_not_stop_the_rest(compare_tiny, tmp_path, add_part, quantised):
    add_part.solver("breaks", Breaks)
    found = compare_tiny("breaks,rtn")
    broken, rtn = record(tmp_path / "out")["entries"]
    assert (broken["status"], broken["error"], broken["texts"]) == ("failed", "it broke on the way", [])
    assert rtn["status"] == "done"
    with pytest.raises(GuardError, match=r"1 of 2 recipes failed \(first: breaks: it broke on the way\)"):
        check_comparison(found)
    add_part.solver("breaks", Rtn)
    check_comparison(compare_tiny("breaks,rtn", resume=True))  # what failed is tried again
    assert quantised == ["breaks", "rtn", "breaks"]


def test_a_failed_recipe_that_is_no_longer_wanted_is_gone(compare_tiny, add_part):
    add_part.solver("breaks", Breaks)
    compare_tiny("breaks,rtn")
    assert [entry.label for entry in compare_tiny("rtn,gptq", resume=True).entries] == ["rtn", "gptq"]


def test_a_grid_that_does_not_fit_is_a_failure_of_its_recipe(compare_tiny):
    found = compare_tiny("wide=rtn:weights.group_size=16,rtn")
    assert [entry.status for entry in found.entries] == ["failed", "done"]
    assert "group_size must divide the width" in found.entries[0].error


def test_a_run_that_breaks_its_guard_is_scored_and_failed(compare_tiny, add_part, quantised):
    add_part.solver("degrades", Degrades)
    (entry,) = compare_tiny("degrades").entries
    assert (entry.status, entry.events, entry.degraded) == ("failed", 14, 14)
    assert "14 of 14 sites did not get what was asked for" in entry.error
    assert entry.texts[0]["kl"] > 0
    compare_tiny("degrades", resume=True)  # it would come out the same again
    assert quantised == ["degrades"]


def test_a_full_disk_under_the_record(compare_tiny, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(comparison_module, "sync", full)
    with pytest.raises(OutputError, match=r"comparison\.json could not be written: No space left on device"):
        compare_tiny("rtn")


def test_what_cannot_be_removed_is_named(compare_tiny, monkeypatch):
    compare_tiny("rtn")

    def refuse(path):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(comparison_module.shutil, "rmtree", refuse)
    with pytest.raises(OutputError, match=r"models could not be removed: Permission denied"):
        compare_tiny("rtn", overwrite=True)


# ------------------------------------------------------------------------------------------------ refused at once
def test_a_request_that_cannot_be(compare_tiny, tmp_path, tiny_text):
    short = tmp_path / "short.txt"
    short.write_text("w3 w4")
    cases = [
        ("a comparison needs at least one text to score models on", {"texts": []}),
        ("a comparison needs calibration rows, but none came; pass --calibration FILE", {"calibration": []}),
        (
            "--resume goes on with a comparison and --overwrite replaces it; pass one",
            {"resume": True, "overwrite": True},
        ),
        ("windows must fit the model's context of 64 tokens, but they have 65", {"window_length": 65}),
        ("at least one window of 16 tokens is required, but the text has 2", {"texts": [short]}),
        ("a text file is required, but there is none", {"texts": [tmp_path / "none.txt"]}),
        ("sequence_length must be at most the model's context", {"keys": {"calibration.sequence_length": 65}}),
        ("the model folder .* does not exist", {"model": tmp_path / "none"}),
        ("is a file; choose another name", {"output": "short.txt"}),
    ]
    for sentence, options in cases:
        with pytest.raises(RequestError, match=sentence):
            compare_tiny("gptq", **options)
    with pytest.raises(RecipeError, match="all recipes of a comparison must share their calibration rows"):
        compare_tiny("gptq,b=gptq:calibration.seed=1")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_an_existing_folder_is_not_touched_unasked(compare_tiny, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RequestError, match=r"out exists already; pass --resume to go on with it, or --overwrite to"):
        compare_tiny("rtn")
    (tmp_path / "out" / "thesis.txt").write_text("the only copy")
    for choice in ("resume", "overwrite"):
        with pytest.raises(RequestError, match=r"is not empty and holds no comparison\.json, so it is neither"):
            compare_tiny("rtn", **{choice: True})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_the_model_is_neither_in_the_output_nor_around_it(compare_tiny, tmp_path, tiny):
    compare_tiny("rtn")
    inside = tiny.save(tmp_path / "out" / "models" / "mine", tiny.build())
    for output in ("out", "out/models/mine", "out/models/mine/out"):
        with pytest.raises(RequestError, match=r"must lie outside the model folder .*, and must not hold it"):
            compare_tiny("rtn", model=inside, output=output, overwrite=True)
    assert (inside / "config.json").exists()


# ------------------------------------------------------------------------------------------------ the command
@pytest.fixture
def command(monkeypatch, capsys, tmp_path, tiny_model, tiny_text, eval_text):
    """Run `bitmend compare` on the tiny llama; return exit code, standard output, standard error."""
    monkeypatch.setattr(cli, "_be_quiet_about_libraries", lambda: None)
    fixed = ["--sequences", "8", "--sequence-length", "12", "--group-size", "8", "--bits", "3", "--set"]
    fixed += ["weights.observer=minmax", "--windows", "4", "--window-length", "16", "--calibration", tiny_text]

    def run(recipes, *more):
        target = ["--recipes", recipes, "--output", tmp_path / "out", "--text", eval_text]
        words = ["bitmend", "compare", tiny_model, *target, *fixed, *more]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_the_table_is_sorted_by_divergence(command, tmp_path):
    code, out, _ = command("rtn,gptq,gptaq", "--discard-models")
    assert code == 0
    header, *rows = [line.split("\t") for line in out.splitlines()]
    assert header[0] == "recipe"
    assert rows[0][0] == "full precision"
    kls = {entry["label"]: entry["texts"][0]["kl"] for entry in record(tmp_path / "out")["entries"]}
    assert [row[0] for row in rows[1:]] == sorted(kls, key=kls.get)
    assert {row[-1] for row in rows[1:]} == {"done"}
    bits = {entry["bits"]["quantised_layers"] for entry in record(tmp_path / "out")["entries"]}
    assert {float(row[1]) for row in rows[1:]} == bits
    assert min(bits) >= 3 + 16 / 8  # codes, and a scale of at least 16 bits for each 8 weights


def test_a_failed_recipe_exits_1_after_the_table(command, add_part):
    add_part.solver("breaks", Breaks)
    code, out, err = command("breaks,rtn", "--quiet")
    assert code == 1
    assert [line.split("\t")[0] for line in out.splitlines()] == ["recipe", "full precision", "rtn", "breaks"]
    assert err == "error: 1 of 2 recipes failed (first: breaks: it broke on the way); the others are complete\n"


def test_stopped_by_hand_exits_130_and_says_how_to_go_on(command, add_part, tmp_path):
    add_part.solver("stops", type("Stops", (Breaks,), {"kind": KeyboardInterrupt}))
    code, out, err = command("rtn,stops")
    assert (code, out) == (130, "")
    assert "stops (2 of 2): stopped; 1 of 2 are finished, --resume goes on" in err
    assert [entry["label"] for entry in record(tmp_path / "out")["entries"]] == ["rtn"]


def test_a_wrong_request_exits_2(command):
    assert command("rtn", "--quiet")[0] == 0
    code, out, err = command("rtn", "--quiet")
    assert (code, out) == (2, "")
    assert "pass --resume to go on with it, or --overwrite to replace it" in err
    code, out, err = command("rtn", "--quiet", "--resume", "--windows", "2")
    assert (code, out) == (2, "")
    assert "with another evaluation windows; choose another output" in err
    code, out, err = command("a=rtn:weights.bits", "--quiet")
    assert (code, out) == (2, "")
    assert "'weights.bits' is no KEY=VALUE" in err
