import pytest

from bitmend.errors import CalibrationError, RequestError
from bitmend.evaluate import windows as module
from bitmend.evaluate.windows import read_windows


def read(path, tokenizer, windows=None, window_length=4):
    return read_windows(path, tokenizer, windows=windows, window_length=window_length)


@pytest.fixture
def ten(tmp_path):
    path = tmp_path / "ten.txt"
    path.write_text("\n".join(f"w{number}" for number in range(1, 11)))
    return path


def test_windows_do_not_overlap_and_a_rest_is_left_out(ten, lab):
    windows = read(ten, lab.tokenizer())
    assert windows.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert windows.file == str(ten)
    assert read(ten, lab.tokenizer(), windows=1).ids.tolist() == [[1, 2, 3, 4]]
    assert len(read(ten, lab.tokenizer(), windows=9).ids) == 2


def test_a_tokenizer_that_begins_texts_does_so_once(ten, lab):
    assert read(ten, lab.tokenizer(begins=True)).ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_hash_changes_with_tokens_and_window_length(ten, lab):
    hashes = {
        read(ten, lab.tokenizer()).sha256,
        read(ten, lab.tokenizer(shift=1)).sha256,
        read(ten, lab.tokenizer(), windows=4, window_length=2).sha256,
    }
    assert len(hashes) == 3
    assert read(ten, lab.tokenizer()).sha256 in hashes


def test_batches_cover_all_windows(ten, lab):
    windows = read(ten, lab.tokenizer(), window_length=2)
    assert [(chunk.start, chunk.stop) for chunk in windows.batches(2)] == [(0, 2), (2, 4), (4, 5)]


def test_of_a_large_file_only_the_beginning_is_tokenised(tmp_path, lab, monkeypatch):
    monkeypatch.setattr(module, "WHOLE_TEXT_BYTES", 40)
    monkeypatch.setattr(module, "BYTES_PER_TOKEN", 1)
    path = tmp_path / "large.txt"
    path.write_text("\n".join(f"w{number % 9 + 1}" for number in range(1000)))
    lengths = []
    real = module.decode_utf8
    monkeypatch.setattr(module, "decode_utf8", lambda raw, name: (lengths.append(len(raw)), real(raw, name))[1])
    few, all_windows = read(path, lab.tokenizer(), windows=2), read(path, lab.tokenizer())
    assert lengths == [39, 2999]
    assert few.ids.tolist() == all_windows.ids[:2].tolist()
    lengths.clear()
    more = read(path, lab.tokenizer(), windows=20)  # 80 bytes are 27 tokens, 80 are wanted: the whole file after all
    assert lengths == [78, 2999]
    assert more.ids.tolist() == all_windows.ids[:20].tolist()


def test_bad_requests_are_told(ten, tmp_path, lab):
    with pytest.raises(RequestError, match=r"no.txt: a text file is required, but there is none"):
        read(tmp_path / "no.txt", lab.tokenizer())
    with pytest.raises(RequestError, match="one window of 11 tokens is required, but the text has 10; give a longer"):
        read(ten, lab.tokenizer(), window_length=11)
    for windows, length in ((0, 4), (1, 1)):
        with pytest.raises(RequestError, match=f"at least 2 tokens is required, but {windows} of {length} came"):
            read(ten, lab.tokenizer(), windows=windows, window_length=length)
    (tmp_path / "latin.txt").write_bytes(b"w1 \xe9 w2")
    with pytest.raises(CalibrationError, match=r"latin.txt: UTF-8 text is required, but byte 3 is not"):
        read(tmp_path / "latin.txt", lab.tokenizer())
