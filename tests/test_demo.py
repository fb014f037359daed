import pytest
import torch

from bitmend import assets, demo
from bitmend.formats.ledger import ledger
from bitmend.protocols import SilentProgress


@pytest.fixture
def small_assets(tiny, tmp_path, monkeypatch):
    """A model that takes seconds in place of the embedded one."""
    wide = {"hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 512}
    places = {
        "books-7m": tiny.save(tmp_path / "books-7m", tiny.build(dtype=torch.bfloat16, **wide)),
        "books-calibration": tiny.write_text(tmp_path / "fit.txt", 2000),
        "books-eval": tiny.write_text(tmp_path / "unseen.txt", 1500, seed=1),
    }
    monkeypatch.setattr(demo.assets, "path", places.__getitem__)
    monkeypatch.setattr(demo, "SEQUENCES", 8)
    monkeypatch.setattr(demo, "SEQUENCE_LENGTH", 64)
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "cache"))
    return places


def table_of(capsys):
    """Return the rows of the first table by name, and all lines."""
    lines = capsys.readouterr().out.splitlines()
    header = lines[1].split("\t")
    rows = [dict(zip(header, line.split("\t"), strict=True)) for line in lines[2:6]]
    return {row["recipe"]: row for row in rows}, lines


def test_the_demo_shows_one_table_and_a_text(small_assets, tmp_path, capsys):
    demo.run_demo(tmp_path / "out", bits=3, progress=SilentProgress())
    rows, lines = table_of(capsys)
    assert list(rows) == ["full precision", "rtn", "gptq", "descent"]
    account = ledger(tmp_path / "out" / "books-7m-gptq-w3")
    assert rows["gptq"]["bits: layers"] == f"{account.bits_per_weight:.3f}" == "3.125"
    assert rows["gptq"]["bits: model"] == f"{account.bits_per_weight_model:.3f}"
    assert rows["gptq"]["MB"] == f"{account.file_bytes / 1e6:.2f}"
    assert float(rows["full precision"]["KL (nats)"]) == 0
    assert float(rows["rtn"]["KL (nats)"]) > 0
    assert lines[0].startswith("books-7m at 3 bits, on 2 windows")
    assert lines[6] == "descent at 3 bits continues a text"
    assert len(lines) >= 8


@pytest.mark.slow
def test_the_demo_may_run_again(small_assets, tmp_path, capsys):
    demo.run_demo(tmp_path / "out", bits=3, progress=SilentProgress())
    first, _ = table_of(capsys)
    demo.run_demo(tmp_path / "out", bits=3, progress=SilentProgress())
    assert table_of(capsys)[0] == first


def test_the_full_precision_width_that_the_demo_names_is_that_of_the_embedded_model():
    account = ledger(assets.path("books-7m"))
    layers = [row for row in account.rows if "layers" in row.bits]
    assert {row.bits["layers"] / row.weights for row in layers} == {16.0}


@pytest.mark.slow
def test_gptq_repairs_the_embedded_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "cache"))
    demo.run_demo(tmp_path / "out", bits=3, progress=SilentProgress())
    rows, _ = table_of(capsys)
    kl = {name: float(row["KL (nats)"]) for name, row in rows.items()}
    assert 0 < kl["descent"] < 0.85 * kl["gptq"]
    assert 0 < kl["gptq"] < 0.7 * kl["rtn"]
    assert float(rows["gptq"]["perplexity"]) < float(rows["rtn"]["perplexity"])
    assert float(rows["gptq"]["top-1 agreement"]) > float(rows["rtn"]["top-1 agreement"])
