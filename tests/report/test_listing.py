import pytest

from bitmend.protocols import SOLVERS
from bitmend.report import listing as listing_module
from bitmend.report.listing import TABLES, listing


def test_solvers_come_with_summary_and_paper():
    rows = listing("solvers")
    assert [row[0] for row in rows] == sorted(entry.name for entry in SOLVERS)
    named = {row[0]: row for row in rows}
    assert named["gptq"][2] == "arXiv:2210.17323"
    assert named["rtn"][1] == "Round every weight to its nearest level; needs no calibration data."


@pytest.mark.parametrize("kind", [*TABLES, "recipes"])
def test_every_row_is_complete(kind):
    for row in listing(kind):
        assert len(row) == 3
        assert all(isinstance(cell, str) for cell in row)
        assert row[0]
        assert row[1], f"{kind} {row[0]} has no summary"
        assert "\n" not in "".join(row)


def test_formats_and_models():
    assert "compressed-tensors" in [row[0] for row in listing("formats")]
    assert "hf_causal_lm" in [row[0] for row in listing("models")]


def test_recipes_are_the_shipped_ones_then_the_solvers(tmp_path, monkeypatch):
    (tmp_path / "b.toml").write_text('# What it gives\n[solver]\nname = "rtn"\n')
    (tmp_path / "a.toml").write_text("# The default solver\n[weights]\nbits = 3\n")
    monkeypatch.setattr(listing_module, "RECIPES_FOLDER", tmp_path)
    rows = listing("recipes")
    assert rows[:2] == [["a", "The default solver", "gptq"], ["b", "What it gives", "rtn"]]
    assert [row[0] for row in rows[2:]] == [entry.name for entry in SOLVERS]
    assert rows[-1][1].startswith("the solver alone, at the default grid: ")


def test_unknown_kind():
    with pytest.raises(KeyError):
        listing("nothing")
