"""Read evaluation queries and their right images from QUERIES.jsonl.

Depends on the index and its records; independent of scorers and LlamaIndex.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index_genret.corpus import Record
from llama_index_genret.corpus.jsonl import objects
from llama_index_genret.errors import CorpusError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.store.index import Index

IMAGE_KEYS = ("image_id", "file_name")

_QUERY_LINE = '{"query": "...", "file_name": "..."}'


@dataclass(frozen=True)
class EvaluationQuery:
    """A query with its right images.

    text: the query text, empty for a query of only an image.
    image_ids: ids of the right images.
    kind: free text. The report shows the figures of each kind. Default "query".
    image: image file of an image query, with or without a text. Default None.
    """

    text: str
    image_ids: frozenset[str]
    kind: str = "query"
    image: Path | None = None

    def prompt(self, index: Index) -> Prompt:
        """Return the prompt of this query for the model of the index.

        Raises:
            QueryError: see `PromptSet.for_query`.
        """
        if self.image is None:
            return index.prompts.for_query(index.tokenizer, self.text)
        return index.prompts.for_image(index.tokenizer, self.image, self.text)


def read_queries(path: Path, records: Sequence[Record]) -> list[EvaluationQuery]:
    """Read QUERIES.jsonl: one `{"query": ..., "file_name" | "image_id": one or a list, "kind": optional}` per line.

    An image query has its file in `image`, relative to the folder of `path`. It may have no `query`.

    Raises:
        CorpusError: a line is broken, or the index has no such image. The message has the file and the line.
    """
    ids = {
        "file_name": {record.file_name: record.image_id for record in records},
        "image_id": {record.image_id: record.image_id for record in records},
    }
    queries = [_query(row, where, ids, path.parent) for where, row in objects(path, example=_QUERY_LINE)]
    if not queries:
        raise CorpusError(f"{path} has no queries. Write one query per line, as {_QUERY_LINE}.")
    return queries


def _query(row: Mapping[str, Any], where: str, ids: Mapping[str, Mapping[str, str]], folder: Path) -> EvaluationQuery:
    text, image = row.get("query", "" if "image" in row else None), row.get("image", "")
    key = next((key for key in IMAGE_KEYS if key in row), None)
    if not isinstance(text, str) or not isinstance(image, str) or key is None:
        raise CorpusError(f'{where}expected {_QUERY_LINE} (or "image_id"), got {str(dict(row))[:80]}.')
    wanted = row[key] if isinstance(row[key], list) else [row[key]]
    missing = [name for name in wanted if not isinstance(name, str) or name not in ids[key]]
    if missing or not wanted:
        raise CorpusError(
            f"{where}the index has no image {missing or wanted!r:.200}. Correct {key}, or add the image to the index."
        )
    if image and not _is_file(folder / image):
        raise CorpusError(f'{where}the query image {folder / image} does not exist. Correct "image".')
    image_ids = frozenset(ids[key][name] for name in wanted)
    return EvaluationQuery(text, image_ids, str(row.get("kind", "query")), folder / image if image else None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is invalid for a file
        return False
