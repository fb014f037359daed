import io
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmend.calibrate import sources
from bitmend.calibrate.sources import Pool, allocate, decode_utf8, draw_rows, read_source, without_cut_character
from bitmend.errors import CalibrationError, RequestError


def read(path, words, sequences=2, length=2, seed=0):
    return read_source(path, words, sequences, length, seed)


def write_lines(path, *values):
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n\n")
    return path


# ---------------------------------------------------------------------------------------------- kinds of files
def test_text_is_one_stream(words, tmp_path):
    path = tmp_path / "a.md"
    path.write_text("w1 w2\n\nw3 w4 w5", encoding="utf-8")
    pool = read(path, words)
    assert [stream.tolist() for stream in pool.streams] == [[1, 2, 3, 4, 5]]
    assert pool.num_candidates(2) == 2
    assert pool.candidate(1, 2).tolist() == [3, 4]


def test_json_lines_pack_texts_and_keep_rows(words, tmp_path):
    messages = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    path = write_lines(
        tmp_path / "a.jsonl", "w1 w2", {"text": "w3", "label": 1}, {"messages": messages}, {"input_ids": [7, 8, 9]}
    )
    pool = read(path, words)
    assert [stream.tolist() for stream in pool.streams] == [[1, 2, 99, 3, 99, 98, 5, 98, 6]]
    assert [row.tolist() for row in pool.rows] == [[7, 8, 9]]
    assert pool.num_tokens == 12
    assert pool.candidate(4, 2).tolist() == [7, 8]  # cut to the sequence length


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "the line at byte 5: one JSON value a line is required, but this is none"),
        ("7", "with `text`, `messages` or `input_ids` is required, but int came"),
        ('{"body": "x"}', r"is required, but \['body'\] came; rename the field"),
        ('{"input_ids": []}', "`input_ids` must be a list of at least one whole number"),
        ('{"input_ids": [1.5]}', r"but \[1.5\] came; mend the row"),
        ('{"messages": [{"content": {"a": 1}}, 3]}', "messages need a chat template that accepts them"),
    ],
)
def test_a_line_that_is_no_document_is_named(line, sentence, words, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'"w1"\n{line}\n')
    with pytest.raises(CalibrationError, match=sentence):
        read(path, words)


def test_messages_without_a_chat_template(words, tmp_path, monkeypatch):
    monkeypatch.setattr(words, "chat_template", None)
    path = write_lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "w5"}]})
    with pytest.raises(CalibrationError, match=r"chat_template is not set.* give `text` instead"):
        read(path, words)


def test_arrays_are_a_stream_or_rows(words, tmp_path):
    np.save(tmp_path / "stream.npy", np.arange(5, dtype=np.uint16))
    np.save(tmp_path / "rows.npy", np.arange(6, dtype=np.int32).reshape(2, 3))
    stream, rows = read(tmp_path / "stream.npy", words), read(tmp_path / "rows.npy", words)
    assert [stream.candidate(index, 2).tolist() for index in range(stream.num_candidates(2))] == [[0, 1], [2, 3]]
    assert [rows.candidate(index, 2).tolist() for index in range(rows.num_candidates(2))] == [[0, 1], [3, 4]]
    assert rows.candidate(0, 9).tolist() == [0, 1, 2]  # short rows stay short
    assert stream.candidate(0, 2).dtype == np.int64


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.ones(4), "it holds float64 in 1 dimensions; save token numbers as int32 or int64"),
        (np.ones((2, 2, 2), dtype=np.int64), "it holds int64 in 3 dimensions"),
        (np.array([{}], dtype=object), "cannot be read without pickle"),
        (np.zeros((0, 4), dtype=np.int64), "the array is empty"),
    ],
)
def test_other_arrays_are_refused(array, sentence, words, tmp_path):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(CalibrationError, match=sentence):
        read(tmp_path / "a.npy", words)


def test_a_file_that_only_claims_to_be_an_array(words, tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CalibrationError, match=r"a .npy file of whole numbers is required, but it cannot be read"):
        read(tmp_path / "a.npy", words)


def test_missing_empty_and_short_files(words, tmp_path):
    with pytest.raises(CalibrationError, match=r"none.txt: a calibration file is required, but there is nothing"):
        read(tmp_path / "none.txt", words)
    with pytest.raises(CalibrationError, match="but there is a folder"):
        read(tmp_path, words)
    path = tmp_path / "a.txt"
    path.touch()
    with pytest.raises(CalibrationError, match="but it is empty"):
        read(path, words)
    path.write_text("w1 w2 w3")
    with pytest.raises(CalibrationError, match="one sequence of 4 tokens is required, but there are 3 tokens; give a"):
        read(path, words, length=4)


def test_text_that_is_not_utf8_names_the_byte(words, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"w1 w2 \xff w3")
    with pytest.raises(CalibrationError, match=r"a.txt: UTF-8 text is required, but byte 6 is not"):
        read(path, words)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'"w1"\n"w\xe9"\n')
    with pytest.raises(CalibrationError, match="but byte 7 is not"):
        read(path, words)


