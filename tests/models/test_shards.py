import json

import pytest
import torch
from safetensors.torch import save_file

from bitmend.errors import CheckpointError, ModelError
from bitmend.models.shards import INDEX_FILE, PICKLED_FILE, SINGLE_FILE, ShardedWeights

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4).to(torch.bfloat16),
    "b.bias": torch.arange(3, dtype=torch.float32),
    "c": torch.tensor(7),
}


def write_shards(folder, **renamed):
    save_file({"a.weight": TENSORS["a.weight"]}, folder / "one.safetensors")
    save_file({"b.bias": TENSORS["b.bias"], "c": TENSORS["c"]}, folder / "two.safetensors")
    weight_map = {"a.weight": "one.safetensors", "b.bias": "two.safetensors", "c": "two.safetensors"} | renamed
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def write_single(folder):
    save_file(TENSORS, folder / SINGLE_FILE)


def write_pickled(folder):
    torch.save(TENSORS, folder / PICKLED_FILE)


@pytest.mark.parametrize("write", [write_single, write_shards, write_pickled])
def test_reads_each_kind_of_folder(tmp_path, write):
    write(tmp_path)
    weights = ShardedWeights(tmp_path)
    assert sorted(weights.names()) == sorted(TENSORS)
    assert len(weights) == 3
    assert "c" in weights
    assert "d" not in weights
    for name, tensor in TENSORS.items():
        assert torch.equal(weights.get(name), tensor)
        assert weights.shape(name) == tuple(tensor.shape)
        assert weights.dtype(name) == tensor.dtype
    assert weights.total_bytes == 24 + 12 + 8
    assert weights.floating_dtype == torch.bfloat16


def test_no_weights(tmp_path):
    with pytest.raises(ModelError, match=r"holds no weights: need model\.safetensors, .*; give a folder written by"):
        ShardedWeights(tmp_path)


def test_unknown_tensor(tmp_path):
    write_single(tmp_path)
    with pytest.raises(CheckpointError, match="holds no tensor called d; give the complete model"):
        ShardedWeights(tmp_path).get("d")


@pytest.mark.parametrize("kept", [0, 4, 40, -4])
def test_truncated_file(tmp_path, kept):
    write_shards(tmp_path)
    path = tmp_path / "two.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"two\.safetensors is not a whole safetensors file .* cut short"):
        ShardedWeights(tmp_path)


def test_missing_shard(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the shard two\.safetensors, which is missing .* download it"):
        ShardedWeights(tmp_path)


def test_file_that_vanishes_later(tmp_path):
    write_shards(tmp_path)
    weights = ShardedWeights(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors could not be read at tensor c .*; copy it again"):
        weights.get("c")


@pytest.mark.parametrize("shard", ["../out.safetensors", "/etc/out.safetensors", "x/../../out.safetensors", "..\\o"])
def test_index_stays_inside_the_folder(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"c": TENSORS["c"]}, tmp_path / "out.safetensors")
    write_shards(folder, c=shard)
    with pytest.raises(CheckpointError, match=r"names the shard .* need a path inside .*; do not trust this folder"):
        ShardedWeights(folder)


def test_index_names_another_kind_of_file(tmp_path):
    write_shards(tmp_path, c="two.bin")
    with pytest.raises(CheckpointError, match=r"names the shard 'two\.bin', need a \.safetensors file"):
        ShardedWeights(tmp_path)


def test_index_names_a_tensor_that_its_shard_lacks(tmp_path):
    write_shards(tmp_path, d="two.safetensors")
    with pytest.raises(CheckpointError, match=r"says that d is in two\.safetensors, but that file does not hold it"):
        ShardedWeights(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "is not readable JSON"), ("[]", "no weight_map"), ("{}", "no wei")]
)
def test_broken_index(tmp_path, text, sentence):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=sentence):
        ShardedWeights(tmp_path)


class Dangerous:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (pytest.fail, ("code has run",))


def test_pickled_code_is_not_run(tmp_path):
    torch.save({"a": Dangerous()}, tmp_path / PICKLED_FILE)
    with pytest.raises(
        CheckpointError, match=r"could not be read as plain tensors .*; convert the model to safetensors"
    ):
        ShardedWeights(tmp_path)


def test_pickled_nested_dictionary_is_refused(tmp_path):
    torch.save({"model": TENSORS}, tmp_path / PICKLED_FILE)
    with pytest.raises(CheckpointError, match="is not a flat dictionary of tensors"):
        ShardedWeights(tmp_path)


def test_a_deeply_nested_index_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match="is not readable JSON"):
        ShardedWeights(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000 + ".safetensors", "a\0b.safetensors", "\ud800.safetensors"])
def test_a_shard_with_a_name_that_no_file_can_have(tmp_path, name):
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="is missing from"):
        ShardedWeights(tmp_path)
