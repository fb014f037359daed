import gzip
import hashlib
import io
import os
import struct
import tarfile
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bitmend.calibrate import pictures
from bitmend.calibrate.pictures import decode_picture, open_pictures
from bitmend.errors import CalibrationError


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(number, size=(2, 2)):
    return encode(Image.new("RGB", size, (number, 0, 0)))


def number_of(image):
    return image.convert("RGB").getpixel((0, 0))[0]


CLASSES = {
    "dog/2.png": png(2),
    "cat/b/1.PNG": png(11),
    "dog/1.jpg.png": png(1),
    "cat/9.png": png(9),
    "dog/10.png": png(10),
}
SORTED = ["cat/9.png", "cat/b/1.PNG", "dog/1.jpg.png", "dog/10.png", "dog/2.png"]
NUMBERS = [9, 11, 1, 10, 2]


def write_folder(folder, files):
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return folder


def member(name, raw=b"", **changes):
    info = tarfile.TarInfo(name)
    info.size = len(raw)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, raw


def write_tar(path, *members, end=bytes(1024)):
    """Blocks by hand, so that headers may say what no writer would."""
    blocks = b""
    for info, raw in members:
        blocks += info.tobuf(tarfile.GNU_FORMAT) + raw + bytes(-len(raw) % 512)
    blocks += end
    path.write_bytes(gzip.compress(blocks, 1) if path.suffix.lower() in (".gz", ".tgz") else blocks)
    return path


def tar_of(path, files, top=""):
    return write_tar(path, *(member(top + name, raw) for name, raw in files.items()))


# ------------------------------------------------------------------------------------------------------------ folders
def test_class_folders_are_sorted_by_name(tmp_path):
    others = {"dog/notes.txt": b"x", ".hidden/3.png": png(3), "dog/._1.png": b"x", "readme.md": b""}
    found = open_pictures(write_folder(tmp_path, CLASSES | others))
    assert found.classes == ("cat", "dog")
    assert found.labels == (0, 0, 1, 1, 1)
    assert list(found.members) == SORTED
    assert [number_of(found.read(index)) for index in range(len(found))] == NUMBERS
    assert found.name == str(tmp_path)
    assert found.where(1) == f"{tmp_path}: cat/b/1.PNG"


def test_a_flat_folder_has_no_classes(tmp_path):
    found = open_pictures(str(write_folder(tmp_path, {"b.png": png(2), "a.png": png(1)})))
    assert (found.classes, found.labels, found.members) == ((), None, ("a.png", "b.png"))


def test_pictures_beside_class_folders_are_refused(tmp_path):
    write_folder(tmp_path, CLASSES | {"loose.png": png(1)})
    with pytest.raises(
        CalibrationError, match=r"but loose.png lies beside the folder of cat/9.png; move it into a folder"
    ):
        open_pictures(tmp_path)


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    elsewhere = write_folder(tmp_path / "elsewhere", {"1.png": png(7)})
    folder = write_folder(tmp_path / "data", {"dog/1.png": png(1)})
    (folder / "cat").symlink_to(elsewhere)
    (folder / "dog" / "again").symlink_to(folder)
    (folder / "dog" / "lost.png").symlink_to(tmp_path / "nothing.png")
    (folder / "dog" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "dog" / "pipe.png")
    found = open_pictures(folder)
    assert found.members == ("cat/1.png", "dog/1.png")
    assert number_of(found.read(0)) == 7


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "is required, but there is nothing; give a folder"),
        ({"a/x.tif": b"", "b.txt": b""}, "is required, but there is 2 files, among them a/x.tif, b.txt; give a folder"),
    ],
)
def test_a_source_without_pictures_says_what_was_found(tmp_path, files, sentence):
    with pytest.raises(CalibrationError, match=sentence):
        open_pictures(write_folder(tmp_path, files))
    path = tar_of(tmp_path / "x.tar", files)
    with pytest.raises(CalibrationError, match=sentence):
        open_pictures(path)


