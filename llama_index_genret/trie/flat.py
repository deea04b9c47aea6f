"""Stores a set of token sequences so that one array slice gives the tokens that may come next.

Depends on token ids, node numbers and leaf numbers; independent of text, tokenizers, images and models.
The slow twin is `_reference.DictTrie`; tests compare the two.

Nodes are numbered breadth first: 0 is the root, the nodes of one level are contiguous and sorted by
(parent, token id). So the children of node v are the nodes first_child[v] .. first_child[v + 1] - 1, and the next
state is the number of the child. Only two things are stored: one small code per node, and one offset per node
that has children. Leaves are numbered by the rank of their identifier, so every node is a range of leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llama_index_genret.errors import DeadEnd, IdentifierError, IndexDamaged, SearchError
from llama_index_genret.trie.children import Children

Int64 = NDArray[np.int64]

DTYPES = {
    "level_start": ("<i8",),
    "first_child": ("<i4", "<i8"),
    "code": ("|u1", "<u2", "<u4"),
    "alphabet": ("<i4",),
    "alphabet_start": ("<i8",),
    "leaf_lo": ("<i4", "<i8"),
}
"""Maps each array of a trie to the dtypes that it may have."""


@dataclass(frozen=True, eq=False)
class Trie:
    """An immutable prefix tree over token-id sequences, made by `build_trie` or `open_trie`.

    Methods that take `nodes` take int64 arrays. They keep the shape unless their docstring says otherwise, and raise
    SearchError for a node that does not exist.

    level_start: (depth + 2,) int64, first node of every level from the root's on, then n_nodes.
    first_child: (nodes above the last level + 1,) int32 or int64.
    code: (n_nodes,) smallest unsigned type that fits, the position of the node's token in its level's alphabet.
    alphabet: int32, sorted distinct token ids of level 1, then of level 2, ...
    alphabet_start: (depth + 1,) int64, where each level's alphabet begins.
    leaf_lo: int32 or int64, first leaf below a node. It covers all nodes unless all identifiers have one length.
        Then it covers the nodes above the last two levels, as `first_child` gives the first leaf of the others.
    """

    level_start: Int64
    first_child: NDArray[np.integer]
    code: NDArray[np.unsignedinteger]
    alphabet: NDArray[np.int32]
    alphabet_start: Int64
    leaf_lo: NDArray[np.integer]

    @cached_property
    def n_nodes(self) -> int:
        """Return the number of nodes, including the root."""
        return int(self.level_start[-1])

    @cached_property
    def n_leaves(self) -> int:
        """Return the number of identifiers."""
        return int(self.leaf_range(np.zeros(1, np.int64))[1][0])

    @cached_property
    def depth(self) -> int:
        """Return the number of tokens in the longest identifier."""
        return len(self.level_start) - 2

    @cached_property
    def level_sizes(self) -> tuple[int, ...]:
        """Return the number of nodes at depth 1, 2, ..., `depth`."""
        return tuple(int(size) for size in np.diff(self.level_start[1:]))

    @cached_property
    def has_one_length(self) -> bool:
        """Return True if all identifiers have the same number of tokens."""
        return len(self.leaf_lo) < self.n_nodes

    @cached_property
    def _last_level(self) -> int:
        return int(self.level_start[-2])

    def children(self, nodes: Int64) -> Children:
        """Return all children of all nodes, in one gather.

            for row, node in enumerate(nodes):
                for token_id, child in sorted(children_of(node)): yield row, child, token_id

        Args:
            nodes: (n,) inner nodes; repeats are allowed.
        Raises:
            DeadEnd: one of the nodes is a leaf. Sampling from a row without a next token would give NaN.
        """
        nodes = self._existing(nodes)
        if nodes.ndim != 1:
            raise SearchError(f"children() needs nodes of shape (n,), not {nodes.shape}.")
        inner = nodes if nodes.max(initial=0) < self._last_level else np.minimum(nodes, self._last_level - 1)
        first = self.first_child.take(inner).astype(np.int64)
        counts = self.first_child.take(inner + 1) - first
        if inner is not nodes or not counts.all():
            raise self._dead_end(nodes)
        offsets = np.zeros(len(nodes) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        return Children(offsets, first, self, nodes)

    def is_leaf(self, nodes: Int64) -> NDArray[np.bool_]:
        """Return True for each node at which an identifier ends."""
        return self._ends(self._existing(nodes))

    def leaf_range(self, nodes: Int64) -> tuple[Int64, Int64]:
        """Return the leaves below each node as (lo, hi): leaves lo .. hi - 1."""
        nodes = self._existing(nodes)
        last = nodes
        for _ in range(self.depth):
            ended = self._ends(last)
            if ended.all():
                break
            last = np.where(ended, last, self.first_child.take(np.where(ended, 0, last) + 1).astype(np.int64) - 1)
        return self.first_leaf(nodes), self.first_leaf(last) + 1

    def first_leaf(self, nodes: Int64) -> Int64:
        """Return the first leaf below each node. Node numbers are not checked."""
        if not self.has_one_length:
            return self.leaf_lo.take(nodes).astype(np.int64)
        if not nodes.size:
            return nodes
        lowest, highest, stored = nodes.min(), nodes.max(), len(self.leaf_lo)
        if highest < stored:
            return self.leaf_lo.take(nodes).astype(np.int64)
        if lowest >= self._last_level:
            return nodes - self._last_level
        if lowest >= stored and highest < self._last_level:
            return self.first_child.take(nodes).astype(np.int64) - self._last_level
        below = np.where(nodes < self._last_level, self.first_child.take(nodes, mode="clip"), nodes) - self._last_level
        return np.where(nodes < stored, self.leaf_lo.take(nodes, mode="clip"), below) if stored else below

    def leaf_rank(self, nodes: Int64) -> Int64:
        """Return the leaf number of each node. All nodes must be leaves.

        Raises:
            SearchError: one of the nodes is no leaf.
        """
        nodes = self._existing(nodes)
        inner = ~self._ends(nodes)
        if inner.any():
            raise SearchError(
                f"node {nodes[inner].flat[0]} is no leaf: identifiers continue below it, so it has no rank. "
                "Use leaf_range() for the leaves below it."
            )
        return self.first_leaf(nodes)

    def advance(self, nodes: ArrayLike, token_ids: ArrayLike) -> Int64:
        """Return the child of each node for its token, or -1 where it has none. A leaf has no children.

            for node, token_id in zip(nodes, token_ids): yield dict(children_of(node)).get(token_id, -1)

        The two arrays broadcast. A binary search among the siblings keeps the cost low at a wide root.
        """
        nodes, token_ids = np.broadcast_arrays(self._existing(nodes), token_ids)
        inner = ~self._ends(nodes)
        child = np.full(nodes.shape, -1)
        nearest, token = self.nearest_children(nodes[inner], token_ids[inner])
        child[inner] = np.where(token == token_ids[inner], nearest, -1)
        return child

    def nearest_children(self, nodes: Int64, token_ids: Int64) -> tuple[Int64, Int64]:
        """Return the last child of each inner node whose token is at most the given one, and its token.

        If all children have larger tokens, return the first child.
        """
        alphabet_start = self.alphabet_start[self.level_of(nodes)]
        lo, hi = self.first_child[nodes].astype(np.int64), self.first_child[nodes + 1].astype(np.int64) - 1
        while (lo < hi).any():
            middle = (lo + hi + 1) // 2  # equals lo where lo >= hi, so that lo does not change
            fits = self._token_ids(middle, alphabet_start) <= token_ids
            lo, hi = np.where(fits, middle, lo), np.where(fits, hi, middle - 1)
        return lo, self._token_ids(lo, alphabet_start)

    def walk(self, token_ids: Sequence[int]) -> int:
        """Return the node that the tokens lead to from the root. No tokens lead to the root.

        Raises:
            IdentifierError: no identifier begins with the tokens. The message shows the first token without a child,
                and its depth.
        """
        node = 0
        for depth, token_id in enumerate(token_ids):
            child = int(self.advance(node, token_id))
            if child < 0:
                ended = self.is_leaf(np.asarray(node))
                why = "the identifier ends before it" if ended else "no identifier continues with it"
                raise IdentifierError(f"token {token_id} at depth {depth} of {tuple(token_ids)}: {why}.")
            node = child
        return node

    def token_ids_of(self, leaf: int) -> tuple[int, ...]:
        """Return the identifier of a leaf.

        Raises:
            SearchError: the leaf does not exist.
        """
        if not 0 <= leaf < self.n_leaves:
            raise SearchError(f"there is no leaf {leaf}: the trie has {self.n_leaves}, numbered from 0.")
        node, token_ids = np.zeros(1, np.int64), []
        for _ in range(self.depth):
            if self._ends(node)[0]:
                break
            children = self.children(node)
            child = int(np.searchsorted(self.first_leaf(children.node), leaf, side="right")) - 1
            token_ids.append(int(children.token_ids[child]))
            node = children.node[child : child + 1]
        return tuple(token_ids)

    def paths(self) -> NDArray[np.int32]:
        """Return (n_leaves, depth) int32, all identifiers in leaf order; -1 after the end of a short one."""
        paths = np.full((self.depth, self.n_leaves), -1, np.int32)
        for level in range(1, self.depth + 1):
            nodes = np.arange(self.level_start[level], self.level_start[level + 1])
            lo, hi = self.leaf_range(nodes)
            leaves = np.repeat(hi - np.cumsum(hi - lo), hi - lo) + np.arange((hi - lo).sum())
            paths[level - 1, leaves] = np.repeat(self._token_ids(nodes, self.alphabet_start[level - 1]), hi - lo)
        return paths.T

    def token_ids(self) -> Int64:
        """Return all distinct token ids of all identifiers, ascending."""
        return np.unique(self.alphabet).astype(np.int64)

    def level_of(self, nodes: Int64) -> Int64:
        """Return the depth of each node: the number of tokens from the root."""
        return np.asarray(np.searchsorted(self.level_start, nodes, side="right") - 1)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the trie by field name, in the format of `from_arrays`."""
        return {name: getattr(self, name) for name in DTYPES}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Trie:
        """Make a trie of the given arrays without copying them. The cost does not depend on their size.

        The arrays are not read, apart from their lengths and the entries at level boundaries.
        Raises:
            IndexDamaged: names, dtypes, lengths or boundary entries are inconsistent.
        """
        if arrays.keys() != DTYPES.keys():
            raise IndexDamaged(f"a trie must have the arrays {sorted(DTYPES)}, not {sorted(arrays)}.")
        for name, array in arrays.items():
            if array.ndim != 1 or array.dtype.str not in DTYPES[name]:
                raise IndexDamaged(f"{name} is {array.dtype.str} {array.shape}: expected (n,) of {DTYPES[name]}.")
        trie = cls(**{name: read_only(array) for name, array in arrays.items()})
        if problem := _inconsistency(trie):
            raise IndexDamaged(f"the arrays of the trie are inconsistent: {problem}.")
        return trie

    def _existing(self, nodes: ArrayLike) -> Int64:
        nodes = np.asarray(nodes)
        if nodes.size and (nodes.dtype.kind not in "iu" or nodes.min() < 0 or nodes.max() >= self.n_nodes):
            raise SearchError(f"nodes must be integers in 0 .. {self.n_nodes - 1}, not {nodes}.")
        return nodes.astype(np.int64, copy=False)

    def _ends(self, nodes: Int64) -> NDArray[np.bool_]:
        on_last_level = np.asarray(nodes >= self._last_level)
        if self.has_one_length:
            return on_last_level
        above = np.minimum(nodes, self._last_level - 1)
        return np.asarray(on_last_level | (self.first_child[above] == self.first_child[above + 1]))

    def _dead_end(self, nodes: Int64) -> DeadEnd:
        at = int(self._ends(nodes).argmax())
        return DeadEnd(
            f"node {nodes[at]} (row {at}) ends an identifier: no token can follow. "
            "Call is_leaf() first and leave out the rows that are finished."
        )

    def _token_ids(self, nodes: Int64, alphabet_start: Int64) -> Int64:
        return self.alphabet.take(self.code.take(nodes) + alphabet_start).astype(np.int64)


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Return a read-only view of the array."""
    view = array.view()
    view.flags.writeable = False
    return view


def _inconsistency(trie: Trie) -> str:
    """Describe an inconsistency of the lengths or of the entries at level boundaries. Return '' if there is none."""
    level_start, alphabet_start = trie.level_start, trie.alphabet_start
    if len(level_start) < 3 or level_start[0] != 0 or level_start[1] != 1 or (np.diff(level_start) < 1).any():
        return f"level_start is {level_start}, expected 0, 1, ... ascending"
    if len(trie.code) != trie.n_nodes:
        return f"code has {len(trie.code)} entries for {trie.n_nodes} nodes"
    if len(trie.leaf_lo) not in (trie.n_nodes, trie.level_start[-3]):
        return f"leaf_lo has {len(trie.leaf_lo)} entries for levels that start at {level_start}"
    if len(trie.first_child) != trie._last_level + 1:
        return f"first_child has {len(trie.first_child)} entries for {trie._last_level} nodes"
    if (trie.first_child[level_start[:-1]] != level_start[1:]).any():
        return "first_child does not lead from each level to the next"
    if len(alphabet_start) != trie.depth + 1 or alphabet_start[0] != 0 or (np.diff(alphabet_start) < 1).any():
        return f"alphabet_start is {alphabet_start} for {trie.depth} levels"
    if alphabet_start[-1] != len(trie.alphabet):
        return f"alphabet has {len(trie.alphabet)} entries, alphabet_start gives {alphabet_start[-1]}"
    return ""
