from dataclasses import replace

import pytest

from bitmend.evaluate.results import EvaluationReport, ModelResult, TextResult
from bitmend.formats.ledger import CATEGORIES, Ledger, LedgerRow
from bitmend.linalg.hadamard import Rotation
from bitmend.numerics.activations import ActivationSpec
from bitmend.pipeline.compensating import final_maps_
from bitmend.protocols import BlockReport, Event, RunReport, SiteReport
from bitmend.report.summary import MOST_EVENTS, evaluation_rows, ledger_rows, online_rows, run_lines, scheme_rows


def run_report(sites, events=()):
    return RunReport(
        "m",
        {},
        {},
        {},
        blocks=[BlockReport("b", sites=sites)],
        events=list(events),
        seconds={"total": 12.34},
        peak_memory_bytes=345_600_000,
        bits={"quantised_layers": 4.125, "whole_model": 6.5},
        output="out",
    )


def site(held_out=None, base=None, accepted=True):
    return SiteReport("s", "w4", "gptq", held_out_error=held_out, base_held_out_error=base, accepted=accepted)


def test_a_data_free_run_says_bits_and_time():
    assert list(run_lines(run_report([site(), site()]))) == [
        "2 matrices quantised; 4.125 bits per weight in them, 6.500 in the whole model (from the saved bytes)",
        "wrote out in 12.3 s, peak memory 346 MB",
    ]


def test_the_proof_counts_a_dropped_candidate_as_its_base():
    sites = [site(0.1, 0.2), site(0.9, 0.4, accepted=False), site()]
    line = next(run_lines(run_report(sites)))
    # ours (0.1 + 0.4) / 2 = 0.25 against (0.2 + 0.4) / 2 = 0.3: a sixth less
    assert line == (
        "held-out error that rounding adds to a layer's output, mean over 2 matrices: 0.25 against 0.3 for "
        "round-to-nearest at the same "
        "bits (-16.7 %); 1 of 2 candidates kept"
    )


def test_the_proof_says_when_a_method_chose_by_the_same_rows():
    chosen = site(0.1, 0.2)
    chosen.streams, chosen.chosen_on_held_out = 2, True
    line = next(run_lines(run_report([chosen])))
    assert line.startswith("held-out error of a layer against the full-precision network, mean over 1 matrices: 0.1")
    assert line.endswith("1 of 1 candidates kept; strengths were chosen on the same rows")


def test_a_base_without_error():
    assert "0 against 0 for round-to-nearest at the same bits (no change); 1 of 1" in next(
        run_lines(run_report([site(0.0, 0.0)]))
    )


def test_events_come_first_and_are_cut():
    events = [Event("fallback", f"site {number}", "it fell back") for number in range(MOST_EVENTS + 3)]
    lines = list(run_lines(run_report([site()], events)))
    assert lines[0] == "fallback at site 0: it fell back"
    assert lines[MOST_EVENTS - 1] == f"fallback at site {MOST_EVENTS - 1}: it fell back"
    assert lines[MOST_EVENTS] == "... and 3 more events in run.json"
    assert len(list(run_lines(run_report([site()], events[:MOST_EVENTS])))) == MOST_EVENTS + 2


# ------------------------------------------------------------------------------------------------ evaluation
def text_result(kl=None, file="texts/a.txt"):
    agreement = None if kl is None else 0.98765
    return TextResult(
        file, 20, 512, 12.3456789, kl and 11.5, kl, agreement, kl and kl / 100, kl, kl, kl, 2.51, 10240, "ab", 1.0
    )


def test_an_evaluation_without_reference():
    report = EvaluationReport(
        (ModelResult("m", (text_result(), text_result(file="b\\c.txt"))),), None, "float32", "cpu"
    )
    header, rows = evaluation_rows(report)
    assert header == ["model", "text", "windows", "perplexity"]
    assert rows == [["m", "a.txt", "20 x 512", "12.3457"], ["m", "c.txt", "20 x 512", "12.3457"]]


def test_an_evaluation_with_reference():
    report = EvaluationReport((ModelResult("m", (text_result(0.012345),)),), "ref", "float32", "cpu")
    header, rows = evaluation_rows(report)
    assert header[4:] == ["KL (nats)", "+-", "top-1 agreement"]
    assert rows == [
        ["ref (reference)", "a.txt", "20 x 512", "11.5", "0", "-", "1"],
        ["m", "a.txt", "20 x 512", "12.3457", "0.01235", "0.00012", "0.9877"],
    ]


