"""The file of an unfinished run: a header line with its options, then one line per batch of images.

    INDEX/pseudo_queries.jsonl.part     removed when all queries are stored

Depends on the format only; independent of how texts are generated and chosen.
"""

from __future__ import annotations

from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from llama_index_genret.store import PSEUDO_QUERIES, PseudoQuery

PART = f"{PSEUDO_QUERIES}.part"


class WriteOptions(BaseModel):
    """The options of a run.

    per_image: number of queries per image, including its captions. An image with enough captions gets none.
    temperature: sampling temperature.
    seed: seed of the sampling and the choice of samples.
    batch_size: number of images per batch.
    overwrite: also write queries for images that have some, and discard an unfinished run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    per_image: int = 8
    temperature: float = 0.8
    seed: int = 0
    batch_size: int = 8
    overwrite: bool = False


class WriteHeader(WriteOptions):
    """The inputs that determine the texts of a run. A run with another header does not resume it.

    model: fingerprint of the index's model.
    style: sha256 of the sample queries, None without any.
    written_by: the kind of writer.
    """

    model: str
    style: str | None
    written_by: str


class ImageCandidates(BaseModel):
    """The queries that a model wrote for one image, before queries of different images are compared."""

    image_id: str
    sha256: str
    queries: tuple[PseudoQuery, ...]
    refused: dict[str, int]


class Batch(BaseModel):
    """The images of one batch, with the model that wrote their queries."""

    model: str
    fingerprint: str | None
    images: list[ImageCandidates]


def write_line(part: BinaryIO, line: WriteHeader | Batch) -> None:
    """Append a line and flush it, so that it survives a killed process."""
    part.write(f"{line.model_dump_json()}\n".encode())
    part.flush()


def read_header(part: BinaryIO) -> WriteHeader | None:
    """Return the header of the run, None for a file without a valid one."""
    part.seek(0)
    try:
        return WriteHeader.model_validate_json(part.readline())
    except ValidationError:
        return None


def read_batches(part: BinaryIO) -> list[Batch]:
    """Return the complete batches of an earlier run, and truncate the file before the first invalid line."""
    part.seek(0)
    batches = []
    end = len(part.readline())
    for line in part:
        if not line.endswith(b"\n"):
            break
        try:
            batches.append(Batch.model_validate_json(line))
        except ValidationError:
            break
        end += len(line)
    part.truncate(end)
    part.seek(end)
    return batches
