"""Queries that a model has written of the images, and how they are stored: beside the records, never in them.

    pseudo_queries.jsonl     one image a line, with the texts, and which model wrote them in which way

Knows the format; nothing of models, or of how the texts are made (`pseudo_queries`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from llama_index_genret.errors import IndexDamaged

PSEUDO_QUERIES = "pseudo_queries.jsonl"


class PseudoQuery(BaseModel):
    """A query that a model has written. kind: of what it was asked to tell: `scene`, `object` or `relation`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    text: str
    kind: str


class Provenance(BaseModel):
    """Where queries come from.

    model: its folder, hub id, or the name that a server serves. fingerprint: of its weights, None where they were not
    looked at: those of a server or of `vllm.LLM`. style: sha256 of the sample queries, None without them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    fingerprint: str | None
    written_by: str
    seed: int
    temperature: float
    style: str | None


class ImagePseudoQueries(BaseModel):
    """What was written of one image. wanted: how many were asked for; there may be fewer, or none."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    image_id: str
    sha256: str
    wanted: int
    queries: tuple[PseudoQuery, ...]
    provenance: Provenance


def text_key(text: str) -> str:
    """Texts with one key differ only in case, spaces and punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s]|_", " ", folded).split())


def write_pseudo_queries(into: Path, written: Iterable[ImagePseudoQueries]) -> None:
    """Write `pseudo_queries.jsonl`."""
    with (into / PSEUDO_QUERIES).open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line.model_dump_json()}\n" for line in written)


def read_pseudo_queries(path: Path) -> list[ImagePseudoQueries]:
    """Read it.

    Raises:
        IndexDamaged: a line is broken; names file and line.
    """
    written = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                written.append(ImagePseudoQueries.model_validate_json(line))
            except ValidationError as error:
                raise IndexDamaged(
                    f"{path}, line {number}: {error}. Install the release that wrote it, or write the queries anew."
                ) from error
    return written