def test_what_is_no_source(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.tar")
    for name, what in (("a.zip", "a file of another kind"), ("b", "nothing"), ("pipe.tar", "something else")):
        with pytest.raises(
            CalibrationError, match=f"archive or an .npz array is required, but there is {what}; check the"
        ):
            open_pictures(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ archives
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "X.TGZ"])
@pytest.mark.parametrize("top", ["", "test-5/", "./", "./test-5/"])
def test_an_archive_is_read_like_a_folder(tmp_path, name, top):
    files = CLASSES | {"cat/notes.txt": b"x" * 999}
    found = open_pictures(tar_of(tmp_path / name, files, top))
    assert (found.classes, found.labels) == (("cat", "dog"), (0, 0, 1, 1, 1))
    assert [shown.removeprefix("test-5/") for shown in found.members] == SORTED
    assert [number_of(image) for image in found.read_many(range(5))] == NUMBERS
    folder = open_pictures(write_folder(tmp_path / "folder", files))
    assert [found.digest(index) for index in range(5)] == [folder.digest(index) for index in range(5)]
    assert found.digest(0) == hashlib.sha256(CLASSES["cat/9.png"]).hexdigest()


def test_one_folder_around_everything_is_no_class(tmp_path):
    flat = open_pictures(tar_of(tmp_path / "flat.tar", {"a.png": png(1), "b.png": png(2)}, "pictures/"))
    assert (flat.classes, flat.labels) == ((), None)
    assert flat.where(0) == f"{tmp_path / 'flat.tar'}: pictures/a.png"


def test_a_python_archive_with_long_names_is_read(tmp_path):
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as archive:
            info, raw = member(f"{'d' * 120}/{'ä' * 90}.png", png(5))
            archive.addfile(info, io.BytesIO(raw))
        assert number_of(open_pictures(path).read(0)) == 5


@pytest.mark.parametrize("name", ["x.tar", "x.tgz"])
def test_several_pictures_take_one_pass_from_front_to_back(tmp_path, name):
    found = open_pictures(tar_of(tmp_path / name, CLASSES))
    places = []
    kind = gzip.GzipFile if name == "x.tgz" else io.BufferedReader

    class Watched(kind):
        def seek(self, place, whence=0):
            places.append(place)
            return super().seek(place, whence)

    def watched(path):
        return Watched(path, "rb") if name == "x.tgz" else Watched(io.FileIO(path))

    found = replace(found, store=replace(found.store, open=lambda: watched(tmp_path / name)))
    wanted = [4, 0, 3, 0, 1]
    assert [number_of(image) for image in found.read_many(wanted)] == [NUMBERS[index] for index in wanted]
    assert len(places) == 4
    assert places == sorted(places)
    # Stored as dog/2, cat/b/1, dog/1, cat/9, dog/10.
    assert [index for index, _ in found.raw_many([0, 1, 2, 3, 4])] == [4, 1, 2, 0, 3]


