"""A loaded index: records, identifiers, trie, tokenizer and manifest. Made by `create_index` and `load_index`.

Depends on files and numpy; independent of torch and LlamaIndex.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.corpus import Record
from llama_index_genret.errors import IndexChanged, IndexDamaged
from llama_index_genret.identifiers import Identifier, Scheme, get_scheme
from llama_index_genret.models.prompts import PromptSet
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.search import Hit
from llama_index_genret.store.array_files import read_npy, read_safetensors
from llama_index_genret.store.filters import Columns, RecordFilters
from llama_index_genret.store.manifest import Manifest, readable_manifest, verify
from llama_index_genret.store.pseudo_queries import (
    PSEUDO_QUERIES,
    ImagePseudoQueries,
    PseudoQuery,
    read_pseudo_queries,
)
from llama_index_genret.store.scoring import Scoring, ScoringChoice
from llama_index_genret.store.vectors import VECTORS, read_vectors
from llama_index_genret.store.weights import ADAPTER, weights_id
from llama_index_genret.trie import LeafFilter, LiveTrie, TriePrior

PRIOR = "prior.npy"
"""(records,) float32, log p(image | no query) of every record; NaN for records added after it was computed."""


@dataclass(frozen=True)
class Index:
    """A loaded index. Immutable: a change is a new write (`store_adapter`, `store_tuning`, edits) and a new load."""

    folder: Path
    manifest: Manifest
    records: tuple[Record, ...]
    identifiers: tuple[Identifier, ...]
    trie: LiveTrie
    tokenizer: IndexTokenizer

    @property
    def prompts(self) -> PromptSet:
        """Return the rendered prompts of the base model."""
        return self.manifest.prompts

    @property
    def is_trained(self) -> bool:
        """Tell whether trained weights are stored."""
        return any(name.startswith(ADAPTER) for name in self.manifest.files)

    @property
    def weights_id(self) -> str | None:
        """Return twelve hex digits that identify the trained weights, or None without them.

        A server's model name contains these digits.
        """
        return weights_id(self.manifest.files)

    @cached_property
    def log_prior(self) -> NDArray[np.float32] | None:
        """Return (records,) log p(image | no query), NaN where it is not known; None before `genret tune`."""
        if PRIOR not in self.manifest.files:
            return None
        log_prior = read_npy(self.file(PRIOR))
        if log_prior.shape != (len(self.records),) or log_prior.dtype.kind != "f":
            raise IndexDamaged(
                f"{PRIOR} of {self.folder} is {log_prior.dtype} {log_prior.shape}, expected floats of shape "
                f"({len(self.records)},). Restore it, or create the index again."
            )
        return log_prior

    @cached_property
    def vectors(self) -> NDArray[np.float16] | None:
        """Return (records, d) float16 unit vectors in the space of the encoder, None for an index without.

        Raises:
            IndexDamaged: the file is missing, differs from the manifest, or does not fit the records.
        """
        encoder = self.manifest.encoder
        return None if encoder is None else read_vectors(self.file(VECTORS), len(self.records), encoder.dimension)

    @cached_property
    def prior(self) -> TriePrior | None:
        """Return `log_prior` summed over the leaves below every node of `trie`; None before `genret tune`."""
        if self.log_prior is None:
            return None
        row = self._rows_of_leaves
        of_leaves = np.where(row >= 0, self.log_prior[np.maximum(row, 0)], np.float32(np.nan))
        return TriePrior.of_leaves(self.trie, of_leaves)

    def scoring(self, choice: ScoringChoice | None = None, *, image_query: bool = False) -> Scoring:
        """Return the scoring of hits: the user's choice, else the tuned one, else log p(id | query).

        Args:
            image_query: True for an image query, to which the tuning on text queries does not apply.
        """
        default = Scoring() if image_query or self.manifest.tuned is None else self.manifest.tuned.scoring
        if default.eta and self.prior is None:  # all images of the prior are removed
            default = replace(default, eta=0.0)
        return (choice or ScoringChoice()).over(default)

    @cached_property
    def version(self) -> str:
        """Return twelve hex digits of a hash of all stored content. Every edit or training changes it."""
        return hashlib.sha256(self.manifest.model_dump_json(indent=1).encode()).hexdigest()[:12]

    @cached_property
    def rows_by_id(self) -> dict[str, int]:
        """Return the position in `records` of every image id."""
        return {record.image_id: row for row, record in enumerate(self.records)}

    @cached_property
    def pseudo_queries(self) -> dict[str, ImagePseudoQueries]:
        """Return the pseudo-queries of each image, by image id. Captions are never among them.

        Raises:
            IndexDamaged: the file is missing, differs from the manifest, or is broken.
        """
        if PSEUDO_QUERIES not in self.manifest.files:
            return {}
        return {line.image_id: line for line in read_pseudo_queries(self.file(PSEUDO_QUERIES))}

    def pseudo_queries_of(self, record: Record) -> tuple[PseudoQuery, ...]:
        """Return the pseudo-queries of one image."""
        line = self.pseudo_queries.get(record.image_id)
        return line.queries if line else ()

    def record_of(self, hit: Hit) -> Record:
        """Return the record of a hit."""
        return self.records[hit.key]

    def identifier_of(self, hit: Hit) -> str:
        """Return the identifier of a hit as readable text: `<g0_17><g1_5>` or `red apple`."""
        return self.tokenizer.read(self.identifiers[hit.key])

    @property
    def end_token(self) -> int:
        """Return the token that closes an identifier that is a prefix of another: the model's end-of-turn token."""
        return self.tokenizer.encode_markup(self.prompts.end)[0]

    def token_ids(self, row: int) -> tuple[int, ...]:
        """Return the token ids of the identifier of record `row`."""
        return tuple(self.tokenizer.symbol_id(symbol) for symbol in self.identifiers[row])

    @cached_property
    def columns(self) -> Columns:
        """Return the metadata of all records, by key."""
        return Columns([record.metadata for record in self.records])

    @cached_property
    def _rows_of_leaves(self) -> NDArray[np.int64]:
        return self.trie.key(np.arange(self.trie.n_leaves))

    def leaf_filter(self, filters: RecordFilters) -> LeafFilter:
        """Return the bitmap of the leaves whose records pass, for the `leaf_filter` of a search.

        Raises:
            FilterError: see `Columns.record_mask`.
        """
        return self.leaf_filter_of(self.columns.record_mask(filters))

    def leaf_filter_of(self, record_mask: NDArray[np.bool_]) -> LeafFilter:
        """Return the bitmap of the leaves of the records in a mask. record_mask: (records,) bool."""
        row = self._rows_of_leaves
        mask = np.zeros(len(row), np.bool_)
        mask[row >= 0] = record_mask[row[row >= 0]]  # a removed leaf has no record
        return LeafFilter.from_mask(mask)

    def scheme(self) -> Scheme:
        """Return the scheme with its frozen codebooks."""
        scheme = get_scheme(self.manifest.scheme, **self.manifest.scheme_options)
        name = "codebooks.safetensors"
        scheme.restore(read_safetensors(self.file(name)) if name in self.manifest.files else {})
        return scheme

    def file(self, name: str) -> Path:
        """Return the path of a stored file after verifying its checksum.

        Raises:
            IndexDamaged: the file is missing or differs from the manifest.
            IndexChanged: another process has written the index since it was loaded, and the file is gone.
        """
        entry = self.manifest.files[name]
        path = self.folder / entry.path
        try:
            verify(path, entry)
        except IndexDamaged as error:
            if readable_manifest(self.folder) == self.manifest:
                raise
            raise IndexChanged(
                f"{self.folder} was rewritten since it was loaded, and {name!r} of that version is gone: load it again."
            ) from error
        return path
