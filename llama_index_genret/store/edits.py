"""Add and remove images of an index, and store pseudo-queries, without training. Each edit is one atomic write.

While few images have changed, the edits are stored beside the trie's file, which is kept. Beyond `COMPACT_FROM` they
are merged into a new trie in the same write.

Depends on the index; independent of models. `store.build.assign_identifiers` makes the identifiers of new images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llama_index_genret.corpus import Record
from llama_index_genret.errors import DuplicateImage, EncoderError, UnknownImage
from llama_index_genret.identifiers import Identifier, Scheme
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.store.index import PRIOR, Index
from llama_index_genret.store.manifest import check_unchanged, commit, only_writer_of
from llama_index_genret.store.open import EDITS, load_index
from llama_index_genret.store.pseudo_queries import PSEUDO_QUERIES, ImagePseudoQueries, write_pseudo_queries
from llama_index_genret.store.records import write_records
from llama_index_genret.store.vectors import VECTORS, write_vectors
from llama_index_genret.store.weights import NEW_ROWS, NewRows
from llama_index_genret.trie import LiveTrie, add_identifiers, compact, edits_of, remove_identifiers, save_trie

COMPACT_FROM = 0.1
"""Share of the images that may change before the trie's file is rewritten."""


def remove_images(index: Index, image_ids: Sequence[str]) -> Index:
    """Remove images from the index, so that no search finds them, and return the new version. Image files are kept.

    Raises:
        UnknownImage: the index has no such image. Nothing is removed.
        IndexChanged: another process has written the index since it was loaded. Nothing is removed.
        IndexBusy: another process is writing the index. Nothing is removed.
        NotWritten: the disk is full or read-only. Nothing is removed.
    """
    unknown = [image_id for image_id in image_ids if image_id not in index.rows_by_id]
    if unknown:
        raise UnknownImage(f"{index.folder} has no image {unknown[0]!r} ({len(unknown)} of {len(image_ids)} unknown).")
    gone = {index.rows_by_id[image_id] for image_id in image_ids}
    kept = [row for row in range(len(index.records)) if row not in gone]
    removed = [index.token_ids(row) for row in sorted(gone)]
    trie = remove_identifiers(index.trie, removed, end_token=index.end_token)
    new_row = np.full(len(index.records), -1)
    new_row[kept] = np.arange(len(kept))
    records, identifiers = [index.records[row] for row in kept], [index.identifiers[row] for row in kept]
    prior = None if index.log_prior is None else index.log_prior[kept]
    vectors = None if index.vectors is None else index.vectors[kept]
    return _write(index, _renumber(trie, new_row), records, identifiers, index.scheme(), prior, vectors)


def add_images(
    index: Index,
    records: Sequence[Record],
    identifiers: Sequence[Identifier],
    scheme: Scheme,
    *,
    tokenizer: IndexTokenizer | None = None,
    vectors: NDArray[np.floating] | None = None,
    new_rows: NewRows | None = None,
) -> Index:
    """Add images to the index, which a search finds by their identifiers at once, and return the new version.

    The model has not been trained on these images.

    Args:
        identifiers, scheme, tokenizer: the output of `store.build.assign_identifiers`.
        vectors: (n, d) unit vectors of the new images, required if the index has an encoder.
        new_rows: rows of all symbols that the trained weights lack; replaces the stored rows.
    Raises:
        DuplicateImage: an image id is in the index already.
        IdentifierCollision: an identifier is in the index already.
        IndexChanged, IndexBusy, NotWritten: see `remove_images`.
    """
    twice = [record.image_id for record in records if record.image_id in index.rows_by_id]
    if twice:
        raise DuplicateImage(
            f"{index.folder} has an image {twice[0]!r} already ({len(twice)} of {len(records)} exist). Give it "
            "another image_id in metadata.jsonl, or remove the old one first: `genret remove`."
        )
    index = replace(index, tokenizer=tokenizer or index.tokenizer)
    token_ids = [[index.tokenizer.symbol_id(symbol) for symbol in identifier] for identifier in identifiers]
    keys = range(len(index.records), len(index.records) + len(records))
    trie = add_identifiers(index.trie, token_ids, keys, end_token=index.end_token)
    prior = index.log_prior
    prior = None if prior is None else np.pad(prior, (0, len(records)), constant_values=np.nan)
    if (vectors is None) != (index.vectors is None):
        raise EncoderError(
            f"{index.folder} has {'no ' if index.vectors is None else ''}vectors, and the new images have "
            f"{'none' if vectors is None else 'some'}. Add them with the encoder of the index."
        )
    if vectors is not None and index.vectors is not None:
        vectors = np.concatenate([index.vectors, np.asarray(vectors, np.float16).reshape(-1, index.vectors.shape[1])])
    merged = [*index.identifiers, *identifiers]
    return _write(index, trie, [*index.records, *records], merged, scheme, prior, vectors, new_rows)


