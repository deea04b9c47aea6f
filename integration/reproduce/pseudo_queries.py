"""Queries that a captioner wrote for images whose own captions are held out.

GRACE trains on five of them for each test image. Depends on the file and the dataset; independent of indexes and
models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from integration.reproduce.karpathy import Karpathy, plain
from llama_index_genret.errors import CorpusError


@dataclass(frozen=True)
class PseudoQueries:
    """The queries of each image id. dropped: count of queries that contain a held-out caption of the same image."""

    texts: dict[str, tuple[str, ...]]
    dropped: int = 0

    def per_image(self, n_images: int) -> float:
        """Return the mean number of queries for an image of the held-out split."""
        return sum(map(len, self.texts.values())) / max(1, n_images)


def read_pseudo_queries(path: Path, dataset: Karpathy, split: str) -> PseudoQueries:
    """Read `{"file_name" | "image_id": ..., "text": [...]}` a line, for images of the held-out split.

    A query that contains a caption of its image, word for word, is dropped and counted: training on it would leak.
    Raises:
        CorpusError: a line is broken, or has an image that is not in the split.
    """
    ids = {image.image_id for image in dataset.of_split(split)}
    by_file = {image.file_name: image.image_id for image in dataset.of_split(split)}
    texts: dict[str, tuple[str, ...]] = {}
    dropped = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            image_id = row["image_id"] if "image_id" in row else by_file.get(row["file_name"])
            given = [row["text"]] if isinstance(row["text"], str) else list(map(str, row["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(f'{where}: want {{"file_name": "...", "text": [...]}}, found {line[:80]!r}.') from error
        if image_id not in ids or image_id in texts:
            raise CorpusError(f"{where}: {line[:80]!r} has no image of the split {split!r}, or one of an earlier line.")
        kept = [text for text in given if plain(text) and not says_a_caption(text, dataset.untaught[image_id])]
        dropped += len(given) - len(kept)
        texts[image_id] = tuple(kept)
    return PseudoQueries(texts, dropped)


def says_a_caption(text: str, captions: frozenset[str]) -> bool:
    """Return True if a text has one of the `plain` captions in it."""
    words = plain(text)
    return any(caption in words for caption in captions)
