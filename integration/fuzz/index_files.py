"""The files of a stored index: the first byte selects a file, the others are its content.

For the files that the manifest lists, the second byte decides whether it has the checksum of the new content. Without
that checksum only the content that was written may load. With it, a loaded index must be consistent: every image is
found.
"""

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np

from integration.fuzz.small_index import scratch, small_corpus, small_index
from llama_index_genret.errors import GenretError, StoreError
from llama_index_genret.store import Index, load_index, remove_images
from llama_index_genret.trie import open_trie, verify_trie

MANIFEST = "manifest.json"
NAMED = ("records.jsonl", "leaf_to_record.npy", "edits.safetensors", "trie.bin")
AS_WRITTEN, WITH_CHECKSUM = b"w", b"c"


@cache
def _edited() -> Index:
    """Return an index with a removed image, so that it has edits, and a manifest without a checksum of itself.

    Otherwise a changed manifest would be refused before it is parsed.
    """
    folder = scratch() / "edited"
    shutil.copytree(small_index().folder, folder)
    index = remove_images(load_index(folder), [small_corpus().records[3].image_id])
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["checksum"]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format_version": 3}))
    return index


@cache
def _contents() -> dict[str, tuple[Path, bytes]]:
    index = _edited()
    paths = {MANIFEST: index.folder / MANIFEST}
    paths |= {name: index.folder / index.manifest.files[name].path for name in NAMED if name in index.manifest.files}
    return {name: (path, path.read_bytes()) for name, path in paths.items()}


def _seeds() -> tuple[bytes, ...]:
    seeds = []
    for number, (name, (_, content)) in enumerate(_contents().items()):
        seeds += [
            bytes([number]) + how + content for how in ([b""] if name == MANIFEST else [AS_WRITTEN, WITH_CHECKSUM])
        ]
    return tuple(seeds)


SEEDS = _seeds()
WORDS = (
    *(b'"identifier"', b'"folder"', b'"captions"', b'"path"', b'"files"', b'"sha256"', b'"size"', b"../", b"null"),
    *(
        b"'descr': '<i8'",
        b"'descr': '|O'",
        b"'shape': (4,)",
        b"genrTRIE",
        b'"payload_bytes"',
        b'"arrays"',
        b"[[[[",
        b"-1",
    ),
)


def one(data: bytes) -> None:
    if not data:
        return
    names = list(_contents())
    name = names[data[0] % len(names)]
    for path, content in _contents().values():
        path.write_bytes(content)
    path, written = _contents()[name]
    how, content = (AS_WRITTEN, data[1:]) if name == MANIFEST else (data[1:2], data[2:])
    path.write_bytes(content)
    if name == "trie.bin":
        _open(path, content == written)
    if how == WITH_CHECKSUM:
        _write_checksum(name, content)
    try:
        index = load_index(_edited().folder)
    except GenretError as error:
        assert isinstance(error, StoreError), f"{type(error)}: {error}"
        assert content != written, f"what was written does not load: {error}"
        return
    if name != MANIFEST and how != WITH_CHECKSUM:
        assert content == written, "a file of another content loads"
    rows = index.trie.key(np.arange(index.trie.n_leaves))
    live = index.trie.live.contains(np.arange(index.trie.n_leaves)) if index.trie.live else np.full(len(rows), True)
    assert sorted(rows[live]) == list(range(len(index.records)))
    assert len(index.identifiers) == len(index.records)
    assert len(index.version) == 12


def _open(path: Path, unchanged: bool) -> None:
    try:
        open_trie(path)
        verify_trie(path)
        assert unchanged, "a trie of another content is not found out"
    except StoreError:
        assert not unchanged


def _write_checksum(name: str, content: bytes) -> None:
    path, written = _contents()[MANIFEST]
    manifest = json.loads(written)
    manifest["files"][name] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))
