"""Files of queries, as `genret eval`, `genret batch` and `genret index --pseudo-queries` read them.

Queries that are read, written as JSON and read again must be equal.
"""

import json

from integration.fuzz.small_index import scratch, small_corpus
from llama_index_genret.errors import CorpusError
from llama_index_genret.serving.batch import read_rows
from llama_index_genret.store.queries import read_queries
from llama_index_genret.training.pseudo_queries import read_samples

SEEDS = (
    b'{"query": "red", "file_name": "a.png"}\n\n{"query": "g", "image_id": ["third", "d"], "kind": "tag"}\n',
    b'\xef\xbb\xbf{"image": "images/a.png", "image_id": "a"}\r\n'
    b'{"query": "x", "image": "images/c.gif", "image_id": "a"}',
    '{"query": "one\u2028line", "file_name": ["a.png", "sub/b.jpg"]}'.encode(),
    b'{"query": 1, "file_name": {"a": [[[]]]}}',
)
WORDS = (
    *(b'"query"', b'"file_name"', b'"image_id"', b'"image"', b'"kind"', b'"a.png"', b'"third"', b'"images/a.png"'),
    *(b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"null", b"[[[[", b"{}", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\x85"),
)


def one(data: bytes) -> None:
    records, path = small_corpus().records, scratch() / "queries.jsonl"
    path.write_bytes(data)
    try:
        queries = read_queries(path, records)
    except CorpusError as error:
        assert str(path) in str(error), f"no file is named: {error}"
    else:
        lines = [
            {"query": query.text, "image_id": sorted(query.image_ids), "kind": query.kind}
            | ({"image": str(query.image)} if query.image else {})
            for query in queries
        ]
        path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
        assert read_queries(path, records) == queries
        path.write_bytes(data)
    for read in (read_rows, read_samples):
        try:
            list(read(path))
        except CorpusError as error:
            assert str(path) in str(error), f"no file is named: {error}"
