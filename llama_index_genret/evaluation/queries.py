"""Evaluation queries and the images that are right for each, read from QUERIES.jsonl.

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
from llama_index_genret.store import Index

NAMING_KEYS = ("image_id", "file_name")


_QUERY_LINE = '{"query": "...", "file_name": "..."}'


@dataclass(frozen=True)
class EvaluationQuery:
    """A query and the images that are right for it.

    kind: free text by which figures are parted. image: the file of a query that is a picture, alone or with a text.
    """

    text: str
    image_ids: frozenset[str]
    kind: str = "query"
    image: Path | None = None

    def prompt(self, index: Index) -> Prompt:
        """What the index's model is asked. Raises QueryError: see `PromptSet.for_query`."""
        if self.image is None:
            return index.prompts.for_query(index.tokenizer, self.text)
        return index.prompts.for_image(index.tokenizer, self.image, self.text)


def read_queries(path: Path, records: Sequence[Record]) -> list[EvaluationQuery]:
    """Read QUERIES.jsonl: `{"query": ..., "file_name" | "image_id": one or a list, "kind": optional}` a line.

    A query that is a picture names its file in `image`, relative to the folder of `path`; `query` may then be left out.

    Raises:
        CorpusError: a line is broken or names an image that the index lacks; names file and line.
    """
    ids = {
        "file_name": {record.file_name: record.image_id for record in records},
        "image_id": {record.image_id: record.image_id for record in records},
    }
    queries = [_query(row, where, ids, path.parent) for where, row in objects(path, example=_QUERY_LINE)]
    if not queries:
        raise CorpusError(f"{path} has no queries.")
    return queries


def _query(row: Mapping[str, Any], where: str, ids: Mapping[str, Mapping[str, str]], folder: Path) -> EvaluationQuery:
    text, image = row.get("query", "" if "image" in row else None), row.get("image", "")
    key = next((key for key in NAMING_KEYS if key in row), None)
    if not isinstance(text, str) or not isinstance(image, str) or key is None:
        raise CorpusError(f'{where}want {_QUERY_LINE} (or "image_id"), found {str(dict(row))[:80]}.')
    wanted = row[key] if isinstance(row[key], list) else [row[key]]
    missing = [name for name in wanted if not isinstance(name, str) or name not in ids[key]]
    if missing or not wanted:
        raise CorpusError(f"{where}the index has no image {missing or wanted!r:.200}. Correct {key}, or index it.")
    if image and not _is_file(folder / image):
        raise CorpusError(f"{where}the query's picture {folder / image} does not exist. Correct image.")
    image_ids = frozenset(ids[key][name] for name in wanted)
    return EvaluationQuery(text, image_ids, str(row.get("kind", "query")), folder / image if image else None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False
