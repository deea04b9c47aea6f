"""Open an index folder: verify each file against its checksum, read the records, map the trie.

Depends on files and numpy; independent of models.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llama_index_genret.errors import IdentifierError, IndexDamaged
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.store.array_files import read_npy, read_safetensors
from llama_index_genret.store.index import Index
from llama_index_genret.store.manifest import MANIFEST, Manifest, read_manifest, readable_manifest, verify
from llama_index_genret.store.records import RECORDS, read_records
from llama_index_genret.trie import LiveTrie, open_trie, with_edits

EDITS = "edits.safetensors"


def load_index(folder: Path) -> Index:
    """Open an index.

    Every file is verified against its checksum before it is read. The trie is then memory-mapped. Trained weights are
    not read; `Index.file` verifies them later. If another process replaces the index meanwhile, the newer version is
    loaded.

    Raises:
        IndexNotFound: the folder has no manifest.
        IndexVersionError: this release does not read the format version.
        IndexDamaged: a file is missing, differs from its checksum or cannot be used; the error names the file.
    """
    while True:
        manifest = read_manifest(folder)
        try:
            return _open(folder, manifest)
        except IndexDamaged:
            if readable_manifest(folder) in (manifest, None):
                raise


def _open(folder: Path, manifest: Manifest) -> Index:
    def verified_file(name: str) -> Path:
        if name not in manifest.files:
            raise IndexDamaged(f"{folder / MANIFEST} lists no file {name!r}. Create the index again: `genret index`.")
        path = folder / manifest.files[name].path
        verify(path, manifest.files[name])
        return path

    folders = [Path(folder).absolute() for folder in manifest.folders]
    records, identifiers = read_records(verified_file(RECORDS), folders)
    tokenizer = IndexTokenizer.from_file(verified_file("tokenizer.json"))
    if tokenizer.fingerprint != manifest.tokenizer:
        raise IndexDamaged(
            f"{folder / MANIFEST} and tokenizer.json have different tokenizer fingerprints. Restore the index, or "
            "create it again."
        )
    edits = verified_file(EDITS) if EDITS in manifest.files else None
    return Index(
        folder=folder,
        manifest=manifest,
        records=records,
        identifiers=identifiers,
        trie=_open_trie(verified_file("trie.bin"), verified_file("leaf_to_record.npy"), edits, len(records)),
        tokenizer=tokenizer,
    )


def _open_trie(path: Path, leaf_to_record: Path, edits: Path | None, n_records: int) -> LiveTrie:
    base = open_trie(path)
    try:
        keys = read_npy(leaf_to_record)
        if keys.dtype != np.int64 or keys.shape != (base.n_leaves,):
            raise ValueError(f"{leaf_to_record.name} is {keys.dtype} {keys.shape} for {base.n_leaves} identifiers")
        trie = with_edits(base, keys, read_safetensors(edits)) if edits else LiveTrie(base, keys=keys)
        rows = trie.key(np.arange(trie.n_leaves))
        if trie.live is not None:
            rows = rows[trie.live.contains(np.arange(trie.n_leaves))]
        if not np.array_equal(np.sort(rows), np.arange(n_records)):
            raise ValueError(f"{len(rows)} identifiers do not map one to one to {n_records} images")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, IdentifierError) as error:
        raise IndexDamaged(
            f"the identifiers in {path.parent} cannot be used: {error}. Restore the index, or create it again."
        ) from error
    return trie