def test_links_and_devices_in_an_archive_are_no_pictures(tmp_path):
    others = [
        member("dog/link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("dog/hard.png", type=tarfile.LNKTYPE, linkname="dog/1.png"),
        member("dog/device.png", type=tarfile.CHRTYPE),
        member("dog/pipe.png", type=tarfile.FIFOTYPE),
        member("dog", type=tarfile.DIRTYPE),
    ]
    found = open_pictures(write_tar(tmp_path / "x.tar", *others, member("dog/1.png", png(1)), *others))
    assert found.members == ("dog/1.png",)


@pytest.mark.parametrize("name", ["../evil.png", "dog/../../evil.png", "/evil.png", "../evil.txt"])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    path = write_tar(tmp_path / "x.tgz", member("dog/1.png", png(1)), member(name, png(2)))
    with pytest.raises(CalibrationError, match=f"but {name} leads out of it; do not trust this archive"):
        open_pictures(path)


@pytest.mark.parametrize("suffix", ["tar", "tgz"])
@pytest.mark.parametrize(
    ("false", "sentence"),
    [
        (
            member("dog/2.png", size=10**12),
            "dog/2.png: a picture of at most 67108864 bytes is required, but it has 10000000",
        ),
        (
            member("dog/2.bin", size=10**8),
            "a whole tar archive is required, but reading failed .*unexpected end of data",
        ),
        (member("dog/2.png", size=-512), r"reading failed \("),
        (member("dog/2.bin", size=-1024), r"reading failed \("),
        (member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=10**9), "a header of 1000000000 bytes"),
        (member("dog/2.png", size=-(10**9), type=tarfile.GNUTYPE_LONGNAME), r"reading failed \("),
        (
            member("dog/1.png", png(2)),
            "each name may stand once in the archive, but dog/1.png comes twice; pack it again",
        ),
        (member("./dog/1.png", png(2)), "but ./dog/1.png comes twice"),
    ],
)
def test_false_headers_cost_neither_time_nor_memory(tmp_path, suffix, false, sentence):
    path = write_tar(tmp_path / f"x.{suffix}", member("dog/1.png", png(1)), false)
    with pytest.raises(CalibrationError, match=sentence):
        open_pictures(path)


def test_a_damaged_archive_is_not_taken_for_a_short_one(tmp_path):
    blocks = write_tar(tmp_path / "x.tar", member("dog/1.png", png(1)), member("dog/2.png", png(2))).read_bytes()
    assert blocks[1024:].startswith(b"dog/2.png")
    flipped = bytearray(blocks)
    flipped[1024] ^= 1
    cases = {"flipped": bytes(flipped), "boundary": blocks[:1024], "half": blocks[:1300], "picture": blocks[:1800]}
    for name, raw in cases.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(raw)
        with pytest.raises(
            CalibrationError, match=r"a whole tar archive is required, but reading failed \(.*copy or down"
        ):
            open_pictures(path)
    packed = gzip.compress(blocks)
    for name, raw in {"cut": packed[:-20], "crc": packed[:-8] + b"0000" + packed[-4:], "text": b"hello" * 200}.items():
        path = tmp_path / f"{name}.tar.gz"
        path.write_bytes(raw)
        with pytest.raises(CalibrationError, match=r"a whole tar archive is required, but reading failed \("):
            list(open_pictures(path).raw_many([0]))


def test_an_archive_that_shrinks_is_noticed(tmp_path):
    path = tar_of(tmp_path / "x.tar", CLASSES)
    found = open_pictures(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(
        CalibrationError, match=r"a whole archive is required, but reading failed .*ends within the picture"
    ):
        list(found.raw_many([0]))


# ------------------------------------------------------------------------------------------------------------ arrays
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("shape", "mode"), [((2, 3), "L"), ((2, 3, 1), "L"), ((2, 3, 3), "RGB"), ((2, 3, 4), "RGBA")])
def test_an_array_gives_pictures(tmp_path, save, shape, mode):
    images = np.random.default_rng(0).integers(0, 256, size=(4, *shape), dtype=np.uint8)
    save(tmp_path / "x.npz", images=images, labels=np.array([3, 0, 3, -1], dtype=np.int16))
    found = open_pictures(tmp_path / "x.npz")
    assert (len(found), found.classes, found.labels) == (4, (), (3, 0, 3, -1))
    for index, image in zip([2, 0, 3], found.read_many([2, 0, 3]), strict=True):
        assert (image.mode, image.size) == (mode, (3, 2))
        np.testing.assert_array_equal(
            np.asarray(image), images[index].squeeze(-1) if shape[2:] == (1,) else images[index]
        )
    assert found.digest(1) == hashlib.sha256(images[1].tobytes()).hexdigest()
    assert found.where(1).endswith("x.npz: images[1]")


