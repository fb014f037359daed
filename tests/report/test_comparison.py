import json
import math

import pytest

from bitmend.errors import GuardError, RequestError
from bitmend.protocols import BlockReport, Event, RunReport, SiteReport
from bitmend.report.comparison import Comparison, Entry, check_comparison, comparison_rows, read_comparison


def comparison(**changes):
    given = {
        "model": "m",
        "model_sha256": "a",
        "calibration": {"sha256": "c"},
        "texts": [{"file": "texts/one.txt", "sha256": "t"}],
        "windows": 4,
        "window_length": 8,
        "device": "cpu",
        "versions": {"torch": "1"},
    }
    return Comparison(**{**given, **changes})


def scored(label, kl, perplexity=9.0, **changes):
    texts = [{"kl": kl, "perplexity": perplexity}]
    return Entry(label, {}, **{"status": "done", "texts": texts, **changes})


def run_report():
    sites = [
        SiteReport("a", "w4", "gptq", held_out_error=0.1, base_held_out_error=0.2),
        SiteReport("b", "w4", "rtn", held_out_error=0.9, base_held_out_error=0.6, accepted=False),
    ]
    events = [Event("dropped", "b", "no better"), Event("fallback", "b", "fell back", True)]
    report = RunReport("m", {}, {}, {"sha256": "rows"}, blocks=[BlockReport("0", 0.3), BlockReport("1", 0.4, sites)])
    report.events, report.seconds, report.bits = events, {"total": 2.0, "solve": 1.0}, {"quantised_layers": 4.125}
    return report


# ------------------------------------------------------------------------------------------------ entries
def test_an_entry_takes_the_error_of_what_was_kept():
    entry = Entry("x", {})
    assert entry.error_ratio is None
    entry.describe(run_report())
    assert entry.held_out_error == pytest.approx((0.1 + 0.6) / 2)  # the second candidate was dropped for its base
    assert entry.base_held_out_error == pytest.approx((0.2 + 0.6) / 2)
    assert entry.error_ratio == pytest.approx(0.35 / 0.4)
    assert (entry.sites, entry.accepted, entry.events, entry.degraded) == (2, 1, 2, 1)
    assert (entry.final_block_error, entry.calibration_sha256) == (0.4, "rows")
    assert (entry.bits, entry.seconds) == ({"quantised_layers": 4.125}, {"total": 2.0, "solve": 1.0})


def test_an_entry_without_measured_layers():
    entry = Entry("x", {})
    entry.describe(RunReport("m", {}, {}, {}))
    assert (entry.held_out_error, entry.base_held_out_error, entry.final_block_error) == (None, None, None)
    assert Entry("x", {}, held_out_error=0.1, base_held_out_error=0.0).error_ratio is None


def test_put_replaces_in_place():
    found = comparison(entries=[Entry("a", {}), Entry("b", {})])
    found.put(scored("a", 1.0))
    found.put(scored("c", 1.0))
    assert [entry.label for entry in found.entries] == ["a", "b", "c"]
    assert [entry.measured for entry in found.entries] == [True, False, True]
    assert found.entry("none") is None


# ------------------------------------------------------------------------------------------------ the file
def test_the_file_reads_back(tmp_path):
    entry = scored("a", math.nan, bits={"quantised_layers": 3.0}, error="e", output="models/a")
    found = comparison(entries=[entry], reference={"bits": 16.0, "texts": []}, windows=None)
    text = found.to_json()
    assert "NaN" not in text
    (tmp_path / "c.json").write_text(text)
    again = read_comparison(tmp_path / "c.json")
    assert again.to_json() == text
    assert again.entries[0].texts == [{"kl": None, "perplexity": 9.0}]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda plain: plain.pop("windows"),
            r"is no comparison that can be gone on with \(.*windows.*pass --overwrite",
        ),
        (lambda plain: plain["entries"][0].update(status="maybe"), r"is no comparison that can be gone on with"),
        (lambda plain: plain.update(layout=99), r"has the layout 99, need 1; pass --overwrite"),
    ],
)
def test_a_file_that_is_none(tmp_path, change, sentence):
    plain = json.loads(comparison(entries=[Entry("a", {})]).to_json())
    change(plain)
    (tmp_path / "c.json").write_text(json.dumps(plain))
    with pytest.raises(RequestError, match=sentence):
        read_comparison(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(RequestError, match=r"is no comparison that can be gone on with"):
        read_comparison(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"model": "moved", "texts": [{"file": "moved.txt", "sha256": "t"}]}, []),
        ({"calibration": {"sha256": "other"}}, ["calibration rows"]),
        ({"model_sha256": "b"}, ["model"]),
        ({"texts": [{"file": "texts/one.txt", "sha256": "u"}]}, ["evaluation texts"]),
        ({"windows": None, "window_length": 9}, ["evaluation windows"]),
        ({"device": "cuda", "versions": {}}, ["device", "versions"]),
    ],
)
def test_differences_are_named(change, words):
    assert comparison().differences(comparison(**change)) == words


# ------------------------------------------------------------------------------------------------ the table
def test_the_best_comes_first():
    entries = [
        Entry("broken", {}, error="e", bits={"quantised_layers": 4.0}),
        scored("worse", 0.5),
        scored("unknown", None),
        scored(
            "better", 0.25, bits={"quantised_layers": 3.125, "whole_model": 5.5}, seconds={"solve": 1.0, "total": 2.25}
        ),
    ]
    reference = {"bits": 16.0, "texts": [{"kl": 0.0, "perplexity": 8.5}]}
    header, rows = comparison_rows(comparison(entries=entries, reference=reference))
    assert header[-5:] == ["KL", "perplexity", "solver s", "total s", "status"]
    assert [row[0] for row in rows] == ["full precision", "better", "worse", "broken", "unknown"]
    assert rows[0] == ["full precision", "-", "16", "-", "0", "8.5", "-", "-", "reference"]
    assert rows[1] == ["better", "3.125", "5.5", "-", "0.25", "9", "1.0", "2.2", "done"]
    assert rows[3] == ["broken", "4", "-", "-", "-", "-", "-", "-", "failed"]
    assert all(len(row) == len(header) for row in rows)


def test_two_texts_have_their_own_columns():
    texts = [{"file": name, "sha256": ""} for name in ("x/a.txt", "y\\b.txt")]
    entry = Entry("e", {}, texts=[{"kl": 0.1, "perplexity": 2.0}, {"kl": 0.3, "perplexity": None}], status="done")
    header, rows = comparison_rows(comparison(texts=texts, entries=[entry, Entry("f", {})]))
    assert header[4:8] == ["KL a.txt", "perplexity a.txt", "KL b.txt", "perplexity b.txt"]
    assert [row[4:8] for row in rows] == [["0.1", "2", "0.3", "-"], ["-"] * 4]


# ------------------------------------------------------------------------------------------------ the end
def test_a_failed_recipe_fails_the_comparison():
    check_comparison(comparison(entries=[scored("a", 0.1)]))
    found = comparison(entries=[scored("a", 0.1), Entry("b", {}, error="it broke")])
    with pytest.raises(GuardError, match=r"^1 of 2 recipes failed \(first: b: it broke\); the others are complete$"):
        check_comparison(found)
