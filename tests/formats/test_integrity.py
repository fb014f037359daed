import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmend.errors import CheckpointError
from bitmend.formats.integrity import check_files, check_folder, read_config, read_records, weight_files
from bitmend.formats.manifest import Manifest


@pytest.fixture
def made(quantised):
    return quantised()


def manifest_of(folder):
    return Manifest.from_json(read_config(folder)["quantization_config"])


def rewrite(made, change):
    """Change the tensors of the file and drop the checksums."""
    path = made.output / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return [path], manifest_of(made.output).with_files({})


def test_a_good_checkpoint_passes(made):
    files = weight_files(made.output)
    assert [file.name for file in files] == ["model.safetensors"]
    assert check_files(files, manifest_of(made.output)).keys() == load_file(files[0]).keys()


def test_missing_folders_and_files(tmp_path, made):
    with pytest.raises(CheckpointError, match=r"there is no model folder .*none"):
        read_config(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"is no finished model folder: it has no config\.json"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        weight_files(tmp_path)
    (made.output / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        read_config(made.output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "must map tensor names to file names in weight_map"),
        (lambda index: index["weight_map"].update(a=3), "must map tensor names to file names"),
        (lambda index: index["weight_map"].update(a="../x.safetensors"), "names the weight file .*, which is not in"),
        (lambda index: index["weight_map"].update(a="none.safetensors"), "names the weight file 'none.safetensors'"),
        (lambda index: index["weight_map"].update(a="model-00001-of-00003.safetensors"), "disagree about 'a'"),
        (lambda index: index["weight_map"].pop("model.norm.weight"), "disagree about 'model.norm.weight'"),
    ],
)
def test_a_broken_index(quantised, change, message):
    output = quantised(shard_bytes=20_000).output
    path = output / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00003.safetensors" for n in range(1, 4)}
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        weight_files(output)


def test_a_tensor_in_two_files(tmp_path):
    for name in ("a", "b"):
        save_file({"w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="b repeats the tensor 'w' of another weight file"):
        read_records([tmp_path / "a", tmp_path / "b"])


NAME = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{NAME}.weight": torch.ones(1)}), f"{NAME} is quantised .*, but the file also holds"),
        (lambda t: t.pop(f"{NAME}.weight_scale"), f"the checkpoint lacks {NAME}.weight_scale"),
        (lambda t: t.update({f"{NAME}.weight_scale": torch.ones(48, 3)}), f"{NAME}.weight_scale must be .* of shape"),
        (lambda t: t.update({f"{NAME}.weight_packed": torch.ones(48, 4)}), f"{NAME}.weight_packed must be torch.int32"),
        (lambda t: t.update({f"{NAME}.weight_zero_point": torch.ones(1)}), "which its manifest does not announce"),
    ],
)
def test_tensors_and_manifest_disagree(made, change, message):
    files, manifest = rewrite(made, change)
    with pytest.raises(CheckpointError, match=message):
        check_files(files, manifest)


def test_checksums(made):
    files, manifest = weight_files(made.output), manifest_of(made.output)
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    with pytest.raises(CheckpointError, match=r"sha256 differs from config\.json\); copy or download the file again"):
        check_files(files, manifest)
    check_files(files, manifest, verify=False)
    check_files(files, manifest.with_files({}))
    with pytest.raises(CheckpointError, match="disagree about the weight file 'other'"):
        check_files(files, manifest.with_files({**manifest.files, "other": ""}))


def test_a_folder_of_codes_without_their_description_is_refused(tmp_path):
    tensors = {"proj.weight_packed": torch.zeros(2, 1, dtype=torch.int32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds packed codes \(proj.weight_packed\), but its config.json has no"):
        check_folder(tmp_path)


def test_a_plain_folder_is_well_formed_or_refused(tmp_path):
    save_file({"proj.weight": torch.zeros(2, 1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    check_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"])
def test_a_shard_with_a_name_that_no_file_can_have(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    sentence = "half of a character" if name == "\ud800" else r"names the weight file .*, which is not in"
    with pytest.raises(CheckpointError, match=sentence):
        weight_files(tmp_path)
