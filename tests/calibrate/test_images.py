import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bitmend.calibrate.data import Split
from bitmend.calibrate.images import ImageSet, draw_pictures, labelled, load_images, match_classes
from bitmend.calibrate.pictures import ArchiveBytes, Pictures, open_pictures
from bitmend.errors import CalibrationError, RequestError
from bitmend.protocols import ImageBatch

DIGITS = {0: "cat", 1: "dog", 2: "emu"}


def png(*colour, size=(2, 2)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def as_they_are(images):
    """A processor that changes nothing: a plain picture can be told by its colour."""
    return torch.stack(
        [torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) for image in images]
    )


def write(folder, files):
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return folder


def pack(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path


def numbered(**counts):
    """Class folders of different plain pictures: red is the class, green the number."""
    return {
        f"{name}/{number:03}.png": png(place, number, 0)
        for place, (name, count) in enumerate(counts.items())
        for number in range(count)
    }


def colours(pixels):
    return [tuple(int(value) for value in one[:, 0, 0]) for one in pixels]


def load(sources, images=8, held_out=0.25, seed=0, processor=as_they_are):
    return load_images(sources, processor, images=images, held_out=held_out, seed=seed)


def plain(*values, held_out=()):
    pixels = torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return ImageSet(pixels, torch.tensor([index in held_out for index in range(len(values))]))


# ------------------------------------------------------------------------------------------------------------- the set
def test_batches_hold_one_split_each():
    data = plain(10, 11, 12, 13, 14, held_out=(1, 4))
    assert data.split_of_batch(2) == [Split.FIT, Split.FIT, Split.HELD_OUT]
    batches = data.batches(2)
    assert [batch.pixels[:, 0, 0, 0].tolist() for batch in batches] == [[10, 12], [13], [11, 14]]
    assert all(isinstance(batch, ImageBatch) and batch.mask is None for batch in batches)
    assert sum(batch.num_rows for batch in batches) == len(data) == 5
    assert data.num_held_out == 2


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 4), st.data())
def test_batches_hold_every_picture_once(count, batch_size, data):
    held_out = data.draw(st.sets(st.integers(1, count - 1))) if count > 1 else set()
    images = plain(*range(count), held_out=held_out)
    seen = []
    for batch, split in zip(images.batches(batch_size), images.split_of_batch(batch_size), strict=True):
        numbers = [int(value) for value in batch.pixels[:, 0, 0, 0]]
        assert 1 <= len(numbers) <= batch_size
        assert all((number in held_out) == (split is Split.HELD_OUT) for number in numbers)
        seen += numbers
    assert sorted(seen) == list(range(count))


def test_fingerprint_changes_with_a_value_an_order_a_size_and_the_split():
    data = plain(1, 2, 3, held_out=(2,))
    assert data.fingerprint == plain(1, 2, 3, held_out=(2,)).fingerprint
    wide = ImageSet(data.pixels.reshape(3, 1, 1, 4), data.held_out)
    others = [
        plain(1, 2, 4, held_out=(2,)),
        plain(2, 1, 3, held_out=(2,)),
        plain(1, 2, 3, held_out=(1,)),
        plain(1, 2, 3),
    ]
    assert len({images.fingerprint for images in [data, wide, *others]}) == 6


def test_fingerprint_does_not_depend_on_how_the_pixels_lie_in_memory():
    pixels = torch.arange(24.0).reshape(2, 3, 2, 2)
    marks = torch.tensor([False, True])
    turned = pixels.contiguous(memory_format=torch.channels_last)
    assert ImageSet(pixels, marks).fingerprint == ImageSet(turned, marks).fingerprint


def test_summary_names_what_was_used():
    summary = plain(1, 2, held_out=(1,)).summary()
    assert {key: value for key, value in summary.items() if key != "sha256"} == {
        "source": "",
        "images": 2,
        "held_out": 1,
        "size": [1, 2, 2],
        "seed": 0,
    }
    assert len(summary["sha256"]) == 64


