import errno

import pytest
import torch

from bitmend.errors import CheckpointError
from bitmend.formats import record as module
from bitmend.formats.record import read_record, write_json, write_record
from bitmend.formats.safetensors_file import write_tensors

TENSORS = {"b": torch.arange(6, dtype=torch.int32).reshape(2, 3), "a": torch.tensor([0.5, float("nan")]).bfloat16()}
VALUES = {"name": "b", "numbers": [1, 0.1, float("inf")], "none": None}


@pytest.fixture
def path(tmp_path):
    write_record(tmp_path / "record.safetensors", TENSORS, VALUES)
    return tmp_path / "record.safetensors"


def test_a_record_comes_back_bit_for_bit(path):
    tensors, values = read_record(path)
    assert values == VALUES
    assert set(tensors) == {"a", "b"}
    for name, tensor in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_record_without_tensors(tmp_path):
    write_record(tmp_path / "r", {}, {"a": 1})
    assert read_record(tmp_path / "r") == ({}, {"a": 1})


def test_every_flipped_byte_and_every_cut_is_noticed(path):
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            tensors, values = read_record(path)
        except CheckpointError:
            continue
        # What pads the header is the one thing that may differ.
        assert values == VALUES
        assert torch.equal(tensors["b"], TENSORS["b"])
    for length in range(0, len(content), 5):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_record(path)


def test_a_file_of_tensors_is_no_record(tmp_path):
    write_tensors(tmp_path / "plain", TENSORS, {})
    with pytest.raises(CheckpointError, match="is a safetensors file, but no record that bitmend wrote"):
        read_record(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_record(tmp_path / "none")


def test_altered_bytes_have_a_sentence(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"are not those that were written \(its sha256 differs\)"):
        read_record(path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_record_and_leaves_nothing(path, monkeypatch, error):
    def fail(file):
        raise error

    monkeypatch.setattr("bitmend.formats.safetensors_file.sync", fail)
    monkeypatch.setattr(module, "sync", fail)
    with pytest.raises(type(error)):
        write_record(path, TENSORS, {"new": True})
    with pytest.raises(type(error)):
        write_json(path.with_name("j.json"), {})
    assert read_record(path)[1] == VALUES
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_what_a_killed_process_left_is_in_nobodys_way(path):
    path.with_name(path.name + ".tmp").write_bytes(b"half")
    write_record(path, TENSORS, {"new": True})
    assert read_record(path)[1] == {"new": True}
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_json_is_written_in_one_step(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    write_json(tmp_path / "a.json", {"b": 2})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": 2\n}\n'
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "head.json.tmp").symlink_to(tmp_path / "outside")
    (tmp_path / "r.tmp").symlink_to(tmp_path / "outside")
    write_json(tmp_path / "head.json", {"a": 1})
    write_record(tmp_path / "r", {}, {"a": 1})
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (tmp_path / "head.json").is_symlink()


def test_a_name_with_half_of_a_character_is_one_of_our_errors(tmp_path):
    text = b'{"__metadata__":{"record":"{}","sha256":"0"},"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "r").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CheckpointError, match="half of a character"):
        read_record(tmp_path / "r")
