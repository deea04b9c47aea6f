"""Files of queries are read, and each broken line raises an error."""

import json

import pytest

from llama_index_genret.errors import CorpusError
from llama_index_genret.store.queries import EvaluationQuery, read_queries


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_queries_refer_to_images_by_file_or_id(untrained_index, tmp_path):
    path = write(
        tmp_path / "q.jsonl",
        {"query": "a", "file_name": "red-circle.png"},
        "",
        {"query": "b", "image_id": ["red-bar", "blue-bar"], "kind": "tag"},
    )
    assert read_queries(path, untrained_index.records) == [
        EvaluationQuery("a", frozenset({"red-circle"})),
        EvaluationQuery("b", frozenset({"red-bar", "blue-bar"}), "tag"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        "{",
        "[]",
        '"text"',
        '{"query": "x"}',
        '{"query": 1, "file_name": "red-bar.png"}',
        '{"query": "x", "file_name": "no.png"}',
        '{"query": "x", "image_id": []}',
    ],
)
def test_broken_line_error_has_file_and_line(untrained_index, tmp_path, row):
    path = write(tmp_path / "q.jsonl", {"query": "a", "file_name": "red-circle.png"}, row)
    with pytest.raises(CorpusError, match=r"q\.jsonl, line 2"):
        read_queries(path, untrained_index.records)


def test_missing_or_empty_file_error_has_the_path(untrained_index, tmp_path):
    with pytest.raises(CorpusError, match="nowhere"):
        read_queries(tmp_path / "nowhere.jsonl", untrained_index.records)
    with pytest.raises(CorpusError, match="no queries"):
        read_queries(write(tmp_path / "empty.jsonl"), untrained_index.records)
