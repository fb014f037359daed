import shutil

import pytest
import torch

from bitmend.calibrate.data import CalibrationSet
from bitmend.pipeline.fingerprint import PARTS, differences, fingerprint_of
from bitmend.pipeline.recipe import load_recipe

CPU = torch.device("cpu")
VERSIONS = {"bitmend": "1.0", "torch": "2.0"}


@pytest.fixture
def make(tiny_model):
    def fingerprint(keys=None, folder=tiny_model, rows=None, versions=VERSIONS):
        return fingerprint_of(load_recipe("gptq", keys), folder, rows, versions, CPU)

    return fingerprint


def rows_of(last):
    return CalibrationSet([torch.tensor([1, 2]), torch.tensor([3, last])], torch.tensor([False, True]), 0, "here")


def test_the_same_request_has_the_same_fingerprint(make):
    assert make(rows=rows_of(4)) == make(rows=rows_of(4))
    assert tuple(make()) == PARTS
    assert make()["calibration rows"] == "none"
    assert all(isinstance(value, str) for value in make().values())
    assert differences(make(), make()) == []


def test_each_part_is_told_apart(make, monkeypatch):
    one = make(rows=rows_of(4))
    assert differences(one, make({"solver.damping": 0.5}, rows=rows_of(4))) == ["recipe"]
    assert differences(one, make(rows=rows_of(5))) == ["calibration rows"]
    newer = make(rows=rows_of(4), versions={**VERSIONS, "torch": "2.1"})
    assert differences(one, newer) == ["versions (torch 2.0, now torch 2.1)"]
    fewer = make(rows=rows_of(4), versions={"bitmend": "1.0"})
    assert differences(one, fewer) == ["versions (torch 2.0, now fewer)"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert differences(one, make(rows=rows_of(4))) == ["thread count (1, now 3)"]


def test_the_device_is_told_by_its_kind(tiny_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 9")
    recipe = load_recipe("rtn")
    cpu, cuda = (fingerprint_of(recipe, tiny_model, None, {}, torch.device(name)) for name in ("cpu", "cuda"))
    assert cuda["device kind"] == "cuda Abacus 9"
    assert differences(cpu, cuda) == [f"device kind ({cpu['device kind']}, now cuda Abacus 9)"]


def test_all_files_of_the_model_that_reach_the_output_count(make, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    one = make()
    assert differences(one, make(folder=folder)) == []
    (folder / "notes.txt").write_text("not copied")
    assert differences(one, make(folder=folder)) == []
    for name in ("tokenizer.json", "config.json", "generation_config.json", "chat_template.jinja"):
        before = make(folder=folder)
        (folder / name).write_text((folder / name).read_text() + " " if (folder / name).exists() else "new")
        assert differences(before, make(folder=folder)) == ["model"], name


def test_a_fingerprint_without_a_part_differs_in_it(make):
    found = {part: value for part, value in make().items() if part != "thread count"}
    assert differences(found, make()) == ["thread count (unknown, now 1)"]
    assert len(differences({}, make())) == len(PARTS)
