"""Search for the most probable identifiers of a trie, for many queries at once: beam search, or exact.

Knows the trie and numbers; nothing of text, models or servers. A search is a pure generator: it yields the rows that
must be scored and receives their scores, so that sync and async drivers share one logic (`scorers.base` has both).
The slow twin is `_reference.rank_all`; the tests hold the two equal.

A prefix's probability bounds those of all its identifiers. So expanding the most probable prefixes first, until k
identifiers beat every prefix that is left, finds the k most probable ones for certain (best-first search with an
admissible bound, A* without a heuristic). A beam is the same search that keeps the best `width` prefixes only; what
it dropped tells whether its result is certain all the same.

Source: constrained beam search of GENRE (arXiv:2010.00904) and GRACE (arXiv:2402.10805).
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import SearchError
from llama_index_genret.trie import Expansion, LeafFilter, LiveTrie, Nodes, Trie

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


class Normalise(str, Enum):
    """Over which tokens a step's probabilities sum to one.

    CHILDREN: over the valid next tokens of the trie. `p` is then a distribution over the images of the
        index, steps with one choice cost nothing, and a scorer needs only the children's logits.
    VOCABULARY: over the whole vocabulary, which is what the beams of Hugging Face and vLLM compare;
        `p` also carries how sure the model is that an identifier comes at all.
    """

    CHILDREN = "children"
    VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class Row:
    """One unfinished identifier whose next token is to be scored.

    query: position of its prompt among the prompts of the session.
    prefix: the identifier's tokens so far, which follow the prompt.
    token_ids: (m,) int64, the tokens to score: the children of the prefix in the trie.
    """

    query: int
    prefix: tuple[int, ...]
    token_ids: Int64


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
    """The n rows of one step over all queries: a sequence of `Row`, and the same as arrays.

    query: (n,) int64, ascending. prefixes: (n, depth) int32, -1 after the end. token_ids: (m,) int64, of all rows,
    one after another; those of row i are the entries offsets[i] .. offsets[i + 1].
    """

    query: Int64
    prefixes: NDArray[np.int32]
    token_ids: Int64
    offsets: Int64

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Rows:
        """The arrays of some rows: for asking a scorer by hand."""
        prefixes = np.full((len(rows), max((len(row.prefix) for row in rows), default=0) + 1), -1, np.int32)
        for i, row in enumerate(rows):
            prefixes[i, : len(row.prefix)] = row.prefix
        token_ids = np.concatenate([row.token_ids for row in rows]) if rows else np.zeros(0, np.int64)
        offsets = np.cumsum([0, *(len(row.token_ids) for row in rows)])
        return cls(np.array([row.query for row in rows], np.int64), prefixes, token_ids, offsets)

    def split(self, scores: Float64) -> list[Float64]:
        """The scores of each row."""
        return np.split(scores, self.offsets[1:-1])

    def __len__(self) -> int:
        return len(self.query)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[place] for place in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        prefix = tuple(token for token in self.prefixes[i].tolist() if token >= 0)
        return Row(int(self.query[i]), prefix, self.token_ids[self.offsets[i] : self.offsets[i + 1]])


@dataclass(frozen=True)
class Hit:
    """One image found. `leaf` is its leaf number in the trie that was searched, `key` what the leaf stands for.

    log_prob: natural logarithm, <= 0, under the search's `Normalise`.
    """

    leaf: int
    key: int
    token_ids: tuple[int, ...]
    log_prob: float

    @property
    def score(self) -> float:
        """The probability, in (0, 1]. One too small for a float is given as the smallest normal float."""
        return max(float(np.exp(min(self.log_prob, 0.0))), sys.float_info.min)


@dataclass(frozen=True)
class Ranking:
    """What a search found for one query, best first; ties in the order of the identifiers' token ids.

    exact: whether these are for certain the best of all identifiers, as scoring every one would rank them.
    nodes_expanded: prefixes whose children were scored.
    """

    hits: tuple[Hit, ...]
    exact: bool
    nodes_expanded: int


Steps = Generator[Rows, Float64, list[Ranking]]


@dataclass(frozen=True)
class _Beams:
    """Prefixes of all queries, parallel arrays of length n. order: ascends like the token ids."""

    query: Int64
    log_prob: Float64
    order: Int64
    nodes: Nodes
    prefixes: NDArray[np.int32]

    def take(self, rows: Int64) -> _Beams:
        return _Beams(
            self.query[rows], self.log_prob[rows], self.order[rows], self.nodes.take(rows), self.prefixes[rows]
        )

    def __add__(self, other: _Beams) -> _Beams:
        return _Beams(
            np.concatenate([self.query, other.query]),
            np.concatenate([self.log_prob, other.log_prob]),
            np.concatenate([self.order, other.order]),
            self.nodes + other.nodes,
            np.concatenate([self.prefixes, other.prefixes]),
        )

    def ranked(self) -> tuple[_Beams, Int64]:
        """Sorted by query, the best first; and the place of each within its query."""
        best = self.take(np.lexsort((self.order, -self.log_prob, self.query)))
        return best, np.arange(len(best.query)) - np.searchsorted(best.query, best.query, side="left")


def search(
    trie: Trie | LiveTrie,
    *,
    n_queries: int,
    k: int,
    width: int | None = None,
    normalise: Normalise = Normalise.CHILDREN,
    allowed: LeafFilter | None = None,
    budget: int | None = 0,
) -> Steps:
    """Rank the identifiers of `trie` for `n_queries` prompts.

    Yields the rows of one step over all queries (none is ever a finished identifier). Expects (m,) float64 scores of
    their `token_ids`: natural-log probabilities over the vocabulary if `normalise` is VOCABULARY; else anything that
    differs from them by a constant per row, such as raw logits.

    Args:
        k: results wanted for each query; fewer come back only where fewer identifiers are allowed.
        width: prefixes that are expanded together for each query; never less than `k`, 10 if not given.
        allowed: leaves that may be returned. It prunes, and leaves the scores of the others unchanged.
        budget: for each query, prefixes to expand before all but the best `width` are dropped. 0: a beam search.
            None: never, the result is exact.
    Returns:
        One ranking for each query.
    Raises:
        SearchError: k < 1, width < 1, budget < 0, or a score that is not a number.
        FilterError: `allowed` was made for another trie.
    """
    width = _width(k, width, budget)
    live = trie if isinstance(trie, LiveTrie) else LiveTrie(trie)
    allowed = None if allowed is None else live.restrict(allowed)
    if (live.n_live if allowed is None else allowed.n_allowed) == 0:
        return [Ranking((), exact=True, nodes_expanded=0)] * n_queries
    pool, finished = _roots(live, n_queries), _roots(live, 0)
    expanded, dropped = np.zeros(n_queries, np.int64), _Dropped.none(n_queries)
    while True:
        spent = np.zeros(n_queries, np.bool_) if budget is None else expanded >= budget
        pool, place = pool.ranked()
        dropped.note(pool, np.flatnonzero((place == width) & spent[pool.query]))
        pool = pool.take(np.flatnonzero((place < width) | ~spent[pool.query]))
        pool, finished = _set_finished_aside(live, pool, finished, k)
        pool, place = _drop_beaten(pool, finished, k, n_queries).ranked()
        chosen, rest = pool.take(np.flatnonzero(place < width)), pool.take(np.flatnonzero(place >= width))
        if not len(chosen.query):
            break
        expansion = live.expand(chosen.nodes)
        if normalise is Normalise.CHILDREN and (forced := np.flatnonzero(np.diff(expansion.offsets) == 1)).size:
            pool = _follow(chosen, forced, expansion) + rest
            continue
        rows = Rows(chosen.query, chosen.prefixes, expansion.token_ids, expansion.offsets)
        log_probs = _child_log_probs((yield rows), expansion, chosen.log_prob, normalise)
        expanded += np.bincount(chosen.query, minlength=n_queries)
        entries = None if allowed is None else np.flatnonzero(expansion.allowed(allowed))
        starts = expansion.offsets[np.searchsorted(chosen.query, np.arange(n_queries + 1))]
        best = _best(log_probs, entries, starts, np.where(spent, width + 1, -1))
        pool = _children(live, chosen, expansion, best, log_probs) + rest
    return _rankings(live, finished, dropped, expanded, k)


def _width(k: int, width: int | None, budget: int | None) -> int:
    if k < 1 or (width is not None and width < 1) or (budget is not None and budget < 0):
        raise SearchError(f"k={k} and width={width} must be at least 1, budget={budget} at least 0.")
    return max(k, 10 if width is None else width)


def _roots(trie: LiveTrie, n: int) -> _Beams:
    prefixes = np.full((n, trie.depth), -1, np.int32)
    return _Beams(np.arange(n), np.zeros(n), np.zeros(n, np.int64), trie.roots(n), prefixes)


@dataclass(frozen=True)
class _Dropped:
    """The best prefix that each query's search dropped: its bound and its order."""

    log_prob: Float64
    order: Int64
    any: NDArray[np.bool_]

    @classmethod
    def none(cls, n_queries: int) -> _Dropped:
        return cls(np.full(n_queries, -np.inf), np.zeros(n_queries, np.int64), np.zeros(n_queries, np.bool_))

    def note(self, pool: _Beams, rows: Int64) -> None:
        """Take account of `rows`, at most one a query."""
        query, log_prob, order = pool.query[rows], pool.log_prob[rows], pool.order[rows]
        better = ~self.any[query] | (log_prob > self.log_prob[query])
        better |= (log_prob == self.log_prob[query]) & (order < self.order[query])
        query = query[better]
        self.log_prob[query], self.order[query], self.any[query] = log_prob[better], order[better], True