def test_a_set_without_pictures_to_fit_on_is_refused():
    with pytest.raises(CalibrationError, match="all 2 rows are held out"):
        plain(1, 2, held_out=(0, 1))
    with pytest.raises(CalibrationError, match="3 marks came for 1 rows"):
        ImageSet(torch.zeros(1, 1, 1, 1), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(RequestError, match="at least one row a batch is required, not 0"):
        plain(1).batches(0)


# ------------------------------------------------------------------------------------------------------------ the draw
def test_pictures_are_drawn_evenly_over_classes_and_the_seed_decides_who_gets_more(tmp_path):
    write(tmp_path, numbered(a=10, b=40, c=10))
    fewest = set()
    for seed in range(12):
        counts = Counter(red for red, _, _ in colours(load([tmp_path], images=8, seed=seed).pixels))
        assert sorted(counts.values()) == [2, 3, 3]
        fewest.add(min(counts, key=counts.get))
    assert fewest == {0, 1, 2}


def test_what_a_small_class_leaves_open_others_fill(tmp_path):
    write(tmp_path, numbered(a=1, b=9, c=9))
    counts = Counter(red for red, _, _ in colours(load([tmp_path], images=9).pixels))
    assert counts == {0: 1, 1: 4, 2: 4}
    assert Counter(red for red, _, _ in colours(load([tmp_path], images=19).pixels)) == {0: 1, 1: 9, 2: 9}


def test_sources_give_in_proportion_to_their_size(tmp_path):
    large = write(tmp_path / "large", numbered(a=15, b=15))
    small = pack(tmp_path / "small.tgz", {f"{number}.png": png(9, number, 0) for number in range(10)})
    data = load([str(large), small], images=8)
    assert Counter(red for red, _, _ in colours(data.pixels)) == {0: 3, 1: 3, 9: 2}
    assert data.source == f"{large} (6), {small} (2)"


def test_arrays_are_drawn_evenly_over_their_labels(tmp_path):
    labels = np.array([5] * 3 + [7] * 30)
    images = np.arange(33, dtype=np.uint8).reshape(33, 1, 1)
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=labels)
    numbers = [red for red, _, _ in colours(load([tmp_path / "x.npz"], images=6).pixels)]
    assert sum(number < 3 for number in numbers) == 3
    assert len(set(numbers)) == 6


def test_the_seed_decides_and_draws_differ(tmp_path):
    write(tmp_path, numbered(a=30, b=30))
    again = [load([tmp_path], seed=seed).fingerprint for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_a_folder_and_its_archive_give_the_same(tmp_path):
    files = numbered(a=9, b=9)
    folder = load([write(tmp_path / "folder", files)])
    archive = load([pack(tmp_path / "x.tar.gz", dict(reversed(files.items())))])
    assert (folder.fingerprint, folder.digest) == (archive.fingerprint, archive.digest)
    assert len(folder.digest) == 64


def test_the_digest_is_of_the_stored_bytes(tmp_path):
    def darker(images):
        return as_they_are(images) / 2

    write(tmp_path, numbered(a=9))
    one, other = load([tmp_path]), load([tmp_path], processor=darker)
    assert one.digest == other.digest
    assert one.fingerprint != other.fingerprint
    assert load([tmp_path], seed=1).digest != one.digest


def test_equal_pictures_are_drawn_once(tmp_path):
    files = {f"{name}/{number}.png": png(1, number % 4, 0) for name in ("a", "b") for number in range(8)}
    write(tmp_path, files)
    data = load([tmp_path, tmp_path], images=4)
    assert sorted(colours(data.pixels)) == [(1, number, 0) for number in range(4)]
    with pytest.raises(
        CalibrationError, match=r"5 different pictures are required, but there are 4; pass --sequences 4 or"
    ):
        load([tmp_path, tmp_path], images=5)


def test_what_equal_pictures_leave_open_another_source_fills(tmp_path):
    same = write(tmp_path / "same", {f"{number}.png": png(1, 1, 1) for number in range(30)})
    other = write(tmp_path / "other", numbered(a=10))
    drawn = draw_pictures([open_pictures(same), open_pictures(other)], 8, 0)
    assert [len(indices) for indices in drawn] == [1, 7]


@settings(max_examples=50)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 20), st.integers(0, 3), st.booleans())
def test_a_draw_is_as_even_as_the_different_pictures_allow(sizes, images, seed, doubled):
    copies = 1 + doubled  # of everything in each class
    labels = tuple(label for label, size in enumerate(sizes) for _ in range(size * copies))
    raw = [bytes([label, number % size]) for label, size in enumerate(sizes) for number in range(size * copies)]
    store = ArchiveBytes(
        Path("memory"), lambda: io.BytesIO(b"".join(raw)), tuple((2 * place, 2) for place in range(len(raw)))
    )
    pool = Pictures("memory", tuple(map(str, range(len(raw)))), store, (), labels)
    if images > sum(sizes):
        with pytest.raises(CalibrationError, match=f"but there are {sum(sizes)}; pass --sequences {sum(sizes)}"):
            draw_pictures([pool], images, seed)
        return
    (indices,) = draw_pictures([pool], images, seed)
    assert len(indices) == len({raw[index] for index in indices}) == images
    counts = Counter(labels[index] for index in indices)
    for label, size in enumerate(sizes):
        if counts[label] < size:  # whoever could give more gives at most one less than anybody
            assert counts[label] >= max(counts.values()) - 1


