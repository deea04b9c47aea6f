"""Gathers the children of many nodes at once and computes each array on first access.

Depends on the arrays of one `Trie`; independent of files, filters and searches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llama_index_genret.trie.flat import Trie

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Children:
    """The children of n nodes in a row: a ragged array of m entries. Each array is computed on first access.

    offsets: (n + 1,) int64, the children of row i are the entries offsets[i] .. offsets[i + 1].
    first: (n,) int64, the first child of each row; siblings ascend by token id, and their numbers are consecutive.
    """

    offsets: Int64
    first: Int64
    _trie: Trie
    _parents: Int64

    @cached_property
    def node(self) -> Int64:
        """Return (m,) int64, the node number of each child."""
        node = np.repeat(self.first - self.offsets[:-1], np.diff(self.offsets))
        node += np.arange(len(node))
        return node

    @cached_property
    def row(self) -> Int64:
        """Return (m,) int64, the position of each child's parent among the given nodes."""
        return np.repeat(np.arange(len(self.first)), np.diff(self.offsets))

    @cached_property
    def token_ids(self) -> Int64:
        """Return (m,) int64, the token that leads to each child."""
        return self.token_ids_at(self.node, self.row)

    @cached_property
    def alphabet(self) -> NDArray[np.int32]:
        """Return (a,) int32, ascending, a <= m: a superset of `token_ids`.

        It is the alphabet of the level if all children are on one level and that alphabet has at most m tokens.
        Otherwise it holds exactly the distinct tokens of the children.
        """
        return np.unique(self.token_ids).astype(np.int32) if self._level_alphabet is None else self._level_alphabet

    def gather(self, block: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return (m,) the entry of `block` for each child: the row of its parent, the column of its token.

            for row, child in enumerate(children): yield block[row, alphabet.index(token that leads to child)]

        Args:
            block: (n, a), one column for each token of `alphabet`.
        """
        if self.offsets[-1] == block.size:  # every node has every child
            return block.reshape(-1)
        place = np.repeat(np.arange(0, block.size, block.shape[1]), np.diff(self.offsets))
        if self._level_alphabet is None:
            place += np.searchsorted(self.alphabet, self.token_ids)
        else:
            place += self._trie.code.take(self.node)
        return block.reshape(-1).take(place)

    @cached_property
    def _level_alphabet(self) -> NDArray[np.int32] | None:
        """Return the alphabet of the level if all parents share one and it is no larger than m, else None."""
        if self._level is None:
            return None
        first, end = self._trie.alphabet_start[self._level : self._level + 2]
        return self._trie.alphabet[first:end] if end - first <= self.offsets[-1] else None

    def rows_of(self, entries: Int64) -> Int64:
        """Return the parent row of each given entry."""
        return np.searchsorted(self.offsets, entries, side="right") - 1

    def nodes_at(self, entries: Int64, rows: Int64) -> Int64:
        """Return the node numbers of the given entries; `rows` holds their parent rows."""
        return np.asarray(self.first[rows] + entries - self.offsets[rows])

    def token_ids_at(self, nodes: Int64, rows: Int64) -> Int64:
        """Return the tokens that lead to `nodes`; `rows` holds their parent rows."""
        level = self._trie.level_of(self._parents)[rows] if self._level is None else self._level
        place = self._trie.code.take(nodes) + self._trie.alphabet_start[level]
        return np.asarray(self._trie.alphabet.take(place), np.int64)

    @cached_property
    def _level(self) -> int | None:
        """Return the level that all parents share, None if they are on several."""
        if not len(self._parents):
            return 0
        starts = self._trie.level_start
        level = int(np.searchsorted(starts, self._parents[0], side="right")) - 1
        alike = starts[level] <= self._parents.min() and self._parents.max() < starts[level + 1]
        return level if alike else None