def _set_finished_aside(trie: LiveTrie, pool: _Beams, finished: _Beams, k: int) -> tuple[_Beams, _Beams]:
    """(the prefixes, the best k finished identifiers of each query)."""
    ends = trie.is_leaf(pool.nodes)
    if not ends.any():
        return pool, finished
    finished, place = (finished + pool.take(np.flatnonzero(ends))).ranked()
    return pool.take(np.flatnonzero(~ends)), finished.take(np.flatnonzero(place < k))


def _drop_beaten(pool: _Beams, finished: _Beams, k: int, n_queries: int) -> _Beams:
    """Drop prefixes that k finished identifiers already beat: a longer one is never more probable."""
    _, place = finished.ranked()
    last = np.flatnonzero(place == k - 1)
    if not last.size:
        return pool
    bar, order = np.full(n_queries, -np.inf), np.full(n_queries, np.iinfo(np.int64).max)
    bar[finished.query[last]], order[finished.query[last]] = finished.log_prob[last], finished.order[last]
    bar, order = bar[pool.query], order[pool.query]
    return pool.take(np.flatnonzero((pool.log_prob > bar) | ((pool.log_prob == bar) & (pool.order < order))))


def _follow(beams: _Beams, forced: Int64, expansion: Expansion) -> _Beams:
    """Walk down to the only child of some: its probability is 1."""
    entries = expansion.offsets[forced]
    prefixes = beams.prefixes.copy()
    prefixes[forced, (prefixes[forced] >= 0).sum(axis=1)] = expansion.token_ids[entries]
    nodes = beams.nodes.put(forced, expansion.take(entries))
    return _Beams(beams.query, beams.log_prob, beams.order, nodes, prefixes)