# ----------------------------------------------------------------------------------------------------- loading
def test_pictures_to_fit_on_come_first_and_batches_share_their_memory(tmp_path):
    write(tmp_path, numbered(a=20, b=20))
    data = load([tmp_path], images=16)
    assert data.held_out.tolist() == [False] * 12 + [True] * 4
    for part in (slice(0, 12), slice(12, 16)):
        assert colours(data.pixels[part]) == sorted(colours(data.pixels[part]))
    held_out = Counter(red for red, _, _ in colours(data.pixels[12:]))
    assert held_out == {0: 2, 1: 2}  # the split is even over the sorted pictures, so over classes
    batches = data.batches(5)
    assert [batch.num_rows for batch in batches] == [5, 5, 2, 4]
    assert batches[1].pixels.data_ptr() == data.pixels[5:].data_ptr()


@pytest.mark.parametrize("kind", ["folder", "x.tgz"])
def test_a_damaged_picture_is_named_and_not_passed_over(tmp_path, kind):
    files = numbered(a=4) | {"a/004.png": b"\x89PNG nothing"}
    source = write(tmp_path / kind, files) if kind == "folder" else pack(tmp_path / kind, files)
    with pytest.raises(CalibrationError, match=f"{source}: a/004.png: a whole picture .* is required"):
        load([source], images=5)


def test_pictures_that_come_out_at_several_sizes_are_named(tmp_path):
    write(tmp_path, numbered(a=3) | {"a/9.png": png(1, 1, 1, size=(3, 2))})
    with pytest.raises(
        CalibrationError, match=r"a/9.png: all pictures must .* as \(3, 2, 3\) and the first as \(3, 2, 2\);"
    ):
        load([tmp_path], images=4)


def test_what_the_processor_says_is_said_of_the_picture(tmp_path):
    def refuse(images):
        raise CalibrationError("too thin; leave it out")

    write(tmp_path, numbered(a=1))
    with pytest.raises(CalibrationError, match=r"a/000.png: too thin; leave it out"):
        load([tmp_path], images=1, held_out=0.0, processor=refuse)


def test_numbers_and_sources_are_checked_first(tmp_path):
    with pytest.raises(RequestError, match="images must be at least 1, but 0 came"):
        load(["x"], images=0)
    with pytest.raises(RequestError, match=r"0 <= x < 1, is required, but 1.0 came"):
        load(["x"], held_out=1.0)
    with pytest.raises(
        CalibrationError, match="at least one source of pictures is required, but none came; pass --calib"
    ):
        load([])
    with pytest.raises(CalibrationError, match="but there is nothing; check the path"):
        load([tmp_path / "x"])


# ----------------------------------------------------------------------------------------------------- evaluation
def classes_of(batches):
    return [
        (colour, int(label))
        for batch, labels in batches
        for colour, label in zip(colours(batch.pixels), labels, strict=True)
    ]


@pytest.mark.parametrize("kind", ["folder", "x.tgz"])
def test_every_picture_comes_once_with_its_class(tmp_path, kind):
    files = numbered(emu=3, cat=2)  # red 0: emu, 1: cat
    source = write(tmp_path / kind, files) if kind == "folder" else pack(tmp_path / kind, files)
    pictures = labelled(source, as_they_are, DIGITS)
    assert len(pictures) == 5
    assert pictures.name == str(source)
    batches = list(pictures.batches(2))
    assert [batch.num_rows for batch, _ in batches] == [2, 2, 1]
    assert all(labels.dtype == torch.int64 for _, labels in batches)
    assert sorted(classes_of(batches)) == [
        ((0, 0, 0), 2),
        ((0, 1, 0), 2),
        ((0, 2, 0), 2),
        ((1, 0, 0), 0),
        ((1, 1, 0), 0),
    ]


def test_no_more_than_a_batch_is_read_ahead(tmp_path):
    seen = []

    def watched(images):
        seen.append(len(images))
        return as_they_are(images)

    batches = labelled(write(tmp_path, numbered(cat=6)), watched, DIGITS).batches(2)
    assert seen == []
    next(batches)
    assert sum(seen) == 2


def test_a_subset_is_fixed_grows_and_is_mixed(tmp_path):
    pictures = labelled(write(tmp_path, numbered(cat=20, dog=20, emu=20)), as_they_are, DIGITS)
    few, more = pictures.subset(12), pictures.subset(30)
    assert (len(few), len(more)) == (12, 30)
    assert set(few) < set(more)
    assert {label for _, label in classes_of(pictures.batches(5, 12))} == {0, 1, 2}
    assert sorted(classes_of(pictures.batches(7, 12))) == sorted(classes_of(pictures.batches(5, 12)))
    assert pictures.subset(None) == pictures.subset(99) == list(range(60))
    with pytest.raises(RequestError, match="at least 1 picture is required, but 0 came"):
        pictures.batches(2, 0)
    with pytest.raises(RequestError, match="at least one picture a batch is required, not 0"):
        pictures.batches(0)


