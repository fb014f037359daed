import hashlib
import json
import os
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitmend.errors import CheckpointError
from bitmend.formats.safetensors_file import (
    DTYPES,
    StoredTensors,
    TensorRecord,
    copy_chunks,
    expect_record,
    header_text,
    modules_with,
    parse_json,
    read_header,
    sha256_of,
    write_hashed,
    write_tensors,
)

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "empty": torch.empty(0, 4, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "transposed": torch.arange(6, dtype=torch.int32).view(2, 3).T,
}


def test_the_package_reads_what_is_written(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, {"part": "block 0"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"part": "block 0"}
        assert torch.equal(file.get_slice("a")[1:], TENSORS["a"][1:])


def test_the_header_is_read_as_the_package_writes_it(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({name: value.contiguous() for name, value in TENSORS.items()}, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.file_bytes == path.stat().st_size
    data = path.read_bytes()
    for name, value in TENSORS.items():
        record = header.tensors[name]
        assert (record.dtype, record.shape, record.numel) == (value.dtype, tuple(value.shape), value.numel())
        raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert data[record.start : record.stop] == raw
        assert record.num_bytes == len(raw)
    assert header.header_bytes + sum(record.num_bytes for record in header.tensors.values()) == header.file_bytes


def test_every_tensor_starts_on_a_multiple_of_its_element_size(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, {})
    assert all(record.start % record.dtype.itemsize == 0 for record in read_header(path).tensors.values())


def test_all_types_have_a_name():
    plan = {name: (dtype, (2,)) for name, dtype in sorted(DTYPES.items(), key=lambda item: -item[1].itemsize)}
    table = json.loads(header_text(plan, {})[8:])
    assert {name: item["dtype"] for name, item in table.items()} == {name: name for name in DTYPES}


def test_hash_while_writing(tmp_path):
    path = tmp_path / "file"
    digest = write_hashed(path, iter([b"ab", b"", b"c"]))
    assert path.read_bytes() == b"abc"
    assert digest == hashlib.sha256(b"abc").hexdigest() == sha256_of(path)
    assert b"".join(copy_chunks(path, 1, 3)) == b"bc"
    with pytest.raises(OSError, match="has become shorter"):
        list(copy_chunks(path, 1, 9))
    with pytest.raises(FileExistsError):
        write_hashed(path, iter([]))


def test_stored_tensors_are_a_mapping_over_files(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "1")
    save_file({"b": torch.zeros(3), "c": torch.ones(1)}, tmp_path / "2")
    stored = StoredTensors([tmp_path / "1", tmp_path / "2"])
    assert list(stored) == ["a", "b", "c"]
    assert len(stored) == 3
    assert "a" in stored
    assert "d" not in stored
    assert torch.equal(stored["b"], torch.zeros(3))
    with pytest.raises(KeyError):
        stored["d"]


def broken(tmp_path, table, data=b"", length=None):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="U8", shape=(2,), offsets=(0, 2), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@pytest.mark.parametrize(
    ("table", "data", "message"),
    [
        (b"{", b"", "no safetensors file, or is cut short"),
        (b"[]", b"", "does not begin with a brace"),
        (b"{x}", b"", "is not valid JSON"),
        (b"\xff\xff", b"", "is not UTF-8"),
        (b'{"a":' * 100_000, b"", "is not valid JSON"),
        (b'{"a":1,"a":2}', b"", "a key occurs twice"),
        ({"__metadata__": {"a": 1}}, b"", "metadata that are not text"),
        ({"a": 1}, b"", "describes 'a' wrongly"),
        ({"a": entry(more=1)}, b"xx", "describes 'a' wrongly"),
        ({"a": {"dtype": "U8"}}, b"xx", "describes 'a' wrongly"),
        ({"a": entry("Q9")}, b"xx", "a in .* has the type 'Q9'; known: F64"),
        ({"a": entry(shape=(-2,))}, b"xx", "impossible shape"),
        ({"a": entry(shape=(True,))}, b"xx", "impossible shape"),
        ({"a": entry("I32")}, b"xx", "has 2 bytes, but I32 of shape .* takes 8"),
        ({"a": entry(offsets=(-1, 1))}, b"xx", "lies at impossible offsets"),
        ({"a": entry(offsets=(1, 3))}, b"xxx", "starts at byte .* instead of"),
        ({"a": entry(), "b": entry(offsets=(1, 3))}, b"xxx", "b in .* starts at byte"),
        ({"a": entry()}, b"x", "has .* bytes, its header announces .*; it is cut short or altered"),
        ({"a": entry()}, b"xxx", "it is cut short or altered"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, table, data, message):
    with pytest.raises(CheckpointError, match=message):
        read_header(broken(tmp_path, table, data))


@pytest.mark.parametrize("length", [0, 1, 10_000, 2**63])
def test_an_impossible_header_length_is_refused(tmp_path, length):
    with pytest.raises(CheckpointError, match="bad header length"):
        read_header(broken(tmp_path, {}, length=length))


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        sha256_of(tmp_path / "none")
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="cut short: 3 bytes"):
        read_header(tmp_path / "short")


def test_json_tables():
    assert parse_json('{"a": 1}', "it") == {"a": 1}
    with pytest.raises(CheckpointError, match="it is not valid JSON"):
        parse_json("", "it")


def test_a_tensor_that_must_be_there():
    records = {"a": TensorRecord(torch.int32, (2, 3), 0, 24), "empty": TensorRecord(torch.int32, (0, 3), 0, 0)}
    assert expect_record(records, "a", (torch.int64, torch.int32), (None, 3)) is records["a"]
    assert expect_record(records, "empty", (torch.int32,), (0, 3)) is records["empty"]
    with pytest.raises(CheckpointError, match="the checkpoint lacks the tensor b; download it again"):
        expect_record(records, "b", (torch.int32,), (2, 3))
    sentence = r"a must be int64 or float16 of shape \(any, 3\); got int32 of shape \(2, 3\)"
    with pytest.raises(CheckpointError, match=sentence):
        expect_record(records, "a", (torch.int64, torch.float16), (None, 3))
    for shape in ((2, 4), (2,), (2, 3, 1)):
        with pytest.raises(CheckpointError, match="a must be int32 of shape"):
            expect_record(records, "a", (torch.int32,), shape)
    with pytest.raises(CheckpointError, match="empty must be int32 of shape"):
        expect_record(records, "empty", (torch.int32,), (None, 3))


def test_modules_are_found_by_the_names_of_their_tensors():
    record = TensorRecord(torch.int32, (1,), 0, 4)
    records = dict.fromkeys(("b.qweight", "a.c.qzeros", "b.qzeros", "a.weight", "qweightless", "a.c.qweight"), record)
    assert modules_with(records, ("qweight", "qzeros")) == ["b", "a.c"]
    assert modules_with(records, ("scales",)) == []


# ---------------------------------------------------------------------------------------------- what the fuzzer found
def with_header(path, text, data=b""):
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_no_pipe_is_waited_for_and_no_device_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(CheckpointError, match="cannot be read: it is no regular file; copy or download it again"):
            read_header(tmp_path / name)


@pytest.mark.parametrize("text", ['{"a": 1}'.encode("utf-16"), b"\xff{}", b"\xef\xbb\xbf{}"])
def test_a_header_is_utf_8_from_its_first_brace(tmp_path, text):
    with pytest.raises(CheckpointError, match=r"is not UTF-8; copy|does not begin with a brace; copy"):
        read_header(with_header(tmp_path / "f", text))


@pytest.mark.parametrize("shape", [[10**18] * 300, [2] * 5000, [0, 10**30], [2**63]])
def test_sides_whose_product_nobody_can_compute_or_show(tmp_path, shape):
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    with pytest.raises(CheckpointError, match=r"a in .* has an impossible shape"):
        read_header(with_header(tmp_path / "f", text))


@pytest.mark.parametrize("offsets", [[0, 10**4000], [4, 0], [-4, 0], [2**63, 2**63 + 4]])
def test_offsets_that_cannot_be(tmp_path, offsets):
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    with pytest.raises(CheckpointError, match=r"a in .* lies at impossible offsets"):
        read_header(with_header(tmp_path / "f", text, bytes(4)))


def test_a_name_with_half_of_a_character_is_refused(tmp_path):
    """Half of a surrogate pair is JSON to Python, and none to the package."""
    entry = b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    with pytest.raises(CheckpointError, match="half of a character"):
        StoredTensors([with_header(tmp_path / "f", entry, bytes(4))])


def test_json_with_half_of_a_character_is_refused():
    assert parse_json('{"a": "\\ud83d\\ude00"}', "it") == {"a": "\U0001f600"}
    with pytest.raises(CheckpointError, match="half of a character"):
        parse_json('{"a": ["\\ud83d"]}', "it")
