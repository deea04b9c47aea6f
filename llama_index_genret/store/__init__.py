"""The persisted index: one folder, written whole or not at all.

INDEX/manifest.json      the commit point: versions, scheme, fingerprints, and the checksum of every file
INDEX/pictures/          images that were given as bytes, if any
INDEX/data-<12 hex>/     files of one write: records.jsonl, trie.bin, edits.safetensors, tokenizer.json,
                         codebooks.safetensors, pseudo_queries.jsonl, adapter/..., update/..., new_rows.safetensors,
                         prior.npy. Files of earlier writes stay in place while the manifest lists them.
"""

from llama_index_genret.store.create import create_index
from llama_index_genret.store.edits import add_images, remove_images, store_pseudo_queries
from llama_index_genret.store.filters import RecordFilter, RecordFilters
from llama_index_genret.store.index import Index
from llama_index_genret.store.manifest import PICTURES, FileEntry, Manifest, check_free, read_manifest
from llama_index_genret.store.open import load_index
from llama_index_genret.store.pseudo_queries import (
    PSEUDO_QUERIES,
    ImagePseudoQueries,
    Provenance,
    PseudoQuery,
    text_key,
)
from llama_index_genret.store.save_weights import drop_update, store_adapter, store_tuning, store_update
from llama_index_genret.store.scoring import Scoring, ScoringChoice, TunedScoring
from llama_index_genret.store.weights import NewRows

__all__ = [
    "PICTURES",
    "PSEUDO_QUERIES",
    "FileEntry",
    "ImagePseudoQueries",
    "Index",
    "Manifest",
    "NewRows",
    "Provenance",
    "PseudoQuery",
    "RecordFilter",
    "RecordFilters",
    "Scoring",
    "ScoringChoice",
    "TunedScoring",
    "add_images",
    "check_free",
    "create_index",
    "drop_update",
    "load_index",
    "read_manifest",
    "remove_images",
    "store_adapter",
    "store_pseudo_queries",
    "store_tuning",
    "store_update",
    "text_key",
]
