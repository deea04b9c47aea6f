"""The query sets of each corpus, and the goals of a trained index on them.

Depends on file names and numbers; independent of models.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_index_genret.corpus import Record
from llama_index_genret.errors import CorpusError
from llama_index_genret.store import Index

RECALLS = ("recall@1", "recall@5", "recall@10")


@dataclass(frozen=True)
class QuerySet:
    """`queries/NAME.jsonl` and its parts.

    goal: recall@1/5/10 of an index that was trained on the corpus. None: the figures of the best peer.
    """

    name: str
    corpus: str
    goal: tuple[float, float, float] | None = None
    shows_images: bool = False


QUERY_SETS = (
    QuerySet("emoji-keywords", "emoji", (0.48, 0.68, 0.76)),
    QuerySet("emoji-openmoji-tags", "emoji", (0.42, 0.66, 0.75)),
    QuerySet("emoji-images", "emoji", shows_images=True),
    QuerySet("emoji-labels-tags", "emoji-labels", (0.28, 0.52, 0.62)),
    QuerySet("openclipart-keywords", "openclipart"),
    QuerySet("openclipart-descriptions", "openclipart"),
)
CORPORA = tuple(dict.fromkeys(query_set.corpus for query_set in QUERY_SETS))


def bare_records(corpora: Path, name: str) -> list[Record]:
    """Return the records of a corpus from its metadata alone. It opens no image and computes no checksum."""
    folder = corpora / name
    rows = map(json.loads, (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        Record(
            row["file_name"].removesuffix(".png"), folder / row["file_name"], row["file_name"], "", tuple(row["text"])
        )
        for row in rows
    ]


def corpus_of(index: Index, corpora: Path) -> str:
    """Return the corpus from which an index was made, by its image ids and captions.

    Raises:
        CorpusError: the index was made of none of them, or only of a part.
    """
    held = _captions(index.records)
    for name in CORPORA:
        if _captions(bare_records(corpora, name)) == held:
            return name
    raise CorpusError(
        f"{index.folder} holds none of the corpora {', '.join(CORPORA)} of {corpora} in full. "
        "Make it with `genret index` from one of these folders."
    )


def _captions(records: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    return {record.image_id: record.captions for record in records}
