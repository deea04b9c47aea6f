"""The prefixes and identifiers that a search holds, of all queries at once.

Knows the trie and numbers; nothing of where scores come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.search.interface import Float64, Int64
from llama_index_genret.trie import LiveTrie, Nodes


@dataclass(frozen=True)
class Beams:
    """Prefixes of all queries, parallel arrays of length n."""

    query: Int64
    log_prob: Float64
    nodes: Nodes
    prefixes: NDArray[np.int32]

    def take(self, rows: Int64) -> Beams:
        return Beams(self.query[rows], self.log_prob[rows], self.nodes.take(rows), self.prefixes[rows])

    def where(self, mask: NDArray[np.bool_]) -> Beams:
        return self if mask.all() else self.take(np.flatnonzero(mask))

    def __add__(self, other: Beams) -> Beams:
        return Beams(
            np.concatenate([self.query, other.query]),
            np.concatenate([self.log_prob, other.log_prob]),
            self.nodes + other.nodes,
            np.concatenate([self.prefixes, other.prefixes]),
        )

    def ranked(self, trie: LiveTrie) -> Beams:
        """Sorted by query, the best first, ties in the order of their tokens."""
        best = self.take(np.lexsort((-self.log_prob, self.query)))
        ties = (best.log_prob[1:] == best.log_prob[:-1]) & (best.query[1:] == best.query[:-1])
        return best.take(np.lexsort((trie.order(best.nodes), -best.log_prob, best.query))) if ties.any() else best

    def place(self) -> Int64:
        """Where each stands within its query, of sorted ones."""
        return np.arange(len(self.query)) - np.searchsorted(self.query, self.query, side="left")


def roots(trie: LiveTrie, n: int) -> Beams:
    """One empty prefix for each of n queries."""
    return Beams(np.arange(n), np.zeros(n), trie.roots(n), np.full((n, trie.depth), -1, np.int32))


class Dropped:
    """The best prefix that each query's search dropped: its bound and its order."""

    def __init__(self, n_queries: int) -> None:
        self.log_prob, self.order = np.full(n_queries, -np.inf), np.zeros(n_queries, np.int64)
        self.any = np.zeros(n_queries, np.bool_)

    def note(self, trie: LiveTrie, beams: Beams) -> None:
        """Take account of at most one a query."""
        query, order = beams.query, trie.order(beams.nodes)
        better = ~self.any[query] | (beams.log_prob > self.log_prob[query])
        better |= (beams.log_prob == self.log_prob[query]) & (order < self.order[query])
        query = query[better]
        self.log_prob[query], self.order[query], self.any[query] = beams.log_prob[better], order[better], True


def cut(trie: LiveTrie, pool: Beams, width: int, spent: NDArray[np.bool_], dropped: Dropped) -> Beams:
    """The best `width` of each query that has spent its budget, and all of the others."""
    place = pool.place()
    beyond = (place >= width) & spent[pool.query]
    if not beyond.any():
        return pool
    dropped.note(trie, pool.take(np.flatnonzero(beyond & (place == width))))
    return pool.take(np.flatnonzero(~beyond))


def best_of_each(pool: Beams, width: int) -> tuple[Beams, Beams]:
    """(the best `width` of each query, the rest)."""
    place = pool.place()
    return pool.where(place < width), pool.take(np.flatnonzero(place >= width))


class Finished:
    """The best k finished identifiers of each query, and the bar that they set for prefixes once they are k."""

    def __init__(self, none: Beams, n_queries: int, k: int) -> None:
        self.beams, self.k = none, k
        self.bar, self.order = np.full(n_queries, -np.inf), np.full(n_queries, np.iinfo(np.int64).max)
        self._any = False

    def set_aside(self, trie: LiveTrie, pool: Beams) -> Beams:
        """Take the finished ones out of the pool."""
        ends = trie.is_leaf(pool.nodes)
        if not ends.any():
            return pool
        both = (self.beams + pool.take(np.flatnonzero(ends))).ranked(trie)
        place = both.place()
        self.beams, last = both.where(place < self.k), both.take(np.flatnonzero(place == self.k - 1))
        self.bar[last.query], self.order[last.query] = last.log_prob, trie.order(last.nodes)
        self._any |= bool(len(last.query))
        return pool.take(np.flatnonzero(~ends))

    def unbeaten(self, trie: LiveTrie, pool: Beams) -> Beams:
        """Without the prefixes that k finished identifiers already beat: a longer one is never more probable."""
        if not self._any or not len(pool.query):
            return pool
        bar = self.bar[pool.query]
        better, equal = pool.log_prob > bar, pool.log_prob == bar
        if equal.any():
            better |= equal & (trie.order(pool.nodes) < self.order[pool.query])
        return pool.where(better)
