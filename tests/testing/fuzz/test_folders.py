import json

import pytest
import torch

from bitmend.formats.integrity import check_folder
from bitmend.formats.load import load
from bitmend.formats.quantized_folder import read_quantized
from bitmend.testing.fuzz.folders import reseal
from bitmend.testing.fuzz.verdicts import KINDS


def test_every_kind_is_there(place):
    assert {path.name for path in (place / "folders").iterdir()} == set(KINDS) | {"asymmetric"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("stopped", "finished")])
def test_folders_are_valid(place, kind):
    check_folder(place / "folders" / kind)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("gptq", "gptq"),
        ("gptq-v2", "gptq_v2"),
        ("awq", "awq"),
        ("compressed-tensors", "compressed-tensors"),
        ("compressed-tensors-asymmetric", "compressed-tensors"),
    ],
)
def test_foreign_folders_hold_the_weights_of_the_native_one(place, kind, found):
    source = "asymmetric" if kind in ("awq", "compressed-tensors-asymmetric") else "native"
    module = load(place / "folders" / source).get_submodule("model.layers.1.mlp.down_proj")
    checkpoint = read_quantized(place / "folders" / kind)
    assert checkpoint.format == found
    dense = checkpoint.dense("model.layers.1.mlp.down_proj")
    if kind == "gptq-v2":  # its columns belong to other groups
        assert not torch.equal(dense, module.dequantize())
    else:
        assert torch.allclose(dense, module.dequantize(), rtol=1e-3)


def test_a_stopped_run_has_a_part_and_sites(place):
    partial = place / "folders" / "stopped" / "out.partial"
    assert [path.name for path in (partial / "parts").iterdir()] == ["0000.safetensors"]
    assert len(list((partial / "journal").glob("*.safetensors"))) == 2


def test_resealing_makes_checksums_of_the_files_as_they_are(place, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in (place / "folders" / "native").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["files"] = {"model.safetensors": "0"}
    (folder / "config.json").write_text(json.dumps(config))
    reseal(folder)
    load(folder)
    (folder / "config.json").write_text("{")
    reseal(folder)
    assert (folder / "config.json").read_text() == "{"