def test_the_hash_is_of_classes_and_stored_bytes(tmp_path):
    files = numbered(cat=3, dog=3)
    folder = labelled(write(tmp_path / "folder", files), as_they_are, DIGITS)
    archive = labelled(pack(tmp_path / "x.tgz", dict(reversed(files.items()))), as_they_are, DIGITS)
    assert folder.sha256() == archive.sha256()
    swapped = labelled(tmp_path / "folder", as_they_are, {0: "dog", 1: "cat"})
    changed = labelled(write(tmp_path / "changed", files | {"cat/000.png": png(9, 9, 9)}), as_they_are, DIGITS)
    hashes = {pictures.sha256() for pictures in (folder, swapped, changed)} | {folder.sha256(4)}
    assert len(hashes) == 4


def test_pictures_without_classes_have_no_labels(tmp_path):
    pictures = labelled(write(tmp_path, {"a.png": png(1, 1, 1), "b.png": png(2, 2, 2)}), as_they_are, DIGITS)
    ((batch, labels),) = pictures.batches(4)
    assert labels is None
    assert colours(batch.pixels) == [(1, 1, 1), (2, 2, 2)]
    assert len(pictures.sha256()) == 64


def test_numbers_of_an_array_are_those_of_the_head(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.arange(3, dtype=np.uint8).reshape(3, 1, 1), labels=np.array([2, 0, 2]))
    pictures = labelled(tmp_path / "x.npz", as_they_are, DIGITS)
    assert classes_of(pictures.batches(2)) == [((0, 0, 0), 2), ((1, 1, 1), 0), ((2, 2, 2), 2)]
    with pytest.raises(CalibrationError, match=r"among the 2 classes of the model, 0\.\.1, but 2 came; number them as"):
        labelled(tmp_path / "x.npz", as_they_are, {0: "cat", 1: "dog"})


# ------------------------------------------------------------------------------------------------------- class names
IMAGENET = {
    0: "tench, Tinca tinca",
    1: "great white shark, white shark",
    2: "crane",
    3: "crane",
    4: "maillot",
    5: "maillot, tank suit",
}


@pytest.mark.parametrize(
    ("folders", "labels", "numbers"),
    [
        (["dog", "cat"], DIGITS, [1, 0]),
        (["Dog", "EMU"], DIGITS, [1, 2]),
        (["dog"], {0: "Dog", 1: "dog"}, [1]),  # exact before alike
        (["polar_bear", "ice-cream"], {0: "ice cream", 1: "Polar bear"}, [1, 0]),
        (["tinca_tinca", "tench", "White Shark"], IMAGENET, [0, 0, 1]),
        (["tench, Tinca tinca"], IMAGENET, [0]),
        (["maillot", "tank suit"], IMAGENET, [4, 5]),  # the whole label before one of its names
        (["n01440764"], {0: "n01440764", 1: "n01443537"}, [0]),
        (["0", "2"], DIGITS, [0, 2]),
        (["000", "002"], DIGITS, [0, 2]),
        (["3", "1"], {0: "3", 1: "2", 2: "1"}, [0, 2]),  # names before numbers
        (["0", "1"], {0: "1", 1: "2"}, [0, 1]),  # one is no name, so all are numbers
        (["LABEL_1"], {0: "LABEL_0", 1: "LABEL_1"}, [1]),
    ],
)
def test_class_folders_are_matched_to_labels(folders, labels, numbers):
    assert match_classes("x", folders, labels) == numbers


@pytest.mark.parametrize(
    ("folders", "labels", "sentence"),
    [
        (
            ["cat", "doge", "bird"],
            DIGITS,
            r"x: .* one of the 3 labels of the model, but 'doge' is not; did you mean 'dog'\?",
        ),
        (["zebra"], DIGITS, "but 'zebra' is not; known: cat, dog, emu"),
        (["tinca"], IMAGENET, r"6 labels of the model, but 'tinca' is not; did you mean 'Tinca tinca'\?"),
        (["n01440764"], IMAGENET, "but 'n01440764' is not"),
        (["0", "3"], DIGITS, "but '0' is not"),
        (["0", "cat"], DIGITS, "but '0' is not"),
        (["9" * 5000], DIGITS, "is not; known"),
        (["²"], DIGITS, "is not; known"),
        (
            ["crane"],
            IMAGENET,
            r"'crane' means both 2 \('crane'\) and 3 \('crane'\); call all folders by their numbers, 0\.\.5",
        ),
        (["a b"], {0: "A b", 1: "a-B"}, r"means both 0 \('A b'\) and 1 \('a-B'\)"),
        (["cat"], {}, "one of the 0 labels"),
    ],
)
def test_a_folder_that_means_no_label_or_two_is_refused(folders, labels, sentence):
    with pytest.raises(CalibrationError, match=sentence):
        match_classes("x", folders, labels)
