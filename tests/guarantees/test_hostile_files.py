"""Malformed files: each is read correctly, or raises an error with the file, the line and the fix."""

import hashlib
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from llama_index.core.schema import ImageNode

from integration.fuzz.small_index import draw, small_corpus, small_index
from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import CorpusError, IndexDamaged, MetadataError
from llama_index_genret.identifiers import ImageFacts, get_scheme
from llama_index_genret.llamaindex.documents import records_of, sealed_node
from llama_index_genret.models.identity import ModelEntry
from llama_index_genret.serving.batch import read_rows
from llama_index_genret.store import create_index, load_index
from llama_index_genret.store.manifest import FileEntry, manifest_text, read_manifest
from llama_index_genret.store.queries import EvaluationQuery, read_queries
from llama_index_genret.training.pseudo_queries import read_samples

SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"
"""Line separators of `str.splitlines` that JSON allows in a text."""


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path / "images")


# Queries

READERS = {
    "eval": lambda path: [(query.text, query.image_ids) for query in read_queries(path, small_corpus().records)],
    "batch": lambda path: [row["query"] for row in read_rows(path)],
    "samples": read_samples,
}


@pytest.mark.parametrize("reader", READERS)
def test_query_may_hold_unusual_line_separators(tmp_path, reader):
    row = {"query": SEPARATORS, "file_name": "a.png"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    (query,) = READERS[reader](tmp_path / "q.jsonl")
    expected = {"eval": (SEPARATORS, frozenset("a")), "batch": SEPARATORS, "samples": " ".join(SEPARATORS.split())}
    assert query == expected[reader]


@pytest.mark.parametrize("reader", READERS)
def test_byte_order_mark_before_queries_is_ignored(tmp_path, reader):
    (tmp_path / "q.jsonl").write_bytes(b'\xef\xbb\xbf{"query": "red", "image_id": "a"}\r\n')
    assert len(READERS[reader](tmp_path / "q.jsonl")) == 1


BROKEN = {
    "deep": '{"query": "x", "image_id": "a", "k": ' + "[" * 100_000,
    "huge number": '{"query": "x", "image_id": "a", "k": 1' + "0" * 5000 + "}",
    "not UTF-8": b'{"query": "\xff", "image_id": "a"}',
    "a list of lists": '{"query": "x", "image_id": [["a"]]}',
    "an object": '{"query": "x", "file_name": {"a": 1}}',
    "a name that no file can have": '{"image": "' + "x" * 5000 + '", "image_id": "a"}',
    "a NUL in a name": '{"image": "a\\u0000.png", "image_id": "a"}',
    "an image that is a number": '{"image": 7, "image_id": "a"}',
    "two queries": '{"query": "x", "query": "y", "image_id": "a"}',
    "half a surrogate pair": '{"query": "\\ud800", "image_id": "a"}',
    "no query": '{"image_id": "a"}',
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_query_raises_with_file_and_line(tmp_path, case):
    row = BROKEN[case] if isinstance(BROKEN[case], bytes) else BROKEN[case].encode()
    (tmp_path / "q.jsonl").write_bytes(b'{"query": "red", "image_id": "a"}\n\n' + row + b"\n")
    with pytest.raises(CorpusError, match=r"q\.jsonl, line 3: ") as raised:
        READERS["eval"](tmp_path / "q.jsonl")
    assert len(str(raised.value)) < 6000


@pytest.mark.parametrize("reader", ["batch", "samples"])
@pytest.mark.parametrize("case", ["deep", "huge number", "not UTF-8"])
def test_malformed_line_raises_in_the_other_readers(tmp_path, reader, case):
    row = BROKEN[case] if isinstance(BROKEN[case], bytes) else BROKEN[case].encode()
    (tmp_path / "q.jsonl").write_bytes(b'{"query": "red"}\n' + row)
    with pytest.raises(CorpusError, match=r"q\.jsonl, line 2"):
        READERS[reader](tmp_path / "q.jsonl")


def test_query_that_is_no_text_has_its_own_error(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"query": 1, "image_id": "a"}')
    with pytest.raises(CorpusError, match=r'expected \{"query"'):
        read_queries(tmp_path / "q.jsonl", small_corpus().records)


def test_query_of_control_tokens_is_a_text(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"query": "<|im_end|>\\u0000", "image_id": "a"}')
    assert read_queries(tmp_path / "q.jsonl", small_corpus().records) == [
        EvaluationQuery("<|im_end|>\0", frozenset("a"))
    ]


# Metadata


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_pipe_is_refused_without_waiting(folder, name):
    os.mkfifo(folder / name)
    with pytest.raises(MetadataError, match=rf"{name} is not a regular file"):
        read_corpus(folder)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links on this system")
def test_dangling_metadata_link_is_refused(folder):
    (folder / "metadata.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(MetadataError, match=r"metadata\.jsonl is not a regular file"):
        read_corpus(folder)


def test_error_of_a_repeated_key_names_only_this_key(folder):
    keys = {f"key{i}": i for i in range(5000)}
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", **keys})[:-1] + ', "key7": 0}')
    with pytest.raises(MetadataError, match="given twice, 'key7'") as raised:
        read_corpus(folder)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("depth", range(960, 1010, 3))
def test_nesting_raises_with_its_line_at_any_depth(folder, depth):
    """Some depths can be parsed, but not be printed in the error message."""
    nested = "[" * depth + "]" * depth
    for key in ("file_name", "text", "questions", "other"):
        (folder / "metadata.jsonl").write_text(f'{{"file_name": "a.png"}}\n{{"image_id": "x", "{key}": {nested}}}')
        with pytest.raises(MetadataError, match="line 2: "):
            read_corpus(folder)
        assert len(read_corpus(folder, skip_broken=True)) == 1


# An index


def stored(tmp_path, captions=(), metadata=None):
    """Return an index of one image."""
    like = small_index()
    record = replace(like.records[0], captions=captions, metadata=metadata or {})
    scheme = get_scheme("numeric", digits=2)
    return create_index(
        tmp_path / "stored",
        images=small_corpus().folder,
        records=[record],
        identifiers=scheme.fit(ImageFacts(1), seed=0),
        scheme=scheme,
        tokenizer=like.tokenizer,
        model=ModelEntry(name_or_path="none", fingerprint="0" * 64, base_tokenizer=like.tokenizer.fingerprint),
        prompts=like.prompts,
    )


def test_captions_with_line_separators_load_unchanged(tmp_path):
    index = stored(tmp_path, captions=(SEPARATORS, "a\nb\rc\0"), metadata={"note": SEPARATORS, "n": 10**400})
    assert load_index(index.folder).records == index.records
    assert index.records[0].captions == (SEPARATORS, "a\nb\rc\0")
    assert index.records[0].metadata == {"note": SEPARATORS, "n": 10**400}


def test_document_caption_with_separators_stays_whole(folder):
    node = ImageNode(image_path=str(folder / "a.png"), text=SEPARATORS, id_="a")
    node = sealed_node(node, folder / "pictures")
    assert [record.captions for record in records_of([node], [folder])] == [(SEPARATORS,)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_document_metadata_must_be_json(folder, value):
    node = ImageNode(image_path=str(folder / "a.png"), text="red", id_="a", metadata={"year": value})
    with pytest.raises(MetadataError, match="'a' cannot be stored"):
        sealed_node(node, folder / "pictures")


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(small_index().folder, tmp_path / "index")
    return tmp_path / "index"


def put(folder, name, content):
    """Replace a stored file and its checksum, so that only parsing finds the damage."""
    manifest = read_manifest(folder)
    entry = FileEntry(path=manifest.files[name].path, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / entry.path).write_bytes(content)
    changed = manifest.model_copy(update={"files": {**manifest.files, name: entry}})
    (folder / "manifest.json").write_text(manifest_text(changed))


def record_lines(**change):
    lines = [
        json.dumps({**record.to_json(), "identifier": ["0", str(i)], "folder": 0})
        for i, record in enumerate(small_index().records)
    ]
    changed = json.loads(lines[2]) | change
    lines[2] = json.dumps({key: value for key, value in changed.items() if value != "absent"})
    return "".join(f"{line}\n" for line in lines).encode()


@pytest.mark.parametrize(
    "content",
    [
        record_lines(identifier="absent"),
        record_lines(identifier="07"),
        record_lines(identifier=[]),
        record_lines(folder=7),
        record_lines(folder=-1),
        record_lines(file_name="../../etc/passwd"),
        record_lines()[:300] + b"\n" + b"[" * 100_000,
        record_lines().replace(b"third", b"\xff"),
        b"7\n",
    ],
)
def test_invalid_records_raise_with_file_and_line(copied, content):
    put(copied, "records.jsonl", content)
    with pytest.raises(IndexDamaged, match=r"records\.jsonl, line \d: no record"):
        load_index(copied)


def npy(array):
    import io

    np.save(into := io.BytesIO(), array)
    return into.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01\x00\x76\x00{'descr': '<i8',\x00",
        npy(np.arange(3)),
        npy(np.arange(4.0)),
        npy(np.array([0, 1, 2, 9])),
        npy(np.array([0, 1, 2, 2])),
        npy(np.arange(4)).replace(b"(4,), ", b"(4**9,)"),
    ],
)
def test_invalid_leaves_are_refused(copied, content):
    """Otherwise some searches would fail later, or return a wrong image."""
    put(copied, "leaf_to_record.npy", content)
    with pytest.raises(IndexDamaged, match="Restore"):
        load_index(copied)


@pytest.mark.parametrize(
    "path", ["../elsewhere", "/etc/passwd", "data-0123456789ab/../../x", "", "manifest.json", "data-0123456789ab/a\0"]
)
def test_manifest_paths_outside_the_index_are_refused(copied, path):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["extra"] = {"path": path, "size": 0, "sha256": ""}
    del manifest["checksum"]
    (copied / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))
    with pytest.raises(IndexDamaged, match=r"manifest\.json is damaged"):
        load_index(copied)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format_version": 1' + "0" * 5000 + "}"])
def test_unparsable_manifest_raises_with_its_path(copied, content):
    (copied / "manifest.json").write_text(content)
    with pytest.raises(IndexDamaged, match=r"manifest\.json"):
        load_index(copied)


def test_manifest_folder_raises_with_its_path(copied):
    (copied / "manifest.json").unlink()
    (copied / "manifest.json").mkdir()
    with pytest.raises(IndexDamaged, match=r"manifest\.json"):
        load_index(copied)
