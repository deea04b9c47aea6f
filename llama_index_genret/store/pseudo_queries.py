"""Store pseudo-queries, which a model writes for the images, beside the records and never in them.

    pseudo_queries.jsonl     one image per line: the texts, and the model and settings that generated them

Depends on the file format; independent of models. `training.pseudo_queries` generates the texts.
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
    """A query that a model has generated. kind: the subject that its prompt requests: `scene`, `object`, `relation`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    text: str
    kind: str


class Provenance(BaseModel):
    """The model and the settings that generated pseudo-queries.

    model: folder, hub id, or model name on a server.
    fingerprint: fingerprint of the model's weights; None for a server or `vllm.LLM`, whose weights are not read.
    written_by: the kind of writer.
    seed, temperature: sampling settings.
    style: sha256 of the sample queries, None without them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    fingerprint: str | None
    written_by: str
    seed: int
    temperature: float
    style: str | None


class ImagePseudoQueries(BaseModel):
    """The pseudo-queries of one image. wanted: number of requested queries; there may be fewer, or none."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    image_id: str
    sha256: str
    wanted: int
    queries: tuple[PseudoQuery, ...]
    provenance: Provenance


def text_key(text: str) -> str:
    """Return a key that is equal for texts that differ only in case, spaces and punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s]|_", " ", folded).split())


def write_pseudo_queries(into: Path, pseudo_queries: Iterable[ImagePseudoQueries]) -> None:
    """Write `pseudo_queries.jsonl` into a folder."""
    with (into / PSEUDO_QUERIES).open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line.model_dump_json()}\n" for line in pseudo_queries)


def read_pseudo_queries(path: Path) -> list[ImagePseudoQueries]:
    """Read `pseudo_queries.jsonl`.

    Raises:
        IndexDamaged: a line cannot be parsed; the error names file and line.
    """
    parsed = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                parsed.append(ImagePseudoQueries.model_validate_json(line))
            except ValidationError as error:
                raise IndexDamaged(
                    f"{path}, line {number}: {error}. Install the release that wrote it, or generate the queries again."
                ) from error
    return parsed
