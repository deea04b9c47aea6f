"""Hold the prefixes and identifiers of a search, for all queries at once.

Depends on the trie and on numbers; independent of the source of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.search.protocol import Float64, Int64
from llama_index_genret.trie import LiveTrie, Nodes, TriePrior

SCORE, BOUND = 0, 1
"""Columns of a discount, in the order of `TriePrior`: from the sum of the priors, and from the least prior."""


@dataclass(frozen=True)
class Beams:
    """Prefixes of all queries, as parallel arrays of length n.

    discount: (n, 2) float64, subtracted from `log_prob`, columns `SCORE` and `BOUND`. None without a prior; `score` and
        `bound` then equal `log_prob`.
    """

    query: Int64
    log_prob: Float64
    nodes: Nodes
    prefixes: NDArray[np.int32]
    discount: Float64 | None = None

    @property
    def score(self) -> Float64:
        """Return the (n,) values by which a beam keeps prefixes, and by which finished identifiers are ranked."""
        return self.log_prob if self.discount is None else self.log_prob - self.discount[:, SCORE]

    @property
    def bound(self) -> Float64:
        """Return (n,) upper bounds for the scores of the identifiers below; a finished identifier has its score."""
        return self.log_prob if self.discount is None else self.log_prob - self.discount[:, BOUND]

    def take(self, rows: Int64) -> Beams:
        """Return the beams of these rows, in this order."""
        discount = None if self.discount is None else self.discount[rows]
        return Beams(self.query[rows], self.log_prob[rows], self.nodes.take(rows), self.prefixes[rows], discount)

    def where(self, mask: NDArray[np.bool_]) -> Beams:
        """Return the beams whose mask is set, or this object if all are set."""
        return self if mask.all() else self.take(np.flatnonzero(mask))

    def __add__(self, other: Beams) -> Beams:
        both = None if self.discount is None or other.discount is None else (self.discount, other.discount)
        return Beams(
            np.concatenate([self.query, other.query]),
            np.concatenate([self.log_prob, other.log_prob]),
            self.nodes + other.nodes,
            np.concatenate([self.prefixes, other.prefixes]),
            None if both is None else np.concatenate(both),
        )

    def ranked(self, trie: LiveTrie, by: Float64) -> Beams:
        """Return the beams sorted by query, best first, ties in the order of their tokens.

        Args:
            by: (n,) their scores or bounds.
        """
        rows = np.lexsort((-by, self.query))
        best = self.take(rows)
        by = best.log_prob if by is self.log_prob else by[rows]
        ties = (by[1:] == by[:-1]) & (best.query[1:] == best.query[:-1])
        return best.take(np.lexsort((trie.order(best.nodes), -by, best.query))) if ties.any() else best

    def place(self) -> Int64:
        """Return the (n,) position of each beam within its query. The beams must be sorted."""
        return np.arange(len(self.query)) - np.searchsorted(self.query, self.query, side="left")


@dataclass(frozen=True)
class Discount:
    """The value that a prior subtracts from the log-probability of a prefix: `eta` times its natural logarithm."""

    prior: TriePrior
    eta: float

    def of(self, nodes: Nodes) -> Float64:
        """Return (n, 2): SCORE from the sum of the priors of all images below, BOUND from the least of them."""
        return self.eta * self.prior.of(nodes)


def roots(trie: LiveTrie, n: int, discount: Discount | None) -> Beams:
    """Return one empty prefix for each of n queries."""
    nodes, empty = trie.roots(n), np.full((n, trie.depth), -1, np.int32)
    return Beams(np.arange(n), np.zeros(n), nodes, empty, discount.of(nodes) if discount else None)


class Dropped:
    """The best prefix that the search of each query has dropped: its bound and its order."""

    def __init__(self, n_queries: int) -> None:
        self.bound, self.order = np.full(n_queries, -np.inf), np.zeros(n_queries, np.int64)
        self.any = np.zeros(n_queries, np.bool_)

    def note(self, trie: LiveTrie, beams: Beams) -> None:
        """Record dropped beams. Without a prior there must be at most one for each query."""
        if beams.discount is not None:
            beams = beams.ranked(trie, beams.bound)
            beams = beams.where(beams.place() == 0)
        query, bound, order = beams.query, beams.bound, trie.order(beams.nodes)
        better = ~self.any[query] | (bound > self.bound[query])
        better |= (bound == self.bound[query]) & (order < self.order[query])
        query = query[better]
        self.bound[query], self.order[query], self.any[query] = bound[better], order[better], True

    def note_bounds(self, query: Int64, bound: Float64) -> None:
        """Record the bounds of dropped beams without their order. A result that ties with one is not certain."""
        highest, met = np.full_like(self.bound, -np.inf), np.zeros_like(self.any)
        np.maximum.at(highest, query, bound)
        met[query] = True
        better = met & (~self.any | (highest >= self.bound))
        self.bound[better], self.order[better], self.any[better] = highest[better], -1, True


def cut(trie: LiveTrie, pool: Beams, width: int, spent: NDArray[np.bool_], dropped: Dropped) -> Beams:
    """Keep the best `width` beams of each query that has spent its expansions, and all beams of the other queries."""
    place = pool.place()
    beyond = (place >= width) & spent[pool.query]
    if not beyond.any():
        return pool
    best_beyond = beyond & (place == width) if pool.discount is None else beyond
    dropped.note(trie, pool.take(np.flatnonzero(best_beyond)))
    return pool.take(np.flatnonzero(~beyond))


def split_best(pool: Beams, width: int) -> tuple[Beams, Beams]:
    """Return the best `width` beams of each query, and the rest."""
    place = pool.place()
    return pool.where(place < width), pool.take(np.flatnonzero(place >= width))


class Finished:
    """The best k finished identifiers of each query, and their k-th score, which a prefix must be able to beat."""

    def __init__(self, empty: Beams, n_queries: int, k: int) -> None:
        self.beams, self.k = empty, k
        self.bar, self.order = np.full(n_queries, -np.inf), np.full(n_queries, np.iinfo(np.int64).max)
        self._any = False

    def extract(self, trie: LiveTrie, pool: Beams) -> Beams:
        """Move the finished identifiers out of the pool, and return the remaining prefixes."""
        ends = trie.is_leaf(pool.nodes)
        if not ends.any():
            return pool
        both = self.beams + pool.take(np.flatnonzero(ends))
        both = both.ranked(trie, both.score)
        place = both.place()
        self.beams, last = both.where(place < self.k), both.take(np.flatnonzero(place == self.k - 1))
        self.bar[last.query], self.order[last.query] = last.score, trie.order(last.nodes)
        self._any |= bool(len(last.query))
        return pool.take(np.flatnonzero(~ends))

    def unbeaten(self, trie: LiveTrie, pool: Beams) -> Beams:
        """Drop the prefixes whose bound the k-th finished identifier beats, and return the others."""
        if not self._any or not len(pool.query):
            return pool
        bar, bound = self.bar[pool.query], pool.bound
        better, equal = bound > bar, bound == bar
        if equal.any():
            better |= equal & (trie.order(pool.nodes) < self.order[pool.query])
        return pool.where(better)
