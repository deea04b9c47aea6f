"""Stores all identifiers of an index as a prefix tree over token ids."""

from llama_index_genret.trie.build import build_trie
from llama_index_genret.trie.children import Children
from llama_index_genret.trie.edits import (
    add_identifiers,
    close_beginnings,
    compact,
    edits_of,
    remove_identifiers,
    with_edits,
)
from llama_index_genret.trie.file import open_trie, save_trie, verify_trie
from llama_index_genret.trie.filter import LeafFilter
from llama_index_genret.trie.flat import Trie
from llama_index_genret.trie.live import Expansion, LiveTrie, Nodes
from llama_index_genret.trie.mass import child_masses
from llama_index_genret.trie.prior import TriePrior

__all__ = [
    "Children",
    "Expansion",
    "LeafFilter",
    "LiveTrie",
    "Nodes",
    "Trie",
    "TriePrior",
    "add_identifiers",
    "build_trie",
    "child_masses",
    "close_beginnings",
    "compact",
    "edits_of",
    "open_trie",
    "remove_identifiers",
    "save_trie",
    "verify_trie",
    "with_edits",
]