def test_a_byte_order_mark_is_not_text():
    assert decode_utf8("\ufeffw1".encode(), "a") == "w1"


# ---------------------------------------------------------------------------------------------- hub data sets
def test_a_hub_data_set_is_read_like_json_lines(words, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "train.jsonl", *({"text": f"w{number}"} for number in range(6)))
    pool = read(f"hf:{folder}", words, sequences=1)
    assert pool.num_tokens == 4 * 2  # stops at four times what one sequence of 2 needs
    assert pool.streams[0].tolist()[1::2] == [99] * 4
    with pytest.raises(CalibrationError, match=r"but reading failed \(ValueError.*check name, configuration, split"):
        read(f"hf:{folder}::nothing", words)


def test_the_extra_and_the_form_of_the_name_are_checked(words, monkeypatch):
    with pytest.raises(RequestError, match=r"hf:NAME\[:CONFIG\]\[:SPLIT\] is required"):
        read("hf:a:b:c:d", words)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"pip install 'bitmend\[datasets\]'"):
        read("hf:name", words)


# ---------------------------------------------------------------------------------------------- large files
@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "WHOLE_FILE_BYTES", 64)
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)


@given(st.lists(st.text("aé€😀", max_size=9), min_size=1, max_size=30), st.integers(1, 40), st.booleans())
def test_pieces_hold_every_line_once(lines, piece, whole_lines):
    raw = "\n".join(lines).encode()
    file, limit = io.BytesIO(raw), -1 if whole_lines else 60  # 60 bytes: longer than any line
    found = b""
    for start in range(0, len(raw), piece):
        offset, part = sources._read_piece(file, start, min(start + piece, len(raw)), limit)
        assert raw[offset : offset + len(part)] == part
        found += part
    assert found == raw


@given(st.text("aé€😀", min_size=1, max_size=60), st.integers(4, 20))
def test_pieces_of_one_endless_line_are_cut_between_characters(text, piece):
    raw = text.encode()
    found = ""
    for start in range(0, len(raw), piece):
        offset, part = sources._read_piece(io.BytesIO(raw), start, min(start + piece, len(raw)), 3)
        assert raw[offset : offset + len(part)] == part
        found += part.decode()
    assert len(found) >= len(text) - len(raw) // piece  # at most the character across each border is lost
    remaining = iter(text)
    assert all(character in remaining for character in found)


@pytest.mark.parametrize("text", ["a", "é", "€", "😀"])
def test_an_unfinished_character_is_dropped(text):
    raw = text.encode()
    assert without_cut_character(b"x" + raw) == b"x" + raw
    for length in range(1, len(raw)):
        assert without_cut_character(b"x" + raw[:length]) == b"x"


def test_a_large_text_is_read_in_part_and_weighs_as_a_whole(small_pieces, words, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"w{number % 90} w{number // 90}\n" for number in range(1000)))
    pool = read(path, words)  # 4 x 2 x 2 = 16 tokens are wanted: one piece of 64 bytes gives about 20
    assert 1 <= len(pool.streams) <= 2
    assert pool.num_candidates(2) / pool.coverage == pytest.approx(1000, rel=0.5)
    assert read(path, words).streams[0].tolist() == pool.streams[0].tolist()
    others = [read(path, words, seed=seed).streams[0].tolist() for seed in range(1, 4)]
    assert any(other != pool.streams[0].tolist() for other in others)


def test_large_json_lines_are_read_in_part(small_pieces, words, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *(f"w{number % 90} w{number // 90}" for number in range(1000)))
    pool = read(path, words)
    assert 16 <= pool.num_tokens < 48
    whole = read(path, words, sequences=10_000)
    assert whole.coverage == pytest.approx(1)
    assert whole.num_tokens == 3000


# ---------------------------------------------------------------------------------------------- the draw
@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0.1, 9)), min_size=1, max_size=5), st.integers(1, 40))
def test_allocation_is_complete_and_close_to_proportional(pools, wanted):
    counts, weights = [count for count, _ in pools], [weight for _, weight in pools]
    quotas = allocate(counts, weights, wanted)
    assert sum(quotas) == min(wanted, sum(counts))
    assert all(0 <= quota <= count for quota, count in zip(quotas, counts, strict=True))
    if all(count >= wanted for count in counts):
        shares = [wanted * weight / sum(weights) for weight in weights]
        assert all(abs(quota - share) < 1 + 1e-9 for quota, share in zip(quotas, shares, strict=True))


def test_what_repetition_leaves_open_comes_from_the_other_source():
    repeated = Pool("a", streams=(np.ones(20, dtype=np.int64),))
    fresh = Pool("b", streams=(np.arange(20),))
    first, second = draw_rows([repeated, fresh], 6, 2, 0)
    assert (len(first), len(second)) == (1, 5)
