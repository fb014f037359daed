"""Pictures as calibration and evaluation data: drawn, preprocessed, split, and matched to the labels of a model.

As for text (`data`), every repair is fitted on one part of the pictures and judged on the other, and the fingerprint names
what was seen. A picture is known by its stored bytes: one that lies in several places is drawn once, so that it cannot
stand on both sides of the split.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor

from bitmend.calibrate.data import Split, check_split, choose_held_out, plan_batches
from bitmend.calibrate.pictures import Pictures, open_pictures
from bitmend.calibrate.sources import allocate
from bitmend.errors import CalibrationError, RequestError, nearest_name
from bitmend.protocols import ImageBatch

SUBSET_SEED = 0  # fixed, so that two models are always scored on the same pictures

Preprocess = Callable[[Sequence[Image.Image]], Tensor]  # pictures -> (image channel height width), all of one size


@dataclass(frozen=True)
class ImageSet:
    """Preprocessed pictures and their split.

    Attributes:
        pixels: what the model reads.
        held_out: for each picture whether it is kept back for the proof.
        seed: what the pictures and the split were drawn with.
        source: where the pictures come from, in words.
        digest: SHA-256 over the pictures as they are stored, in order; empty when they do not come from files.

    Raises:
        CalibrationError: there is no picture to fit on.
    """

    pixels: Float[Tensor, "image channel height width"]
    held_out: Bool[Tensor, "rows"]
    seed: int = 0
    source: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        check_split(len(self.pixels), self.held_out)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def num_held_out(self) -> int:
        """How many pictures are held out."""
        return int(self.held_out.sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pixels and the split, in order: any changed value, size, order or mark changes it."""
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        for one, held_out in zip(self.pixels, self.held_out.tolist(), strict=True):
            digest.update(b"\x01" if held_out else b"\x00")
            digest.update(one.cpu().contiguous().numpy().astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return what a run report says of the pictures, as plain values."""
        return {
            "source": self.source,
            "images": len(self),
            "held_out": self.num_held_out,
            "size": list(self.pixels.shape[1:]),
            "seed": self.seed,
            "sha256": self.fingerprint,
        }

    def batches(self, batch_size: int) -> list[ImageBatch]:
        """Return all pictures in batches of one split each: first those to fit on, then the held-out ones.

        Cost: no memory where the pictures of a batch stand one behind the other, as `load_images` puts them.
        """
        return [ImageBatch(self._rows(indices)) for _, indices in plan_batches(self.held_out, batch_size)]

    def split_of_batch(self, batch_size: int) -> list[Split]:
        """Return which part each batch of `batches(batch_size)` belongs to."""
        return [split for split, _ in plan_batches(self.held_out, batch_size)]

    def _rows(self, indices: list[int]) -> Tensor:
        first, last = indices[0], indices[-1]
        return self.pixels[first : last + 1] if last - first + 1 == len(indices) else self.pixels[indices]


def load_images(
    sources: Sequence[str | Path], processor: Preprocess, *, images: int, held_out: float, seed: int
) -> ImageSet:
    """Draw calibration pictures from folders, archives or arrays (see `pictures.open_pictures`) and preprocess them.

    Pictures are drawn at random without replacement, from each source in proportion to its size, within a source evenly
    over its classes, and each at most once by its bytes. Those to fit on come first; within each part they stand in the
    order of their sources.

    Args:
        sources: where the pictures lie.
        processor: makes what the model reads of pictures.
        images: how many.
        held_out: share of the pictures kept back, 0 <= x < 1.
        seed: of the draw and the split.

    Raises:
        RequestError: a number is out of range.
        CalibrationError: a source is missing or damaged, there are too few different pictures, or a drawn one is no whole
            picture or comes out at another size than the others.

    Cost: the memory of the preprocessed pictures. Drawn pictures are read twice, once to compare their bytes.
    """
    if images < 1:
        raise RequestError(f"calibration: images must be at least 1, but {images} came; give a positive number")
    if not sources:
        raise CalibrationError(
            "calibration: at least one source of pictures is required, but none came; pass --calibration PATH"
        )
    marks = choose_held_out(images, held_out, seed)
    pools = [open_pictures(source) for source in sources]
    drawn = draw_pictures(pools, images, seed)
    # Each part in one piece, so that batches of it are views.
    order = torch.argsort(marks.to(torch.uint8), stable=True)
    pixels, digest = _read_drawn(pools, drawn, processor, torch.argsort(order).tolist())
    source = ", ".join(f"{pool.name} ({len(indices)})" for pool, indices in zip(pools, drawn, strict=True))
    return ImageSet(pixels, marks[order], seed, source, digest)


def _read_drawn(
    pools: Sequence[Pictures], drawn: Sequence[Sequence[int]], processor: Preprocess, rows: Sequence[int]
) -> tuple[Float[Tensor, "image channel height width"], str]:
    """Return the pixels of the drawn pictures, the n-th at `rows[n]`, and the SHA-256 over their bytes in that order."""
    pixels: Tensor | None = None
    digests = [b""] * len(rows)
    first = 0
    for pool, indices in zip(pools, drawn, strict=True):
        row_of = dict(zip(indices, rows[first : first + len(indices)], strict=True))
        first += len(indices)
        for index, raw in pool.raw_many(indices):
            one = _pixels(pool, index, raw, processor, None if pixels is None else pixels.shape[1:])
            if pixels is None:
                pixels = torch.empty(len(rows), *one.shape)
            pixels[row_of[index]] = one
            digests[row_of[index]] = hashlib.sha256(raw).digest()
    assert pixels is not None
    return pixels, hashlib.sha256(b"".join(digests)).hexdigest()


def _pixels(
    pictures: Pictures, index: int, raw: bytes, processor: Preprocess, size: Sequence[int] | None
) -> Float[Tensor, "channel height width"]:
    """Decode and preprocess one picture, which must come out at `size` (None: at any)."""
    image = pictures.decode(index, raw)
    try:
        pixels = processor([image])[0]
    except CalibrationError as error:
        raise CalibrationError(f"{pictures.where(index)}: {error}") from error
    if size is not None and pixels.shape != torch.Size(size):
        raise CalibrationError(
            f"{pictures.where(index)}: all pictures must come out of the image processor at one size, but this one comes "
            f"out as {tuple(pixels.shape)} and the first as {tuple(size)}; give pictures of one size, or let "
            "preprocessor_config.json resize or crop to a fixed one"
        )
    return pixels


# -------------------------------------------------------------------------------------------------------- the draw
def draw_pictures(pools: Sequence[Pictures], images: int, seed: int) -> list[list[int]]:
    """Draw different pictures at random without replacement, from each pool in proportion to its size.

    Within a pool that has labels, each label gets as many as any other, or one less; the seed decides which. What equal
    pictures or small classes leave open, others fill.

    Returns:
        For each pool the drawn pictures, sorted.

    Raises:
        CalibrationError: there are fewer different pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [_Draw(pool, generator) for pool in pools]
    seen: set[bytes] = set()
    while (drawn := sum(draw.num_chosen for draw in draws)) < images:
        available = [draw.num_available for draw in draws]
        if sum(available) == drawn:
            names = ", ".join(pool.name for pool in pools)
            raise CalibrationError(
                f"{names}: {images} different pictures are required, but there are {drawn}; pass --sequences {drawn} or "
                "give more pictures"
            )
        quotas = allocate(available, [float(len(pool)) for pool in pools], images)
        for draw, quota in zip(draws, quotas, strict=True):
            draw.fill(quota, seen)
    return [sorted(index for group in draw.chosen for index in group) for draw in draws]


class _Draw:
    """One pool: what is chosen of each class, and what still waits in the order of the draw."""

    def __init__(self, pictures: Pictures, generator: torch.Generator) -> None:
        self.pictures = pictures
        groups: dict[int, list[int]] = {}
        for index in torch.randperm(len(pictures), generator=generator).tolist():
            groups.setdefault(0 if pictures.labels is None else pictures.labels[index], []).append(index)
        labels = sorted(groups)
        # Of classes with equal claims `allocate` takes the first.
        mixed = torch.randperm(len(labels), generator=generator).tolist()
        self.waiting = [groups[labels[place]] for place in mixed]
        self.chosen: list[list[int]] = [[] for _ in labels]

    @property
    def num_chosen(self) -> int:
        """How many are chosen."""
        return sum(map(len, self.chosen))

    @property
    def num_available(self) -> int:
        """How many can be chosen at most, as far as is known."""
        return self.num_chosen + sum(map(len, self.waiting))

    def fill(self, quota: int, seen: set[bytes]) -> None:
        """Choose until there are `quota` or no more, passing over pictures of which the digest is in `seen`; adds to it."""
        while self.num_chosen < quota and any(self.waiting):
            taken = self._take(quota)
            digests = {
                index: hashlib.sha256(raw).digest()
                for index, raw in self.pictures.raw_many([index for _, index in taken])
            }
            for group, index in taken:  # not in the order in which they were read, which is that of the archive
                if digests[index] not in seen:
                    seen.add(digests[index])
                    self.chosen[group].append(index)

    def _take(self, quota: int) -> list[tuple[int, int]]:
        """Take from what waits as much as fills all classes evenly up to `quota`; returns (class, picture)."""
        available = [len(chosen) + len(waiting) for chosen, waiting in zip(self.chosen, self.waiting, strict=True)]
        taken = []
        for group, target in enumerate(allocate(available, [1.0] * len(available), quota)):
            missing = max(0, target - len(self.chosen[group]))
            taken += [(group, index) for index in self.waiting[group][:missing]]
            del self.waiting[group][:missing]
        return taken


# ------------------------------------------------------------------------------------------------------- evaluation
@dataclass(frozen=True)
class LabelledImages:
    """Pictures with the class that a model should give them, if it is known; preprocessed as they are asked for.

    Attributes:
        pictures: where they lie.
        labels: for each picture the number of the class in the model's head; None where the pictures have no classes.
        processor: makes what the model reads of pictures.
    """

    pictures: Pictures
    labels: tuple[int, ...] | None
    processor: Preprocess

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def name(self) -> str:
        """The source, as the user named it."""
        return self.pictures.name

    def subset(self, count: int | None) -> list[int]:
        """Return which pictures are used when `count` are asked for (None, or more than there are: all), sorted.

        They are the first of an order that a fixed seed shuffles, so that few of them already have about every class.

        Raises:
            RequestError: less than 1 is asked for.
        """
        if count is not None and count < 1:
            raise RequestError(f"{self.pictures.name}: at least 1 picture is required, but {count} came; give more")
        shuffled = torch.randperm(len(self), generator=torch.Generator().manual_seed(SUBSET_SEED))
        return sorted(shuffled[:count].tolist())

    def batches(
        self, batch_size: int, count: int | None = None
    ) -> Iterator[tuple[ImageBatch, Int64[Tensor, " image"] | None]]:
        """Yield batches of at most `batch_size` of the pictures in `subset(count)`, each once, with their classes if known.

        They come in the order in which they are cheapest to read. No more than a batch is in memory.

        Raises:
            RequestError: a number is below 1.
            CalibrationError: a picture is damaged, or comes out at another size than the first.
        """
        if batch_size < 1:
            raise RequestError(f"{self.pictures.name}: at least one picture a batch is required, not {batch_size}")
        return self._stream(batch_size, self.subset(count))

    def _stream(
        self, batch_size: int, indices: list[int]
    ) -> Iterator[tuple[ImageBatch, Int64[Tensor, " image"] | None]]:
        rows: list[Tensor] = []
        read: list[int] = []
        size: Sequence[int] | None = None
        for number, (index, raw) in enumerate(self.pictures.raw_many(indices), start=1):
            rows.append(_pixels(self.pictures, index, raw, self.processor, size))
            read.append(index)
            size = rows[-1].shape
            if len(rows) == batch_size or number == len(indices):
                labels = None if self.labels is None else torch.tensor([self.labels[index] for index in read])
                yield ImageBatch(torch.stack(rows)), labels
                rows, read = [], []

    def sha256(self, count: int | None = None) -> str:
        """Return the SHA-256 over classes and stored bytes of the pictures in `subset(count)`, in whatever order they lie."""
        pairs = [
            (-1 if self.labels is None else self.labels[index]).to_bytes(8, "little", signed=True)
            + hashlib.sha256(raw).digest()
            for index, raw in self.pictures.raw_many(self.subset(count))
        ]
        return hashlib.sha256(b"".join(sorted(pairs))).hexdigest()


def labelled(path: str | Path, processor: Preprocess, id2label: Mapping[int, str] | None) -> LabelledImages:
    """Open pictures to evaluate on (see `pictures.open_pictures`), and find each of their classes in the head of a model.

    Class folders are matched by name (see `match_classes`), the numbers of an array are those of the head. Classes of the
    head that have no pictures are fine.

    Args:
        path: class folders, or an archive or array with classes; others are opened, too, but without labels.
        processor: makes what the model reads of pictures.
        id2label: of the model's config; None of an encoder, which has no classes.

    Raises:
        CalibrationError: the source is missing or damaged, or a class is not one of the head.
    """
    pictures = open_pictures(path)
    if pictures.labels is None or id2label is None:
        return LabelledImages(pictures, None, processor)
    if pictures.classes:
        numbers = match_classes(pictures.name, pictures.classes, id2label)
        return LabelledImages(pictures, tuple(numbers[label] for label in pictures.labels), processor)
    outside = next((label for label in pictures.labels if label not in id2label), None)
    if outside is not None:
        raise CalibrationError(
            f"{path}: labels must be among the {len(id2label)} classes of the model, {_range(id2label)}, but {outside} "
            "came; number them as the model's config does"
        )
    return LabelledImages(pictures, pictures.labels, processor)


def match_classes(name: str, folders: Sequence[str], id2label: Mapping[int, str]) -> list[int]:
    """Return for each class folder the number of its class in the head of a model.

    A folder's name must be a label; or be one when case is ignored and spaces, underscores and hyphens are alike; or be,
    in that sense, one of the names that a label lists between commas ("tench, Tinca tinca"). The first of these that
    holds counts. When some folder matches no label but all are called by whole numbers of the head, each is its number.

    Args:
        name: of the source, for error sentences.
        folders: names of the class folders.
        id2label: of the model's config.

    Raises:
        CalibrationError: a folder matches no label, or two.
    """
    tables = _label_tables(id2label)
    matches = [_match(folder, tables) for folder in folders]
    if not all(matches) and all(folder.isascii() and folder.isdecimal() for folder in folders):
        numbers = [int(folder) if len(folder) < 10 else -1 for folder in folders]
        if all(number in id2label for number in numbers):
            return numbers
    for folder, match in zip(folders, matches, strict=True):
        if not match:
            raise CalibrationError(
                f"{name}: each class folder must be called like one of the {len(id2label)} labels of the model, but "
                f"{folder!r} is not{nearest_name(folder, _names(id2label))}"
            )
        if len(match) > 1:
            first, second = match[:2]
            raise CalibrationError(
                f"{name}: each class folder must be called like one of the {len(id2label)} labels of the model, but "
                f"{folder!r} means both {first} ({id2label[first]!r}) and {second} ({id2label[second]!r}); call all "
                f"folders by their numbers, {_range(id2label)}"
            )
    return [match[0] for match in matches]


def _label_tables(id2label: Mapping[int, str]) -> list[dict[str, list[int]]]:
    """Return tables from a name to the classes that bear it, the strictest first."""
    tables: list[dict[str, list[int]]] = [{}, {}, {}]
    for number, label in sorted(id2label.items()):
        spellings = ([label], [_plain(label)], [_plain(part) for part in label.split(",")])
        for table, names in zip(tables, spellings, strict=True):
            for one in dict.fromkeys(names):
                table.setdefault(one, []).append(number)
    return tables


def _match(folder: str, tables: Sequence[Mapping[str, list[int]]]) -> list[int]:
    exact, plain, synonyms = tables
    return exact.get(folder) or plain.get(_plain(folder)) or synonyms.get(_plain(folder)) or []


def _names(id2label: Mapping[int, str]) -> set[str]:
    return {part.strip() for label in id2label.values() for part in label.split(",")}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _range(id2label: Mapping[int, str]) -> str:
    return f"{min(id2label)}..{max(id2label)}" if id2label else "of which there are none"
