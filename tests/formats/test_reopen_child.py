"""The other process's functions, called in this one; `test_compressed_tensors` runs it as a process."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitmend.formats.compressed_tensors as exporter
from bitmend.formats import reopen_child
from bitmend.formats.compressed_tensors import CompressedTensors


@pytest.fixture
def exported(quantised, helpers, tmp_path, monkeypatch):
    """Return a function that exports a model without judging it."""
    monkeypatch.setattr(exporter, "compare_logits", lambda *args: 0.0)

    def export(symmetric, tied=True):
        spec = helpers.spec(3, symmetric, 16)
        made = quantised(lambda name: spec if "layers" in name else None, tied=tied)
        CompressedTensors().export(made.output, tmp_path / "export")
        return made, tmp_path / "export"

    return export


def test_both_ways_of_opening_agree(exported, ids):
    made, folder = exported(symmetric=True)
    with torch.no_grad():
        for way in (reopen_child.open_plainly, reopen_child.open_by_decompressor):
            torch.testing.assert_close(way(str(folder), torch.float32)(ids).logits, made.dense(ids).logits)


def test_zero_points_go_through_the_decompressor(exported, ids):
    made, folder = exported(symmetric=False, tied=False)
    with torch.no_grad():
        model = reopen_child.open_by_decompressor(str(folder), torch.float32)
        torch.testing.assert_close(model(ids).logits, made.dense(ids).logits)


@pytest.mark.parametrize(("change", "message"), [("remove", "missing: "), ("add", "left over: ")])
def test_missing_and_left_over_tensors_are_errors(exported, change, message):
    _, folder = exported(symmetric=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if change == "remove":
        del tensors["model.norm.weight"]
    else:
        tensors["model.extra"] = torch.ones(1)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match=message):
        reopen_child.open_by_decompressor(str(folder), torch.float32)
    with pytest.raises(RuntimeError, match="transformers reports"):
        reopen_child.open_plainly(str(folder), torch.float32)


def test_it_refuses_to_judge_with_bitmend_at_hand(exported, ids, tmp_path):
    _, folder = exported(symmetric=True)
    save_file({"ids": ids}, tmp_path / "ids")
    with pytest.raises(RuntimeError, match="bitmend was imported"):
        reopen_child.main(str(folder), str(tmp_path / "ids"), str(tmp_path / "answer"), "torch.float32")
    assert not (tmp_path / "answer").exists()