def store_pseudo_queries(index: Index, pseudo_queries: Sequence[ImagePseudoQueries]) -> Index:
    """Store the pseudo-queries of the images in the order of the records. They replace all stored ones.

    Raises:
        IndexChanged, IndexBusy, NotWritten: see `remove_images`.
    """
    lines = sorted(pseudo_queries, key=lambda line: index.rows_by_id[line.image_id])
    with only_writer_of(index.folder):
        check_unchanged(index.folder, index.manifest)
        commit(
            index.folder,
            index.manifest,
            lambda into: write_pseudo_queries(into, lines),
            keep=lambda name: name != PSEUDO_QUERIES,
        )
    return load_index(index.folder)


def _renumber(trie: LiveTrie, new_row: np.ndarray[tuple[int], np.dtype[np.int64]]) -> LiveTrie:
    """Replace the keys of the leaves by the new record rows. A removed leaf gets -1, which no search returns."""
    keys = new_row[trie.key(np.arange(trie.base.n_leaves))]
    added_keys = None if trie.added_keys is None else new_row[trie.added_keys]
    return LiveTrie(trie.base, trie.added, trie.live, keys, added_keys)


def _write(
    index: Index,
    trie: LiveTrie,
    records: Sequence[Record],
    identifiers: Sequence[Identifier],
    scheme: Scheme,
    log_prior: NDArray[np.float32] | None,
    vectors: NDArray[np.floating] | None,
    new_rows: NewRows | None = None,
) -> Index:
    changed = 2 * trie.n_leaves - trie.n_live - trie.base.n_leaves
    if changed > COMPACT_FROM * trie.base.n_leaves:
        trie = compact(trie)
    folders = list(index.manifest.folders)
    places = []
    for record in records:
        folder = str(_folder_of(record))
        if folder not in folders:
            folders.append(folder)
        places.append(folders.index(folder))
    replaced = {"records.jsonl", "leaf_to_record.npy", "codebooks.safetensors", EDITS, PRIOR, VECTORS}
    if trie.base is not index.trie.base:
        replaced.add("trie.bin")
    grows = index.tokenizer.fingerprint != index.manifest.tokenizer
    forgets = PSEUDO_QUERIES in index.manifest.files and len(records) < len(index.records)
    if forgets:
        replaced.add(PSEUDO_QUERIES)

    def write(into: Path) -> None:
        write_records(into, records, identifiers, places)
        np.save(into / "leaf_to_record.npy", trie.key(np.arange(trie.base.n_leaves)))
        if trie.base is not index.trie.base:
            save_trie(trie.base, into / "trie.bin")
        if trie.added or trie.live:
            save_file(edits_of(trie), into / EDITS)
        if grows:
            (into / "tokenizer.json").write_text(index.tokenizer.to_json(), encoding="utf-8")
        if new_rows:
            new_rows.save(into / NEW_ROWS)
        if forgets:
            left = {record.image_id for record in records}
            write_pseudo_queries(into, [line for line in index.pseudo_queries.values() if line.image_id in left])
        if log_prior is not None:
            np.save(into / PRIOR, log_prior)
        if vectors is not None:
            write_vectors(into, vectors)
        if scheme.arrays():
            save_file(dict(scheme.arrays()), into / "codebooks.safetensors")

    changed_fields = {
        "folders": folders,
        "scheme_options": scheme.options(),
        "tokenizer": index.tokenizer.fingerprint,
    }
    manifest = index.manifest.model_copy(update=changed_fields)
    with only_writer_of(index.folder):
        check_unchanged(index.folder, index.manifest)
        commit(index.folder, manifest, write, keep=lambda name: name not in replaced)
    return load_index(index.folder)


def _folder_of(record: Record) -> Path:
    """Return the image folder: the record's path without its `file_name`."""
    return record.path.parents[len(Path(record.file_name).parts) - 1].resolve()