def test_labels_are_optional(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((1, 2, 2), dtype=np.uint8))
    assert open_pictures(tmp_path / "x.npz").labels is None


GREY = np.zeros((2, 3, 4), dtype=np.uint8)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (
            {"x_train": GREY, "y_train": GREY},
            "an array called images is required, .* but there is x_train, y_train; save it",
        ),
        ({"images": GREY.astype(np.float32)}, r"images must be uint8 .* but it is float32 of shape \(2, 3, 4\)"),
        ({"images": GREY[0]}, r"but it is uint8 of shape \(3, 4\)"),
        ({"images": GREY.reshape(2, 3, 2, 2)}, "with 1, 3 or 4 channels"),
        ({"images": GREY[:0]}, r"but it is uint8 of shape \(0, 3, 4\)"),
        ({"images": GREY[:, :0]}, r"but it is uint8 of shape \(2, 0, 4\)"),
        ({"images": np.array([None, 1])}, "images must be uint8 .* but it is object"),
        ({"images": np.asfortranarray(GREY)}, "an array in Fortran order; save numpy.ascontiguousarray"),
        (
            {"images": GREY, "labels": np.zeros(3, dtype=int)},
            r"labels must be whole numbers of shape \(2,\).* \(3,\); save",
        ),
        ({"images": GREY, "labels": np.zeros(2)}, "but it is float64"),
        ({"images": GREY, "labels": np.array(["a", "b"])}, "but it is <U1"),
        ({"images": GREY, "labels": np.array([None, "b"])}, "but it is object"),
    ],
)
def test_an_array_of_another_kind_is_refused(tmp_path, arrays, sentence):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(CalibrationError, match=sentence):
        open_pictures(tmp_path / "x.npz")


