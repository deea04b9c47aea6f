"""What lies in the file of an unfinished run: what it asks, then one batch of images a line.

    INDEX/pseudo_queries.jsonl.part     gone when all is stored

Knows the format; nothing of how texts are made or chosen.
"""

from __future__ import annotations

from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from llama_index_genret.store import PSEUDO_QUERIES, PseudoQuery

PART = f"{PSEUDO_QUERIES}.part"


class WriteOptions(BaseModel):
    """What can be chosen of a run.

    per_image: queries that an image should have; its captions count among them, so that a well captioned one gets none.
    batch_size: images that a model looks at together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    per_image: int = 8
    temperature: float = 0.8
    seed: int = 0
    batch_size: int = 8
    overwrite: bool = False


class WriteHeader(WriteOptions):
    """What decides the texts of a run: one that asks something else does not go on with them.

    style: sha256. model: fingerprint of the index's.
    """

    model: str
    style: str | None
    written_by: str


class ImageCandidates(BaseModel):
    """What a model wrote of one image, before queries of different images are compared."""

    image_id: str
    sha256: str
    queries: tuple[PseudoQuery, ...]
    refused: dict[str, int]


class Batch(BaseModel):
    """Images that a model looked at together."""

    model: str
    fingerprint: str | None
    images: list[ImageCandidates]


def write_line(part: BinaryIO, line: WriteHeader | Batch) -> None:
    """Add a line at the end, so that it outlives the process."""
    part.write(f"{line.model_dump_json()}\n".encode())
    part.flush()


def read_header(part: BinaryIO) -> WriteHeader | None:
    """What the run asks; None where the file does not say."""
    part.seek(0)
    try:
        return WriteHeader.model_validate_json(part.readline())
    except ValidationError:
        return None


def read_batches(part: BinaryIO) -> list[Batch]:
    """The whole batches of an earlier run; from a line that was written half or is broken, all is cut off."""
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
