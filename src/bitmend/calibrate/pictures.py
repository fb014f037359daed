"""Where pictures come from: a folder, a tar archive or an array. They are decoded one by one, when they are asked for.

Nothing is unpacked to disk, and nothing that an archive says of itself is believed: lengths are checked against limits
before memory is given, and members that a careful unpacker would not write are refused.
"""

import gzip
import hashlib
import io
import math
import os
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bitmend.errors import CalibrationError, QuantizationError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")  # Pillow knows more, some of which start other programs
MOST_BYTES = 64 * 2**20  # of one picture, as it is stored
MOST_PIXELS = 178_956_970  # where Pillow, as it comes, refuses to go on
MOST_ARRAY_PICTURES = 2_000_000
MOST_HEADER_BYTES = 2**20  # a name in a tar archive may have any length

Name = tuple[str, ...]  # the folders of a picture from its source on, and its file


@dataclass(frozen=True)
class FolderFiles:
    """Pictures that are files of their own.

    Attributes:
        paths: one for each picture.
    """

    paths: tuple[Path, ...]

    def raw_many(self, indices: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield the bytes of pictures in the order asked for."""
        for index in indices:
            path = self.paths[index]
            with _reading(path, "a picture file"), path.open("rb") as file:
                raw = file.read(MOST_BYTES + 1)
            if len(raw) > MOST_BYTES:
                raise _too_long(str(path), path.stat().st_size)
            yield index, raw


@dataclass(frozen=True)
class ArchiveBytes:
    """Pictures that lie one behind the other in a file that is best read from front to back.

    Attributes:
        path: the archive.
        open: opens what the places refer to: the archive without its compression.
        places: first byte and number of bytes of each picture.
    """

    path: Path
    open: Callable[[], AbstractContextManager[BufferedIOBase]]
    places: tuple[tuple[int, int], ...]

    def raw_many(self, indices: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield the bytes of pictures in the order in which they are stored, in one pass."""
        with self.open() as file:
            for index in sorted(set(indices), key=lambda index: self.places[index]):
                start, length = self.places[index]
                with _reading(self.path, "a whole archive"):
                    file.seek(start)
                    raw = file.read(length)
                    if len(raw) < length:
                        raise EOFError(f"it ends within the picture at byte {start}")
                yield index, raw


@dataclass(frozen=True)
class Pictures:
    """The pictures of one source, sorted by name, so that their order is the same on every file system.

    Attributes:
        name: the source, as the user named it.
        members: what each picture is called in its source.
        store: where their bytes lie.
        classes: names of the class folders, sorted; empty without class folders.
        labels: of each picture: a place in `classes`, or the number that an array gives; None when there are none.
        shape: of each picture where the bytes are the values themselves and not a picture file; None otherwise.
    """

    name: str
    members: tuple[str, ...]
    store: FolderFiles | ArchiveBytes
    classes: tuple[str, ...] = ()
    labels: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.members)

    def where(self, index: int) -> str:
        """Return what an error sentence calls a picture: its source and its name there."""
        return f"{self.name}: {self.members[index]}"

    def read(self, index: int) -> Image.Image:
        """Return one picture; see `decode`.

        Cost: a compressed archive is read up to the picture; use `read_many` for several.
        """
        return next(self.read_many([index]))

    def read_many(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Yield pictures in the order asked for; see `decode`.

        Cost: one pass over an archive; it keeps the stored bytes of pictures that are asked for later than they lie there.
        """
        left, place = Counter(indices), 0
        kept: dict[int, bytes] = {}
        for index, raw in self.raw_many(indices):
            kept[index] = raw
            while place < len(indices) and (wanted := indices[place]) in kept:
                yield self.decode(wanted, kept[wanted])
                place, left[wanted] = place + 1, left[wanted] - 1
                if left[wanted] == 0:
                    del kept[wanted]

    def raw_many(self, indices: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Yield (index, bytes as they are stored) of pictures, each once, in the order that is cheapest to read.

        Raises:
            CalibrationError: a file cannot be read, is too long, or an archive is damaged.
        """
        return self.store.raw_many(list(dict.fromkeys(indices)))

    def digest(self, index: int) -> str:
        """Return the SHA-256 of a picture as it is stored, which no change of a decoder can alter."""
        return hashlib.sha256(next(self.raw_many([index]))[1]).hexdigest()

    def decode(self, index: int, raw: bytes) -> Image.Image:
        """Decode the bytes of a picture fully and turn it upright, as its EXIF orientation says.

        Raises:
            CalibrationError: they are no whole picture, or it is too large.
        """
        if self.shape is not None:
            return Image.fromarray(np.frombuffer(raw, dtype=np.uint8).reshape(self.shape))
        return decode_picture(raw, self.where(index))


def open_pictures(source: str | Path) -> Pictures:
    """Find the pictures of a source without decoding any.

    What a source is read as depends on its name:

    - a folder: its files that are called .bmp, .gif, .jpeg, .jpg, .png or .webp (in either case), at any depth; all
      others and hidden ones are left out. Pictures in folders have the first folder as their class; in a folder without
      folders they have none. Links are followed.
    - `*.tar`, `*.tar.gz`, `*.tgz`: the same for an archive, of which one folder around everything is left out. Links
      and devices in it are no pictures.
    - `*.npz`: an array `images` of uint8, (image, height, width) or (image, height, width, channel), and, if given,
      `labels`, whole numbers (image).

    Raises:
        CalibrationError: there is no picture, some lie beside the class folders, the archive is damaged or not what its
            name says, or a member of it is longer than 64 MiB, has a name that leads out of the archive, or comes twice.

    Cost: reads names only; of a compressed archive all of it.
    """
    path = Path(source)
    lower = path.name.lower()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and lower.endswith((".tar", ".tar.gz", ".tgz")):
        return _open_tar(path)
    if path.is_file() and lower.endswith(".npz"):
        return _open_array(path)
    what = "a file of another kind" if path.is_file() else "something else" if path.exists() else "nothing"
    raise CalibrationError(
        f"{path}: a folder of pictures, a .tar, .tar.gz or .tgz archive or an .npz array is required, but there is {what}; "
        "check the path"
    )


def decode_picture(raw: bytes, where: str) -> Image.Image:
    """Decode a picture file fully, the first frame of a moving one, and turn it upright, as its EXIF orientation says.

    Raises:
        CalibrationError: it is cut short, damaged, no picture, or has more than 178,956,970 pixels; named by `where`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of half the limit of pixels, and of damaged notes beside the pixels
            with Image.open(io.BytesIO(raw), formats=FORMATS) as picture:
                _check_pixels(picture)
                picture.load()
                return _upright(picture)
    except Image.DecompressionBombError as error:
        raise CalibrationError(
            f"{where}: a picture of at most {MOST_PIXELS} pixels is required, but it has more; make it smaller or leave it "
            "out"
        ) from error
    except Exception as error:  # decoders raise whatever the bytes drive them to
        # The sentence of Pillow for unknown bytes ends in the address of an object.
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise CalibrationError(
            f"{where}: a whole picture (JPEG, PNG, BMP, GIF or WebP) is required, but it cannot be decoded ({reason}); "
            "copy it again or leave it out"
        ) from error


def _check_pixels(picture: Image.Image) -> None:
    """Keep to the limit where somebody has lifted that of Pillow."""
    if picture.width * picture.height > MOST_PIXELS:
        raise Image.DecompressionBombError


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # the pixels are whole, only the note of how the camera was held is not
        return picture.copy()


# --------------------------------------------------------------------------------------------------------- names
def _is_picture(name: Name) -> bool:
    return name[-1].lower().endswith(EXTENSIONS) and not any(part.startswith(".") for part in name)


def _check_any(path: Path, pictures: Sequence[Name], others: Sequence[Name]) -> None:
    if not pictures:
        examples = ", ".join("/".join(name) for name in sorted(others)[:3])
        found = f"{len(others)} files, among them {examples}" if others else "nothing"
        raise CalibrationError(
            f"{path}: at least one picture ({' '.join(EXTENSIONS)}) is required, but there is {found}; give a folder or an "
            "archive of pictures"
        )


def _classes_of(path: Path, names: Sequence[Name]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return the classes and, for each picture, its place among them."""
    loose = [name for name in names if len(name) == 1]
    if len(loose) == len(names):
        return (), None
    if loose:
        inside = next(name for name in names if len(name) > 1)
        raise CalibrationError(
            f"{path}: pictures must lie all in class folders or all beside each other, but {loose[0][0]} lies beside the "
            f"folder of {'/'.join(inside)}; move it into a folder or away"
        )
    classes = tuple(sorted({name[0] for name in names}))
    number = {name: place for place, name in enumerate(classes)}
    return classes, tuple(number[name[0]] for name in names)


# -------------------------------------------------------------------------------------------------------- folders
def _open_folder(path: Path) -> Pictures:
    with _reading(path, "a folder that can be read"):
        files = list(_walk(path, (), frozenset()))
    names = sorted(name for name in files if _is_picture(name))
    _check_any(path, names, files)
    classes, labels = _classes_of(path, names)
    store = FolderFiles(tuple(path.joinpath(*name) for name in names))
    return Pictures(str(path), tuple("/".join(name) for name in names), store, classes, labels)


def _walk(folder: Path, above: Name, around: frozenset[tuple[int, int]]) -> Iterator[Name]:
    """Yield the names of all files that are not hidden; a link back to a folder around it is not followed."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in around:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, (*above, entry.name), around | {here})
            elif entry.is_file():
                yield (*above, entry.name)


# -------------------------------------------------------------------------------------------------------- archives
def _open_tar(path: Path) -> Pictures:
    with _reading(path, "a whole tar archive"):
        places, others = _scan_tar(path)
    names = sorted(places)
    _check_any(path, names, others)
    shown = _without_top(names)
    classes, labels = _classes_of(path, shown)
    store = ArchiveBytes(path, partial(_open_tar_bytes, path), tuple(places[name] for name in names))
    return Pictures(str(path), tuple("/".join(name) for name in names), store, classes, labels)


def _without_top(names: Sequence[Name]) -> Sequence[Name]:
    """Leave out one folder that lies around everything."""
    common = len({name[0] for name in names}) == 1 and all(len(name) > 1 for name in names)
    return [name[1:] for name in names] if common else names


def _scan_tar(path: Path) -> tuple[dict[Name, tuple[int, int]], list[Name]]:
    """Return first byte and length of each picture, and the names of all other files."""
    places: dict[Name, tuple[int, int]] = {}
    others: list[Name] = []
    with _open_tar_bytes(path) as file:
        headers: Any = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:") as archive:
            kept = vars(archive)["members"]
            while (member := archive.next()) is not None:
                kept.clear()  # tarfile keeps about a kilobyte for each
                if member.size < 0:
                    raise tarfile.ReadError(f"{member.name} has a length below 0")
                name = tuple(part for part in member.name.split("/") if part not in ("", "."))
                if not name or not member.isreg() or member.issparse():
                    continue
                _check_name(path, member.name)
                if not _is_picture(name):
                    others.append(name)
                    continue
                _check_picture(path, member, repeated=name in places)
                places[name] = (member.offset_data, member.size)
        if headers.last != bytes(tarfile.BLOCKSIZE):
            # tarfile takes a damaged header for the end; what lies behind would be missing without a word.
            raise tarfile.ReadError("it is damaged, or cut off before its end mark")
        while isinstance(file, gzip.GzipFile) and file.read(2**20):
            pass  # its checksum is compared only when the end is reached
    return places, others


def _check_name(path: Path, name: str) -> None:
    if name.startswith("/") or ".." in name.split("/"):
        raise CalibrationError(
            f"{path}: names within the archive are required, but {name} leads out of it; do not trust this archive, or "
            "pack it again"
        )


def _check_picture(path: Path, member: tarfile.TarInfo, repeated: bool) -> None:
    if member.size > MOST_BYTES:
        raise _too_long(f"{path}: {member.name}", member.size)
    if repeated:
        raise CalibrationError(
            f"{path}: each name may stand once in the archive, but {member.name} comes twice; pack it again"
        )


def _open_tar_bytes(path: Path) -> BufferedIOBase:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else path.open("rb")


class _Headers:
    """What tarfile reads headers from: it would ask for as many bytes at once as an archive says that a name has."""

    def __init__(self, file: BufferedIOBase) -> None:
        self.file = file
        self.last = b""

    def read(self, length: int) -> bytes:
        """Return the next bytes."""
        if not 0 <= length <= MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {length} bytes")
        self.last = self.file.read(length)
        return self.last

    def seek(self, place: int) -> int:
        """Go on from another place."""
        return self.file.seek(place)

    def tell(self) -> int:
        """Return where the next byte comes from."""
        return self.file.tell()


# ---------------------------------------------------------------------------------------------------------- arrays
def _open_array(path: Path) -> Pictures:
    with _reading(path, "a whole .npz file"), zipfile.ZipFile(path) as archive:
        found = archive.namelist()
        if "images.npy" not in found:
            arrays = ", ".join(name.removesuffix(".npy") for name in found[:5]) or "none"
            raise CalibrationError(
                f"{path}: an array called images is required, and one called labels is read, but there is {arrays}; "
                "save it with numpy.savez(path, images=..., labels=...)"
            )
        shape, start = _image_array(path, archive)
        labels = _label_array(path, archive, shape[0]) if "labels.npy" in found else None
    # Pillow knows a grey picture by its two dimensions.
    one = shape[1:3] if shape[3:] == (1,) else shape[1:]
    length = math.prod(one)
    places = tuple((start + index * length, length) for index in range(shape[0]))
    store = ArchiveBytes(path, partial(_open_array_bytes, path), places)
    members = tuple(f"images[{index}]" for index in range(shape[0]))
    return Pictures(str(path), members, store, (), labels, one)


@contextmanager
def _open_array_bytes(path: Path) -> Iterator[BufferedIOBase]:
    with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
        yield file


def _image_array(path: Path, archive: zipfile.ZipFile) -> tuple[tuple[int, ...], int]:
    """Return the shape of `images` and the place of its first value."""
    with archive.open("images.npy") as file:
        shape, dtype, start = _array_header(file)
    right = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3, 4))
    if dtype != np.uint8 or not right or min(shape) < 1:
        raise CalibrationError(
            f"{path}: images must be uint8 of shape (image, height, width) or (image, height, width, channel) with 1, 3 or "
            f"4 channels, but it is {dtype} of shape {shape}; save it so"
        )
    if math.prod(shape[1:]) > MOST_BYTES:
        raise _too_long(f"{path}: images[0]", math.prod(shape[1:]))
    if shape[0] > MOST_ARRAY_PICTURES:
        raise CalibrationError(
            f"{path}: at most {MOST_ARRAY_PICTURES} images are required, but there are {shape[0]}; divide the file"
        )
    length = archive.getinfo("images.npy").file_size
    if start + math.prod(shape) != length:
        raise EOFError(f"images of shape {shape} needs {start + math.prod(shape)} bytes, it has {length}")
    return shape, start


def _label_array(path: Path, archive: zipfile.ZipFile, count: int) -> tuple[int, ...]:
    with archive.open("labels.npy") as file:
        shape, dtype, _ = _array_header(file)
        if dtype.kind not in "iu" or shape != (count,):
            raise CalibrationError(
                f"{path}: labels must be whole numbers of shape ({count},), one for each image, but it is {dtype} of shape "
                f"{shape}; save it so, or without labels"
            )
        values = np.frombuffer(file.read(count * dtype.itemsize), dtype=dtype)
    if len(values) < count:
        raise EOFError(f"labels ends after {len(values)} numbers")
    return tuple(values.tolist())


def _array_header(file: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return shape, dtype and the number of bytes in front of the values."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # others are for tables, and their headers may say that they have 4 GiB
        raise ValueError(f"version {version} of the .npy format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order and len(shape) > 1:
        raise ValueError("an array in Fortran order; save numpy.ascontiguousarray of it")
    return shape, dtype, file.tell()


# --------------------------------------------------------------------------------------------------------- failures
@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Say of whatever goes wrong inside that `path` is not what it should be."""
    try:
        yield
    except QuantizationError:
        raise
    except Exception as error:  # archive readers raise whatever headers, codecs and the file system drive them to
        raise CalibrationError(
            f"{path}: {what} is required, but reading failed ({_reason(error)}); copy or download it again"
        ) from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _too_long(where: str, length: int) -> CalibrationError:
    return CalibrationError(
        f"{where}: a picture of at most {MOST_BYTES} bytes is required, but it has {length}; make it smaller or leave it out"
    )
