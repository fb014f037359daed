import shutil

import pytest
import torch

import bitmend.formats.reopen as module
from bitmend.errors import ExportError
from bitmend.formats.reopen import compare_logits


def answer(monkeypatch, change):
    """Answer in the place of the other process."""
    from bitmend.formats.load import load

    def logits(export, ids, dtype):
        with torch.no_grad():
            return change(load(export, dtype=dtype)(ids).logits.float())

    monkeypatch.setattr(module, "_logits_of_export", logits)


def test_equal_logits_pass(quantised, monkeypatch):
    made = quantised()
    answer(monkeypatch, lambda logits: logits)
    assert compare_logits(made.output, made.output) == 0
    answer(monkeypatch, lambda logits: logits * (1 + 1e-5))
    assert compare_logits(made.output, made.output) == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_logits_are_an_error(quantised, monkeypatch, dtype):
    made = quantised()
    answer(monkeypatch, lambda logits: logits * 1.1)
    with pytest.raises(
        ExportError, match=r"gives other logits than .*quantised: relative difference 1\.00e-01, allowed"
    ):
        compare_logits(made.output, made.output, dtype)
    answer(monkeypatch, lambda logits: logits * float("nan"))
    with pytest.raises(ExportError, match="relative difference nan"):
        compare_logits(made.output, made.output, dtype)
    answer(monkeypatch, lambda logits: logits[:, 1:])
    with pytest.raises(ExportError, match=r"gives logits of shape \(2, 15, 96\), not \(2, 16, 96\)"):
        compare_logits(made.output, made.output, dtype)


def test_a_large_model_is_compared_in_its_own_dtype(quantised, monkeypatch):
    made = quantised(dtype=torch.bfloat16, scale_dtype=torch.bfloat16)
    asked = []
    monkeypatch.setattr(module, "_logits_of_export", lambda export, ids, dtype: asked.append(dtype) or torch.ones(1))
    monkeypatch.setattr(module.os, "sysconf", lambda name: 1)
    with pytest.raises(ExportError, match="gives logits of shape"):
        compare_logits(made.output, made.output)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_logits_of_export", lambda export, ids, dtype: asked.append(dtype) or torch.ones(1))
    with pytest.raises(ExportError, match="gives logits of shape"):
        compare_logits(made.output, made.output)
    assert asked == [torch.bfloat16, torch.float32]


def test_a_folder_that_its_reader_cannot_open(quantised, tmp_path):
    made = quantised()
    broken = shutil.copytree(made.output, tmp_path / "broken")
    (broken / "config.json").write_text('{"quantization_config": {"config_groups": {}}}')
    with pytest.raises(ExportError, match=r"cannot open the export, which was removed: .+"):
        compare_logits(made.output, broken)
