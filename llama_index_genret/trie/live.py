"""Stores the identifiers of an index that changes: an immutable base, a small trie of added identifiers, tombstones.

A `LiveTrie` is one immutable version. An edit makes another version, and a running search keeps the version with which
it began. A prefix is a node of the base, of the added trie, or of both. A prefix exists only if a live identifier
begins with it. So every result equals that of a trie rebuilt from scratch, which tests compare.

Depends on the flat trie; independent of searches, files and threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import FilterError
from llama_index_genret.trie.children import Children
from llama_index_genret.trie.filter import LeafFilter
from llama_index_genret.trie.flat import Int64, Trie

_TOKEN_BITS = 31


@dataclass(frozen=True)
class Nodes:
    """n prefixes of a `LiveTrie`.

    base: (n,) int64, node of the base trie, -1 where no live identifier of the base begins with the prefix.
    added: (n,) int64, the same for the added trie. Default None: no identifiers were added.
    """

    base: Int64
    added: Int64 | None = None

    def take(self, rows: Int64) -> Nodes:
        """Return the prefixes at the given rows."""
        return Nodes(self.base[rows], None if self.added is None else self.added[rows])

    def put(self, rows: Int64, nodes: Nodes) -> Nodes:
        """Return a copy in which `nodes` replace the prefixes at `rows`."""
        base, added = self.base.copy(), None if self.added is None else self.added.copy()
        base[rows] = nodes.base
        if added is not None and nodes.added is not None:
            added[rows] = nodes.added
        return Nodes(base, added)

    def __add__(self, other: Nodes) -> Nodes:
        if self.added is None or other.added is None:
            return Nodes(np.concatenate([self.base, other.base]))
        return Nodes(np.concatenate([self.base, other.base]), np.concatenate([self.added, other.added]))


@dataclass(frozen=True, eq=False)
class _TrieChildren:
    """The children that one of the two tries contributes to an expansion.

    parents: (r,) int64, the expanded nodes of this trie.
    leaf_start: leaf number of the first leaf of this trie.
    entry: (m,) int64, the position in `children` of each child of the expansion, -1 where this trie has none.
        Default None: the positions are equal.
    """

    trie: Trie
    parents: Int64
    children: Children
    leaf_start: int
    entry: Int64 | None = None

    def take(self, entries: Int64) -> Int64:
        """Return the nodes of the given children of the expansion, -1 where this trie has none."""
        if self.entry is None:
            return self.children.nodes_at(entries, self.children.rows_of(entries))
        place = self.entry[entries]
        here = place >= 0
        node = np.full(len(place), -1)
        node[here] = self.children.nodes_at(place[here], self.children.rows_of(place[here]))
        return node

    def nodes(self) -> Int64:
        """Return `take` of all children of the expansion."""
        node = self.children.node
        if self.entry is None:
            return node
        here = self.entry >= 0
        nodes = np.full(len(self.entry), -1)
        nodes[here] = node[self.entry[here]]
        return nodes

    def allowed(self, leaves: LeafFilter) -> NDArray[np.bool_]:
        """Return True for each of `children` with an allowed leaf below it.

        One rank at the first leaf of each child is enough, as the leaves of siblings are consecutive.
        """
        node = self.children.node
        if not len(node):
            return np.zeros(0, np.bool_)
        first = self.trie.first_leaf(node)
        if self.trie.has_one_length and node.min() >= self.trie.n_nodes - self.trie.n_leaves:
            return leaves.contains(first + self.leaf_start)
        before = leaves.before_leaf(first + self.leaf_start)
        after = np.empty_like(before)
        after[:-1] = before[1:]
        _, hi = self.trie.leaf_range(self.parents)
        after[self.children.offsets[1:] - 1] = leaves.before_leaf(hi + self.leaf_start)
        return after > before


@dataclass(frozen=True, eq=False)
class Expansion:
    """The children of n prefixes in a row: a ragged array of m entries.

    offsets: (n + 1,) int64, the children of row i are the entries offsets[i] .. offsets[i + 1].
    """

    offsets: Int64
    _parts: tuple[_TrieChildren, ...]
    _merged_token_ids: Int64 | None = None

    @cached_property
    def row(self) -> Int64:
        """Return (m,) int64, the position of each child's parent."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @cached_property
    def token_ids(self) -> Int64:
        """Return (m,) int64, the token that leads to each child. Tokens ascend within a row."""
        if self._merged_token_ids is not None:
            return self._merged_token_ids
        token_ids = self._only.children.token_ids
        return token_ids if self._only.entry is None else token_ids[self._only.entry]

    @cached_property
    def alphabet(self) -> Int64 | NDArray[np.int32]:
        """Return (a,) ascending: the tokens of all children, and few others."""
        return np.unique(self._merged_token_ids) if self._merged_token_ids is not None else self._only.children.alphabet

    def gather(self, block: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return (m,) the entry of `block` for each child.

        Args:
            block: (n, a), one column for each token of `alphabet`.
        """
        if self._merged_token_ids is not None:
            return block[self.row, np.searchsorted(self.alphabet, self._merged_token_ids)]
        values = self._only.children.gather(block)
        return values if self._only.entry is None else values[self._only.entry]

    def token_ids_at(self, entries: Int64) -> Int64:
        """Return the tokens of the given children."""
        if self._merged_token_ids is not None:
            return self._merged_token_ids[entries]
        children, place = self._only.children, entries if self._only.entry is None else self._only.entry[entries]
        rows = children.rows_of(place)
        return children.token_ids_at(children.nodes_at(place, rows), rows)

    def take(self, entries: Int64) -> Nodes:
        """Return the given children as prefixes."""
        return Nodes(*(part.take(entries) for part in self._parts))

    def child_nodes(self) -> list[tuple[Int64, Trie, int]]:
        """Return, for each trie that the prefixes lie in: (m,) the node of each child, -1 for none, and its trie.

        The third value is the leaf number of that trie's first leaf.
        """
        return [(part.nodes(), part.trie, part.leaf_start) for part in self._parts]

    @property
    def _only(self) -> _TrieChildren:
        """Return the part of the base. Valid only if no identifiers were added."""
        return self._parts[0]

    def allowed(self, leaves: LeafFilter) -> NDArray[np.bool_]:
        """Return (m,) bool, True for each child with an allowed leaf below it."""
        has_leaf = np.zeros(self.offsets[-1], np.bool_)
        for part in self._parts:
            if part.entry is None:
                return part.allowed(leaves)
            here = part.entry >= 0
            has_leaf[here] |= part.allowed(leaves)[part.entry[here]]
        return has_leaf


@dataclass(frozen=True, eq=False)
class LiveTrie:
    """One version of a changing set of identifiers. Leaf numbers count the leaves of `base`, then of `added`.

    base: the immutable trie.
    added: the trie of the identifiers that were added since. Default None: there are none.
    live: the leaves that exist. Default None: all.
    keys: (leaves of base,) int64, the caller's key of each leaf. Default None: the leaf number.
    added_keys: (leaves of added,) int64, the same for the leaves of `added`.
    """

    base: Trie
    added: Trie | None = None
    live: LeafFilter | None = None
    keys: Int64 | None = None
    added_keys: Int64 | None = None

    @cached_property
    def n_leaves(self) -> int:
        """Return the number of leaves, including removed ones."""
        return self.base.n_leaves + (self.added.n_leaves if self.added else 0)

    @property
    def n_live(self) -> int:
        """Return the number of identifiers, without removed ones."""
        return self.n_leaves if self.live is None else self.live.n_allowed

    @cached_property
    def depth(self) -> int:
        """Return the number of tokens in the longest identifier, including removed ones."""
        return max(self.base.depth, self.added.depth if self.added else 0)

    def roots(self, n: int) -> Nodes:
        """Return n copies of the root."""
        return Nodes(np.zeros(n, np.int64), None if self.added is None else np.zeros(n, np.int64))

    def expand(self, nodes: Nodes) -> Expansion:
        """Return all live children of all nodes. No node may be a leaf.

        for row, prefix in enumerate(nodes):
            for token in sorted({live identifier[len(prefix)] for those that begin with prefix}): yield row, token

        Raises:
            DeadEnd: one of the nodes is a leaf.
        """
        if nodes.added is None or self.added is None:
            children = self.base.children(nodes.base)
            part = _TrieChildren(self.base, nodes.base, children, 0)
            return self._compressed(part) if self.live else Expansion(children.offsets, (part,))
        first = self._part(self.base, nodes.base, 0)
        second = self._part(self.added, nodes.added, self.base.n_leaves)
        keys = [self._live_keys(part, rows) for part, rows in (first, second)]
        merged = np.union1d(keys[0][0], keys[1][0])
        parts = []
        for (part, _), (key, place) in zip((first, second), keys, strict=True):
            entry = np.full(len(merged), -1)
            entry[np.searchsorted(merged, key)] = place
            parts.append(replace(part, entry=entry))
        offsets = np.searchsorted(merged, np.arange(len(nodes.base) + 1) << _TOKEN_BITS)
        return Expansion(offsets, tuple(parts), merged & ((1 << _TOKEN_BITS) - 1))

    def is_leaf(self, nodes: Nodes) -> NDArray[np.bool_]:
        """Return True for each node at which an identifier ends."""
        ends = self.base.is_leaf(np.maximum(nodes.base, 0)) & (nodes.base >= 0)
        if nodes.added is not None and self.added is not None:
            ends |= self.added.is_leaf(np.maximum(nodes.added, 0)) & (nodes.added >= 0)
        return ends

    def leaf(self, nodes: Nodes) -> Int64:
        """Return the leaf number of each node. All nodes must be leaves."""
        if nodes.added is None or self.added is None:
            return self.base.leaf_rank(nodes.base)
        added = self.added.first_leaf(np.maximum(nodes.added, 0)) + self.base.n_leaves
        return np.where(nodes.base >= 0, self.base.first_leaf(np.maximum(nodes.base, 0)), added)

    def order(self, nodes: Nodes) -> Int64:
        """Return numbers that sort the prefixes as their token ids do. No prefix may be a prefix of another."""
        if nodes.added is None or self.added is None:
            return self.base.first_leaf(nodes.base)
        base = self.base.first_leaf(np.maximum(nodes.base, 0))
        added = self.added.first_leaf(np.maximum(nodes.added, 0))
        before = self._base_before_added
        base_before = np.where(nodes.base >= 0, base, before[np.minimum(added, len(before) - 1)])
        added_before = np.where(nodes.added >= 0, added, np.searchsorted(before, base, side="right"))
        return np.asarray(base_before + added_before)

    def key(self, leaves: Int64) -> Int64:
        """Return the caller's key of each leaf."""
        if self.added_keys is None:
            return leaves if self.keys is None else self.keys[leaves]
        n_base = self.base.n_leaves
        base = np.minimum(leaves, n_base - 1)
        base_keys = base if self.keys is None else self.keys[base]
        return np.where(leaves < n_base, base_keys, self.added_keys[np.maximum(leaves - n_base, 0)])

    def restrict(self, leaf_filter: LeafFilter) -> LeafFilter:
        """Return the filter of the allowed leaves that exist.

        Raises:
            FilterError: `leaf_filter` was made for another version.
        """
        if leaf_filter.n_leaves != self.n_leaves:
            raise FilterError(
                f"the filter covers {leaf_filter.n_leaves} identifiers, the trie {self.n_leaves}: "
                "rebuild the filter from this version of the trie."
            )
        return leaf_filter if self.live is None else leaf_filter & self.live

    @cached_property
    def _base_before_added(self) -> Int64:
        """Return (added leaves,) int64, the number of leaves of the base that sort before each."""
        return leaves_before(self.base, self.added.paths()) if self.added else np.zeros(0, np.int64)

    @staticmethod
    def _part(trie: Trie, nodes: Int64, leaf_start: int) -> tuple[_TrieChildren, Int64]:
        rows = np.flatnonzero(nodes >= 0)
        return _TrieChildren(trie, nodes[rows], trie.children(nodes[rows]), leaf_start), rows

    def _live_keys(self, part: _TrieChildren, rows: Int64) -> tuple[Int64, Int64]:
        """Return (row, token) of each live child packed into one integer, and its position among the children."""
        keys = (rows[part.children.row] << _TOKEN_BITS) + part.children.token_ids
        if self.live is None or part.leaf_start:
            return keys, np.arange(len(keys))
        place = np.flatnonzero(part.allowed(self.live))
        return keys[place], place

    def _compressed(self, part: _TrieChildren) -> Expansion:
        assert self.live is not None
        entry = np.flatnonzero(part.allowed(self.live))
        offsets = np.searchsorted(entry, part.children.offsets)
        return Expansion(offsets, (replace(part, entry=entry),))


def leaves_before(trie: Trie, paths: NDArray[np.int32]) -> Int64:
    """Count the identifiers of `trie` that sort before each path. Return (n,) int64.

    for path in paths: yield sum(identifier < path for identifier in identifiers)

    Args:
        paths: (n, L) int32, -1 after the end of a short path.
    """
    rank = np.zeros(len(paths), np.int64)
    rows, node = np.arange(len(paths)), np.zeros(len(paths), np.int64)
    for column in [*paths.T, np.full(len(paths), -1, np.int32)]:
        ends = trie.is_leaf(node)
        stops = ends | (column[rows] < 0)
        rank[rows[stops]] = trie.first_leaf(node[stops]) + (ends & (column[rows] >= 0))[stops]
        rows, node = rows[~stops], node[~stops]
        child, token = trie.nearest_children(node, column[rows].astype(np.int64))
        equal = token == column[rows]
        lo, hi = trie.leaf_range(child[~equal])
        rank[rows[~equal]] = np.where(token[~equal] < column[rows][~equal], hi, lo)
        rows, node = rows[equal], child[equal]
    return rank