def write_npz(path, header, values=b"", labels=None):
    """An .npz whose array says of itself what it likes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (("images", header), ("labels", labels)):
            if text is not None:
                raw = text.encode() + b"\n"
                archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + values)
    return path


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ("(1000000, 1000, 1000)", r"needs 1\d{12} bytes, it has"),
        ("(2, 100000, 100000)", "at most 67108864 bytes is required, but it has 10000000000"),
        ("(2, 3, 4)", r"needs \d+ bytes, it has"),
        ("(10000000000, 1, 1)", "at most 2000000 images are required, but there are 10000000000"),
        ("(-2, 3, 4)", r"uint8 of shape \(-2, 3, 4\)"),
    ],
)
def test_an_array_that_says_it_is_huge_costs_no_memory(tmp_path, shape, sentence):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    with pytest.raises(CalibrationError, match=sentence):
        open_pictures(write_npz(tmp_path / "x.npz", header, bytes(10)))


def test_labels_that_end_early_are_noticed(tmp_path):
    images = "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 1, 2), }"
    labels = "{'descr': '<i8', 'fortran_order': False, 'shape': (4,), }"
    with pytest.raises(CalibrationError, match="labels ends after 1 numbers"):
        open_pictures(write_npz(tmp_path / "x.npz", images, bytes(8), labels))


def test_a_damaged_array_file_is_refused(tmp_path):
    draw = np.random.default_rng(0).integers(0, 256, size=(9, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=draw)
    raw = (tmp_path / "x.npz").read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 1
    for name, changed in {"cut": raw[:400], "text": b"hello", "flipped": bytes(flipped)}.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(changed)
        with pytest.raises(CalibrationError, match=r"whole .* is required, but reading failed \("):
            list(open_pictures(path).raw_many(range(9)))


# ------------------------------------------------------------------------------------------------------------ decoding
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
def test_every_format_is_decoded(tmp_path, kind):
    write_folder(tmp_path, {f"x.{kind.lower()}": encode(Image.new("RGB", (8, 6), (200, 200, 200)), kind)})
    image = open_pictures(tmp_path).read(0)
    assert image.size == (8, 6)
    assert abs(number_of(image) - 200) <= 2  # JPEG and WebP lose a little


def noise(size=(64, 64)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(*size, 3), dtype=np.uint8))


def huge_png():
    def chunk(kind, raw):
        return struct.pack(">I", len(raw)) + kind + raw + struct.pack(">I", zlib.crc32(kind + raw))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (
            encode(noise(), "JPEG")[:-2000],
            r"dog/1.png: a whole picture .* cannot be decoded \(OSError: image file is truncat",
        ),
        (encode(noise())[:5000], r"cannot be decoded \("),
        (b"hello", r"cannot be decoded \(no known format\); copy it again or leave it out"),
        (b"", r"cannot be decoded \(no known format\)"),
        (encode(noise(), "TIFF"), r"cannot be decoded \(no known format\)"),
        (huge_png(), "dog/1.png: a picture of at most 178956970 pixels is required, but it has more"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "x.tgz"])
def test_what_is_no_whole_picture_is_named(tmp_path, raw, sentence, kind):
    files = {"dog/0.png": png(1), "dog/1.png": raw, "cat/0.png": png(2)}
    make = write_folder if kind == "folder" else tar_of
    found = open_pictures(make(tmp_path / kind, files))
    assert number_of(found.read(1)) == 1
    with pytest.raises(CalibrationError, match=sentence) as caught:
        found.read(2)
    assert str(tmp_path / kind) in str(caught.value)
    assert " at 0x" not in str(caught.value)


def test_the_limits_hold_where_others_have_lifted_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(CalibrationError, match="a: a picture of at most 178956970 pixels"):
        decode_picture(huge_png(), "a")


@pytest.mark.parametrize("kind", ["folder", "x.tar"])
def test_a_file_that_is_too_long_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(pictures, "MOST_BYTES", 100)
    make = write_folder if kind == "folder" else tar_of
    with pytest.raises(
        CalibrationError, match=r"a.png: a picture of at most 100 bytes is required, but it has \d+; make it"
    ):
        open_pictures(make(tmp_path / kind, {"a.png": encode(noise())})).read(0)


def test_a_file_that_has_gone_is_named(tmp_path):
    found = open_pictures(write_folder(tmp_path, {"a.png": png(1)}))
    (tmp_path / "a.png").unlink()
    with pytest.raises(
        CalibrationError, match=r"a.png: a picture file is required, but reading failed \(FileNotFoundError"
    ):
        found.read(0)


def camera(orientation):
    """Red at the left, blue at the right, and a note of how the camera was held."""
    image = Image.new("RGB", (16, 8), "blue")
    image.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, "PNG", exif=exif.tobytes())


@pytest.mark.parametrize(
    ("orientation", "size", "red"),
    [(1, (16, 8), (0, 0)), (2, (16, 8), (15, 0)), (3, (16, 8), (15, 7)), (6, (8, 16), (0, 0)), (8, (8, 16), (0, 15))],
)
def test_pictures_are_turned_upright(orientation, size, red):
    image = decode_picture(camera(orientation), "a")
    assert image.size == size
    assert image.getpixel(red) == (255, 0, 0)
    assert image.getpixel((size[0] - 1 - red[0], size[1] - 1 - red[1])) == (0, 0, 255)


def test_a_broken_note_of_the_camera_spoils_no_picture():
    raw = encode(noise(), "JPEG", exif=b"Exif\x00\x00MM nonsense")
    assert decode_picture(raw, "a").size == (64, 64)


def test_the_first_frame_of_a_moving_picture():
    frames = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in (50, 150)]
    raw = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert number_of(decode_picture(raw, "a")) == 50


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_all_modes_are_kept_for_the_processor(mode):
    raw = encode(Image.new(mode, (3, 2)), "JPEG" if mode == "CMYK" else "PNG")
    image = decode_picture(raw, "a")
    assert (image.mode, image.size) == (mode, (3, 2))