# ------------------------------------------------------------------------------------------------ ledger
@pytest.fixture
def account():
    rows = (
        LedgerRow("a", 100, {"codes": 400, "scales": 50, "biases": 320}, 4),
        LedgerRow("b", 100, {"codes": 300, "scales": 50, "padding": 20}, 3),
        LedgerRow("c", 300, {"codes": 1200, "scales": 150}, 4),
        LedgerRow("norm", 10, {"norms": 160}, None),
    )
    bits = dict.fromkeys(CATEGORIES, 0)
    for row in rows:
        for name, amount in row.bits.items():
            bits[name] += amount
    bits["header"] = 8000 - sum(bits.values())
    return Ledger(rows, bits, 1000, 520, 500)


def test_ledger_rows_add_up(account):
    header, rows = ledger_rows(account)
    assert header == ["where the bytes are", "bytes", "share"]
    named = {row[0]: row[1:] for row in rows}
    assert named["codes"] == ["238", "23.8%"]  # 1900 bits are 237.5 bytes
    assert named["file"] == ["1,000", "100.0%"]
    assert named["bits per weight, quantised layers"] == ["4.3400", ""]  # 2,170 bits of 500 weights
    assert named["bits per weight, whole model"] == ["5.0962", ""]  # 2,650 bits of 520 parameters
    assert "zero_points" not in named
    shares = [float(row[2].rstrip("%")) for row in rows[:-3]]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_a_plain_model_has_no_bits_of_quantised_layers():
    bits = {**dict.fromkeys(CATEGORIES, 0), "norms": 1600, "header": 400}
    account = Ledger((LedgerRow("norm", 100, {"norms": 1600}, None),), bits, 250, 100, 0)
    _, rows = ledger_rows(account)
    assert [row[0] for row in rows] == ["norms", "header", "file", "bits per weight, whole model"]
    assert scheme_rows(account)[1] == []


def test_online_rows_say_what_runs(account):
    assert online_rows(account)[1] == []
    steps = {str(Rotation(4, inner=2)): 3, str(ActivationSpec(4, False, 8, 0.9)): 7, str(Rotation(16, 1, 1, True)): 1}
    assert online_rows(replace(account, online=steps))[1] == [
        ["rotation of 4 x 2 features", "3"],
        ["activations of 4 bits, with zero points, one scale for 8 features, clipped to 0.9", "7"],
        ["rotation of 16 features, undone", "1"],
    ]


def test_scheme_rows_group_by_width(account):
    header, rows = scheme_rows(account)
    assert header == ["codes", "matrices", "weights", "true bits per weight"]
    # 3 bits: (300 + 50 + 20) / 100; 4 bits: (400 + 50 + 1200 + 150) / 400, the bias is no weight
    assert rows == [["3 bits", "1", "100", "3.7000"], ["4 bits", "2", "400", "4.5000"]]


def test_maps_beside_blocks_are_counted_and_judged():
    report = run_report([])
    fitted = {"structure": "bias", "kept": True, "bytes": 1_500_000}
    report.blocks = [BlockReport("a", compensation=fitted), BlockReport("b", compensation=fitted | {"kept": False})]
    report.blocks[-1].compensation["model"] = {"with": 0.25, "without": 0.5, "kept": 1.0}
    assert list(run_lines(report))[:3] == [
        "maps beside blocks: 1 of 2 kept, 1.5 MB",
        "held-out distance of the model's output from full precision: 0.25 with them against 0.5 without",
        "4.125 bits per quantised weight, 6.500 in the whole model (from the saved bytes)",
    ]
    report.blocks[0].compensation |= {"error_without_any": 0.5}
    report.blocks[1].compensation |= {"error_without_any": 0.75}
    report.blocks[1].compensation["model"]["kept"] = 0.0
    assert final_maps_(report, {}) == ({}, set())
    assert [block.relative_error for block in report.blocks] == [0.5, 0.75]
    assert next(run_lines(report)) == "maps beside blocks: 0 of 2 kept, 0 MB"
