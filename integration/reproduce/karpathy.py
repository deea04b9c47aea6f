"""Flickr30K and MS-COCO in the files of Karpathy's split: `dataset_flickr30k.json`, `dataset_coco.json`.

Depends on the format, and on the rule which split is trained on; independent of protocols, indexes and models.
Format: `images`, each with `filename`, `split`, `sentences` (each with `raw`), and in MS-COCO `filepath`, the folder.

MS-COCO's `restval` images belong to train, as in nearly all work since. GRACE drops these 30,504 images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from llama_index_genret.corpus import Record
from llama_index_genret.corpus.images import decode_image, image_sha256
from llama_index_genret.errors import CorpusError

TRAIN = ("train", "restval")
"""Splits whose captions are trained on. The captions of all others are queries, and nothing else."""

HELD_OUT = ("val", "test")


@dataclass(frozen=True)
class KarpathyImage:
    """One image. file_name: below the image root, with forward slashes; image_id: the same without its suffix."""

    image_id: str
    file_name: str
    split: str
    captions: tuple[str, ...]

    @property
    def is_trained_on(self) -> bool:
        """Return True if its captions may be trained on."""
        return self.split in TRAIN


@dataclass(frozen=True)
class Karpathy:
    """A dataset in the order of its file. empty_captions: of train images, left out. As queries they stay, and fail."""

    name: str
    images: tuple[KarpathyImage, ...]
    empty_captions: int = 0

    def of_split(self, split: str) -> list[KarpathyImage]:
        """Return the images of one split."""
        return [image for image in self.images if image.split == split]

    def queries(self, split: str) -> list[tuple[str, str]]:
        """Return every caption of a split with its image id, all captions of an image:

        25,010 of MS-COCO's test split.
        """
        return [(caption, image.image_id) for image in self.of_split(split) for caption in image.captions]

    @cached_property
    def untaught(self) -> Mapping[str, frozenset[str]]:
        """Return the captions, as `plain` words, that must not be trained on: of each val and test image."""
        return {
            image.image_id: frozenset(filter(None, map(plain, image.captions)))
            for image in self.images
            if not image.is_trained_on
        }

    def shared_wordings(self, split: str) -> int:
        """Count the captions of a split that are, word for word, also the caption of a train image, and so are read."""
        read = {plain(caption) for image in self.images if image.is_trained_on for caption in image.captions}
        return sum(plain(caption) in read for caption, _ in self.queries(split))


def read_karpathy(path: Path) -> Karpathy:
    """Read the file.

    Raises:
        CorpusError: the file cannot be read or is not of this format, or two images share a file name.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["images"]
        name = str(content["dataset"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f'{path} is no file of Karpathy\'s split: {error!r}. Expected {{"dataset": ..., "images": [...]}}.'
        ) from error
    images: dict[str, KarpathyImage] = {}
    empty = 0
    for place, row in enumerate(rows):
        image = _image(row, f"{path}, images[{place}]")
        if image.image_id in images:
            raise CorpusError(f"{path}, images[{place}]: the image {image.image_id!r} is listed twice.")
        if image.is_trained_on:
            kept = tuple(caption for caption in image.captions if caption.strip())
            empty += len(image.captions) - len(kept)
            image = KarpathyImage(image.image_id, image.file_name, image.split, kept)
        images[image.image_id] = image
    return Karpathy(name, tuple(images.values()), empty)


def _image(row: Any, where: str) -> KarpathyImage:
    try:
        file_name = str(PurePosixPath(row.get("filepath", ""), row["filename"]))
        split, captions = row["split"], tuple(sentence["raw"] for sentence in row["sentences"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{where}: expected filename, split and sentences with raw, missing or wrong: {error!r}."
        ) from error
    if split not in (*TRAIN, *HELD_OUT):
        raise CorpusError(f"{where}: the split {split!r} is none of {', '.join((*TRAIN, *HELD_OUT))}.")
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise CorpusError(f"{where}: sentences must be texts, at least one, not {captions!r:.200}.")
    if ".." in PurePosixPath(file_name).parts or PurePosixPath(file_name).is_absolute():
        raise CorpusError(f"{where}: {file_name!r} leaves the image root.")
    return KarpathyImage(file_name.removesuffix(PurePosixPath(file_name).suffix), file_name, split, captions)


def plain(text: str) -> str:
    """Return casefolded words, with one space before, between and after. `plain(a) in plain(b)` then finds a phrase."""
    words = "".join(c if c.isalnum() else " " for c in text.casefold()).split()
    return f" {' '.join(words)} " if words else ""


def checked_files(
    images: Iterable[KarpathyImage], root: Path, *, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> Iterator[tuple[str, str]]:
    """Return the sha256 of every image file, decoded once. A missing or broken file is an error: nothing is dropped.

    Raises:
        ImageError: a file is missing or damaged. The message has its path.
    """
    for image in progress(images):
        path = root / image.file_name
        decode_image(path)
        yield image.image_id, image_sha256(path)


def records_of(
    images: Sequence[KarpathyImage], root: Path, sha256: Mapping[str, str], captions: Mapping[str, Collection[str]]
) -> tuple[Record, ...]:
    """Return the images as records of the package, with `split` as their metadata.

    Args:
        sha256: of each image's file. captions: what the index may know of an image; images without an entry have none.
    """
    return tuple(
        Record(
            image.image_id,
            root / image.file_name,
            image.file_name,
            sha256[image.image_id],
            tuple(captions.get(image.image_id, ())),
            {"split": image.split},
        )
        for image in images
    )
