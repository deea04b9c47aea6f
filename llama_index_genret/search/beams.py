"""The prefixes and identifiers that a search holds, of all queries at once.

Knows the trie and numbers; nothing of where scores come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.search.protocol import Float64, Int64
from llama_index_genret.trie import LiveTrie, Nodes, TriePrior

SCORE, BOUND = 0, 1
"""Columns of a discount, as `TriePrior` has them: of the sum of the priors, and of the least."""


@dataclass(frozen=True)
class Beams:
    """Prefixes of all queries, parallel arrays of length n.

    discount: (n, 2) what the prior takes off `log_prob`, columns `SCORE` and `BOUND`; None where there is no prior, and
        `score` and `bound` are `log_prob`.
    """

    query: Int64
    log_prob: Float64
    nodes: Nodes
    prefixes: NDArray[np.int32]
    discount: Float64 | None = None

    @property
    def score(self) -> Float64:
        """What a beam keeps the best of; of a finished identifier what it is ranked by."""
        return self.log_prob if self.discount is None else self.log_prob - self.discount[:, SCORE]

    @property
    def bound(self) -> Float64:
        """No identifier below has a better score; of a finished identifier its score."""
        return self.log_prob if self.discount is None else self.log_prob - self.discount[:, BOUND]

    def take(self, rows: Int64) -> Beams:
        """The beams of these rows, in this order."""
        discount = None if self.discount is None else self.discount[rows]
        return Beams(self.query[rows], self.log_prob[rows], self.nodes.take(rows), self.prefixes[rows], discount)

    def where(self, mask: NDArray[np.bool_]) -> Beams:
        """The beams whose mask is set; itself where all are."""
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
        """Sorted by query, the best first, ties in the order of their tokens. by: (n,) their scores or bounds."""
        rows = np.lexsort((-by, self.query))
        best = self.take(rows)
        by = best.log_prob if by is self.log_prob else by[rows]
        ties = (by[1:] == by[:-1]) & (best.query[1:] == best.query[:-1])
        return best.take(np.lexsort((trie.order(best.nodes), -by, best.query))) if ties.any() else best

    def place(self) -> Int64:
        """Where each stands within its query, of sorted ones."""
        return np.arange(len(self.query)) - np.searchsorted(self.query, self.query, side="left")


@dataclass(frozen=True)
class Discount:
    """What a prior takes off the log-probabilities of prefixes: `eta` times its logarithm."""

    prior: TriePrior
    eta: float

    def of(self, nodes: Nodes) -> Float64:
        """(n, 2), columns SCORE: of all images below together, and BOUND: of the one with the least prior."""
        return self.eta * self.prior.of(nodes)


def roots(trie: LiveTrie, n: int, discount: Discount | None) -> Beams:
    """One empty prefix for each of n queries."""
    nodes, none = trie.roots(n), np.full((n, trie.depth), -1, np.int32)
    return Beams(np.arange(n), np.zeros(n), nodes, none, discount.of(nodes) if discount else None)


class Dropped:
    """The best that each query's search dropped: its bound and its order."""

    def __init__(self, n_queries: int) -> None:
        self.bound, self.order = np.full(n_queries, -np.inf), np.zeros(n_queries, np.int64)
        self.any = np.zeros(n_queries, np.bool_)

    def note(self, trie: LiveTrie, beams: Beams) -> None:
        """Take account of some, at most one a query where there is no prior."""
        if beams.discount is not None:
            beams = beams.ranked(trie, beams.bound)
            beams = beams.where(beams.place() == 0)
        query, bound, order = beams.query, beams.bound, trie.order(beams.nodes)
        better = ~self.any[query] | (bound > self.bound[query])
        better |= (bound == self.bound[query]) & (order < self.order[query])
        query = query[better]
        self.bound[query], self.order[query], self.any[query] = bound[better], order[better], True

    def note_bounds(self, query: Int64, bound: Float64) -> None:
        """Take account of some whose order is not looked at: who ties with them is not certain."""
        highest, met = np.full_like(self.bound, -np.inf), np.zeros_like(self.any)
        np.maximum.at(highest, query, bound)
        met[query] = True
        better = met & (~self.any | (highest >= self.bound))
        self.bound[better], self.order[better], self.any[better] = highest[better], -1, True


def cut(trie: LiveTrie, pool: Beams, width: int, spent: NDArray[np.bool_], dropped: Dropped) -> Beams:
    """The best `width` of each query that has spent its expansions, and all of the others."""
    place = pool.place()
    beyond = (place >= width) & spent[pool.query]
    if not beyond.any():
        return pool
    best_beyond = beyond & (place == width) if pool.discount is None else beyond
    dropped.note(trie, pool.take(np.flatnonzero(best_beyond)))
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
        both = self.beams + pool.take(np.flatnonzero(ends))
        both = both.ranked(trie, both.score)
        place = both.place()
        self.beams, last = both.where(place < self.k), both.take(np.flatnonzero(place == self.k - 1))
        self.bar[last.query], self.order[last.query] = last.score, trie.order(last.nodes)
        self._any |= bool(len(last.query))
        return pool.take(np.flatnonzero(~ends))

    def unbeaten(self, trie: LiveTrie, pool: Beams) -> Beams:
        """Without the prefixes that k finished identifiers already beat: none below is better than their bounds."""
        if not self._any or not len(pool.query):
            return pool
        bar, bound = self.bar[pool.query], pool.bound
        better, equal = bound > bar, bound == bar
        if equal.any():
            better |= equal & (trie.order(pool.nodes) < self.order[pool.query])
        return pool.where(better)
