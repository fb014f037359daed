import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from bitmend.calibrate.data import CalibrationSet, Split, choose_held_out, load_calibration
from bitmend.errors import CalibrationError, RequestError


def text_of(ids):
    return " ".join(f"w{number}" for number in ids)


@pytest.fixture
def text(tmp_path):
    """Text whose windows of 4 are all different: (0, 1, 0, 0), (0, 2, 0, 0), ... by their first two words."""
    path = tmp_path / "text.txt"
    path.write_text(text_of(number for window in range(400) for number in (window // 20, window % 20, 0, 0)))
    return path


def ragged(*lengths, held_out=(), start=1):
    rows = [torch.arange(start, start + length) for length in lengths]
    marks = torch.tensor([index in held_out for index in range(len(lengths))])
    return CalibrationSet(rows, marks)


# ---------------------------------------------------------------------------------------------- the set
def test_full_rows_go_together_without_mask_and_ragged_rows_are_padded():
    data = ragged(3, 1, 3, 2, 3, held_out=(4,))
    batches = data.batches(2, pad_id=9)
    assert data.split_of_batch(2) == [Split.FIT, Split.FIT, Split.HELD_OUT]
    assert [batch.ids.tolist() for batch in batches] == [[[1, 2, 3], [1, 2, 3]], [[1, 9], [1, 2]], [[1, 2, 3]]]
    assert batches[0].mask is None
    assert batches[2].mask is None
    assert batches[1].mask.tolist() == [[True, False], [True, True]]
    assert sum(batch.num_tokens for batch in batches) == data.num_tokens == 12


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=9),
    st.integers(1, 4),
    st.data(),
)
def test_batches_hold_every_row_once_and_never_mix_splits(lengths, batch_size, data):
    held_out = data.draw(st.sets(st.integers(1, len(lengths) - 1)))
    rows = [torch.full((length,), number) for number, length in enumerate(lengths)]
    calibration = CalibrationSet(rows, torch.tensor([number in held_out for number in range(len(rows))]))
    seen = []
    splits = calibration.split_of_batch(batch_size)
    for batch, split in zip(calibration.batches(batch_size, pad_id=99), splits, strict=True):
        assert len(batch.ids) <= batch_size
        mask = torch.ones_like(batch.ids, dtype=torch.bool) if batch.mask is None else batch.mask
        for ids, marks in zip(batch.ids, mask, strict=True):
            number = int(ids[0])
            assert torch.equal(ids[marks], rows[number])
            assert (ids[~marks] == 99).all()
            assert (split is Split.HELD_OUT) == (number in held_out)
            seen.append(number)
    assert sorted(seen) == list(range(len(rows)))


def test_fingerprint_changes_with_a_token_an_order_a_border_and_the_split():
    data = ragged(3, 3, held_out=(1,))
    assert data.fingerprint == ragged(3, 3, held_out=(1,)).fingerprint
    one, two = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])
    split = torch.tensor([False, True])
    others = [
        CalibrationSet([one, two], split),
        CalibrationSet([two, one], split),
        CalibrationSet([one, one], ~split),
        CalibrationSet([one, one], torch.tensor([False, False])),
        CalibrationSet([torch.tensor([1, 2]), torch.tensor([3, 1, 2, 3])], split),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_summary_names_what_was_used():
    summary = ragged(3, 2, held_out=(1,)).summary()
    assert (summary["sequences"], summary["held_out"], summary["tokens"], summary["longest_sequence"]) == (2, 1, 5, 3)
    assert len(summary["sha256"]) == 64


def test_a_set_without_fit_rows_or_with_empty_rows_is_refused():
    with pytest.raises(CalibrationError, match="all 2 rows are held out"):
        ragged(1, 1, held_out=(0, 1))
    with pytest.raises(CalibrationError, match="row 1 is empty"):
        ragged(1, 0)
    with pytest.raises(CalibrationError, match="3 marks came for 1 rows"):
        CalibrationSet([torch.tensor([1])], torch.zeros(3, dtype=torch.bool))
    with pytest.raises(RequestError, match="at least one row a batch is required, not 0"):
        ragged(1).batches(0)


# ---------------------------------------------------------------------------------------------- the split
@given(st.integers(2, 50), st.floats(0.001, 0.999), st.integers(0, 5))
def test_held_out_rows_are_spread_evenly(num_rows, share, seed):
    marks = choose_held_out(num_rows, share, seed)
    count = int(marks.sum())
    assert count == min(max(1, round(share * num_rows)), num_rows - 1)
    places = marks.nonzero().flatten()
    if count > 1:
        gaps = places.diff()
        assert gaps.max() - gaps.min() <= 1


def test_held_out_depends_on_the_seed_and_only_on_it():
    assert torch.equal(choose_held_out(64, 0.25, 3), choose_held_out(64, 0.25, 3))
    assert len({tuple(choose_held_out(64, 0.25, seed).tolist()) for seed in range(20)}) == 4
    assert not choose_held_out(5, 0.0, 0).any()


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(RequestError, match=r"0 <= x < 1, is required, but .* came"):
        choose_held_out(4, share, 0)


def test_a_single_row_cannot_be_split():
    with pytest.raises(CalibrationError, match="needs at least 2 sequences, but there is 1"):
        choose_held_out(1, 0.25, 0)


# ---------------------------------------------------------------------------------------------- loading
def load(sources, words, sequences=8, sequence_length=4, held_out=0.25, seed=0):
    return load_calibration(
        sources, words, sequences=sequences, sequence_length=sequence_length, held_out=held_out, seed=seed
    )


def test_windows_are_aligned_different_and_in_the_order_of_the_text(text, words):
    data = load([text], words, sequences=100)
    starts = [int(row[0]) * 20 + int(row[1]) for row in data.rows]
    assert all(row.tolist()[2:] == [0, 0] for row in data.rows)
    assert starts == sorted(set(starts))
    assert data.num_held_out == 25
    held_out = {tuple(row.tolist()) for row, mark in zip(data.rows, data.held_out, strict=True) if mark}
    fit = {tuple(row.tolist()) for row, mark in zip(data.rows, data.held_out, strict=True) if not mark}
    assert not held_out & fit


def test_the_seed_decides_the_rows(text, words):
    again = [load([text], words, seed=seed).fingerprint for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_rows_come_from_all_files_in_proportion(text, words, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_of(number for window in range(100) for number in (50, window % 99, window // 99, 50)))
    data = load([text, str(other)], words, sequences=50)
    assert sum(int(row[0]) == 50 for row in data.rows) == 10
    assert data.source == f"{text} (40), {other} (10)"


def test_a_sequence_is_drawn_once_even_when_the_text_repeats_it(words, tmp_path):
    path = tmp_path / "twice.txt"
    path.write_text(text_of([1, 2, 3, 4] * 5 + [5, 6, 7, 8]))
    data = load([path, path], words, sequences=2)
    assert sorted(row.tolist() for row in data.rows) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    with pytest.raises(CalibrationError, match=r"3 different sequences of 4 tokens are required, but there are 2; "):
        load([path], words, sequences=3)


def test_too_few_sequences_says_how_many_there_are(text, words):
    with pytest.raises(CalibrationError, match=r"401 different sequences .* there are 400; pass --sequences 400"):
        load([text], words, sequences=401)


def test_numbers_and_sources_are_checked_first(words):
    with pytest.raises(RequestError, match="sequences must be at least 1, but 0 came"):
        load(["x"], words, sequences=0)
    with pytest.raises(RequestError, match="sequence_length must be at least 1, but -1 came"):
        load(["x"], words, sequence_length=-1)
    with pytest.raises(CalibrationError, match="at least one file is required, but none came"):
        load([], words)


@pytest.mark.parametrize(("ids", "named"), [([0, 1, 100, 3], 100), ([0, -1, 2, 3], -1)])
def test_tokens_outside_the_vocabulary_are_refused(ids, named, words, tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.array(ids))
    with pytest.raises(CalibrationError, match=rf"must be in 0\.\.99.* but {named} came; tokenise the text with this"):
        load([path], words, sequences=1, held_out=0.0)


def encoder_tokenizer(tiny):
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_whole_texts_are_rows_with_special_tokens_cut_to_the_length(tiny, tmp_path):
    (tmp_path / "lines.txt").write_text("w5 w6\n\n  w7  \nw8 w9 w10 w11 w12\n")
    found = load_calibration(
        [tmp_path / "lines.txt"],
        encoder_tokenizer(tiny),
        sequences=3,
        sequence_length=5,
        held_out=0,
        seed=0,
        whole_texts=True,
    )
    assert [row.tolist() for row in found.rows] == [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 10, 2]]


def test_whole_texts_of_json_lines(tiny, tmp_path):
    (tmp_path / "a.jsonl").write_text('"w5 w6"\n{"text": "w7"}\n{"input_ids": [9, 9, 9]}\n')
    options = {"sequences": 3, "sequence_length": 8, "held_out": 0, "seed": 0}
    found = load_calibration([tmp_path / "a.jsonl"], encoder_tokenizer(tiny), **options, whole_texts=True)
    assert [row.tolist() for row in found.rows] == [[1, 5, 6, 2], [1, 7, 2], [9, 9, 9]]
    packed = load_calibration(
        [tmp_path / "a.jsonl"], encoder_tokenizer(tiny), **(options | {"sequence_length": 7, "sequences": 2})
    )
    assert sorted(row.tolist() for row in packed.rows) == [[1, 5, 6, 2, 1, 7, 2], [9, 9, 9]]


def test_a_line_that_is_no_utf8_is_named_among_whole_texts(tiny, tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"w5\nw\xe9\n")
    with pytest.raises(CalibrationError, match="UTF-8 text is required, but byte 4 is not"):
        load_calibration(
            [tmp_path / "lines.txt"],
            encoder_tokenizer(tiny),
            sequences=1,
            sequence_length=5,
            held_out=0,
            seed=0,
            whole_texts=True,
        )


def test_rows_of_special_tokens_alone_are_refused(tiny, tmp_path):
    (tmp_path / "lines.txt").write_text("w5\n")
    options = {"sequences": 1, "held_out": 0, "seed": 0, "whole_texts": True}
    with pytest.raises(RequestError, match=r"rows of more than the 2 special tokens .* but sequence_length is 2"):
        load_calibration([tmp_path / "lines.txt"], encoder_tokenizer(tiny), sequence_length=2, **options)


def test_half_of_a_character_and_deep_nesting_in_json_lines_are_refused(tiny, tmp_path):
    for text in ('"\\ud800"', "[" * 100_000):
        (tmp_path / "a.jsonl").write_text(text + "\n")
        with pytest.raises(CalibrationError, match="the line at byte 0"):
            load_calibration(
                [tmp_path / "a.jsonl"], tiny.tokenizer(), sequences=1, sequence_length=4, held_out=0, seed=0
            )