def _child_log_probs(scores: Float64, expansion: Expansion, parent: Float64, normalise: Normalise) -> Float64:
    """(m,) log-probabilities of all children, normalised as asked, their prefixes' included."""
    scores = np.asarray(scores, np.float64)
    if scores.shape != expansion.token_ids.shape:
        raise SearchError(f"the scorer answered {scores.shape} scores for {expansion.token_ids.shape} tokens.")
    if not scores.max() < np.inf:
        raise SearchError("the scorer answered NaN or +inf: its weights are damaged, or its dtype overflows.")
    starts, counts = expansion.offsets[:-1], np.diff(expansion.offsets)
    if normalise is Normalise.VOCABULARY:
        return np.asarray(scores + np.repeat(parent, counts))
    top = np.maximum.reduceat(scores, starts)
    top[np.isneginf(top)] = 0.0
    log_probs = scores - np.repeat(top, counts)
    total = np.add.reduceat(np.exp(log_probs), starts)
    log_probs += np.repeat(parent - np.log(total, where=total > 0, out=np.zeros_like(total)), counts)
    return log_probs


def _best(log_probs: Float64, entries: Int64 | None, starts: Int64, wanted: Int64) -> Int64:
    """The entries that hold each query's best `wanted`, and few others; all where `wanted` is negative.

    The maxima of more than `wanted` chunks of a query are its entries too: the one in place `wanted` among them bounds
    the best from below, and a few entries are left to sort.

    Args:
        entries: those to choose from, ascending; None for all.
        starts: (queries + 1,) where each query's entries begin among all.
    """
    if entries is not None:
        log_probs, starts = log_probs[entries], np.searchsorted(entries, starts)
    if len(log_probs) and wanted.max() >= 0:
        sizes = np.diff(starts)
        step = np.where(wanted >= 0, np.maximum(1, -(-sizes // (4 * np.maximum(wanted, 1)))), np.maximum(sizes, 1))
        chunks = -(-sizes // step)
        query = np.repeat(np.arange(len(sizes)), chunks)
        place = np.arange(len(query)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        maxima = np.full((len(sizes), chunks.max()), -np.inf)
        maxima[query, place] = np.maximum.reduceat(log_probs, starts[query] + step[query] * place)
        maxima.sort(axis=1)
        bound = np.full(len(sizes), -np.inf)
        some = np.flatnonzero((wanted > 0) & (chunks >= wanted))
        bound[some] = maxima[some, maxima.shape[1] - wanted[some]]
        kept = np.flatnonzero(log_probs >= np.repeat(bound, sizes))
    else:
        kept = np.arange(len(log_probs))
    return kept if entries is None else entries[kept]


def _children(trie: LiveTrie, parents: _Beams, expansion: Expansion, entries: Int64, log_probs: Float64) -> _Beams:
    row = np.searchsorted(expansion.offsets, entries, side="right") - 1
    nodes, prefixes = expansion.take(entries), parents.prefixes[row]
    prefixes[np.arange(len(row)), (prefixes >= 0).sum(axis=1)] = expansion.token_ids[entries]
    return _Beams(parents.query[row], log_probs[entries], trie.order(nodes), nodes, prefixes)


def _rankings(trie: LiveTrie, finished: _Beams, dropped: _Dropped, expanded: Int64, k: int) -> list[Ranking]:
    finished, _ = finished.ranked()
    leaves = trie.leaf(finished.nodes)
    hits = [
        Hit(leaf, key, tuple(token for token in prefix if token >= 0), min(log_prob, 0.0))
        for leaf, key, prefix, log_prob in zip(
            leaves.tolist(),
            trie.key(leaves).tolist(),
            finished.prefixes.tolist(),
            finished.log_prob.tolist(),
            strict=True,
        )
    ]
    bounds = np.searchsorted(finished.query, np.arange(len(expanded) + 1)).tolist()
    rankings = []
    for query, (lo, hi) in enumerate(pairwise(bounds)):
        exact = not dropped.any[query]
        if not exact and hi - lo == k:
            last, bound = finished.log_prob[hi - 1], dropped.log_prob[query]
            exact = last > bound or (last == bound and finished.order[hi - 1] < dropped.order[query])
        rankings.append(Ranking(tuple(hits[lo:hi]), bool(exact), int(expanded[query])))
    return rankings
