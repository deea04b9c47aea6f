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

import math
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import NamedTuple, Protocol, overload

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


class Rows(Sequence[Row]):
    """The n rows of one step over all queries: a sequence of `Row`, and the same as arrays.

    query: (n,) int64, ascending. prefixes: (n, depth) int32, -1 after the end.
    offsets: (n + 1,) int64, the tokens of row i are token_ids[offsets[i] : offsets[i + 1]].
    """

    def __init__(self, query: Int64, prefixes: NDArray[np.int32], tokens: Tokens) -> None:
        self.query, self.prefixes, self.offsets = query, prefixes, tokens.offsets
        self._tokens = tokens

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Rows:
        """The arrays of some rows: for asking a scorer by hand."""
        prefixes = np.full((len(rows), max((len(row.prefix) for row in rows), default=0) + 1), -1, np.int32)
        for i, row in enumerate(rows):
            prefixes[i, : len(row.prefix)] = row.prefix
        token_ids = np.concatenate([row.token_ids for row in rows]) if rows else np.zeros(0, np.int64)
        offsets = np.cumsum([0, *(len(row.token_ids) for row in rows)])
        return cls(np.array([row.query for row in rows], np.int64), prefixes, _Tokens(token_ids, offsets))

    @property
    def token_ids(self) -> Int64:
        """(m,) int64, the tokens to score, of all rows, one row after another."""
        return self._tokens.token_ids

    @property
    def alphabet(self) -> NDArray[np.integer]:
        """(a,) ascending: holds all `token_ids`, and few others."""
        return self._tokens.alphabet

    def gather(self, block: NDArray[np.floating]) -> NDArray[np.floating]:
        """(m,) scores out of a `block` (n, a) that has a column for each token of `alphabet`."""
        return self._tokens.gather(block)

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


class Tokens(Protocol):
    """Ragged token ids; an `Expansion` computes them when they are asked for."""

    @property
    def offsets(self) -> Int64: ...
    @property
    def token_ids(self) -> Int64: ...
    @property
    def alphabet(self) -> NDArray[np.integer]: ...
    def gather(self, block: NDArray[np.floating]) -> NDArray[np.floating]: ...


@dataclass(frozen=True)
class _Tokens:
    token_ids: Int64
    offsets: Int64

    @property
    def alphabet(self) -> Int64:
        return np.unique(self.token_ids)

    def gather(self, block: NDArray[np.floating]) -> NDArray[np.floating]:
        rows = np.repeat(np.arange(len(block)), np.diff(self.offsets))
        return np.asarray(block[rows, np.searchsorted(self.alphabet, self.token_ids)])


class Hit(NamedTuple):
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
        return max(math.exp(min(self.log_prob, 0.0)), sys.float_info.min)


@dataclass(frozen=True)
class Ranking:
    """What a search found for one query, best first; ties in the order of the identifiers' token ids.

    exact: whether these are for certain the best of all identifiers, as scoring every one would rank them.
    nodes_expanded: prefixes whose children were scored.
    """

    hits: tuple[Hit, ...]
    exact: bool
    nodes_expanded: int


Steps = Generator[Rows, NDArray[np.floating], list[Ranking]]


@dataclass(frozen=True)
class _Beams:
    """Prefixes of all queries, parallel arrays of length n."""

    query: Int64
    log_prob: Float64
    nodes: Nodes
    prefixes: NDArray[np.int32]

    def take(self, rows: Int64) -> _Beams:
        return _Beams(self.query[rows], self.log_prob[rows], self.nodes.take(rows), self.prefixes[rows])

    def where(self, mask: NDArray[np.bool_]) -> _Beams:
        return self if mask.all() else self.take(np.flatnonzero(mask))

    def __add__(self, other: _Beams) -> _Beams:
        return _Beams(
            np.concatenate([self.query, other.query]),
            np.concatenate([self.log_prob, other.log_prob]),
            self.nodes + other.nodes,
            np.concatenate([self.prefixes, other.prefixes]),
        )

    def ranked(self, trie: LiveTrie) -> _Beams:
        """Sorted by query, the best first, ties in the order of their tokens."""
        best = self.take(np.lexsort((-self.log_prob, self.query)))
        ties = (best.log_prob[1:] == best.log_prob[:-1]) & (best.query[1:] == best.query[:-1])
        return best.take(np.lexsort((trie.order(best.nodes), -best.log_prob, best.query))) if ties.any() else best

    def place(self) -> Int64:
        """Where each stands within its query, of sorted ones."""
        return np.arange(len(self.query)) - np.searchsorted(self.query, self.query, side="left")


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
    pool, finished = _roots(live, n_queries), _Finished(_roots(live, 0), n_queries, k)
    expanded, dropped = np.zeros(n_queries, np.int64), _Dropped(n_queries)
    while len(pool.query):
        spent = np.zeros(n_queries, np.bool_) if budget is None else expanded >= budget
        pool = finished.unbeaten(live, finished.set_aside(live, _cut(live, pool, width, spent, dropped)))
        chosen, rest = (pool, None) if spent.all() else _chosen(pool, width)
        expansion = live.expand(chosen.nodes)
        if normalise is Normalise.CHILDREN:
            chosen, expansion = _follow_forced_moves(live, chosen, expansion, finished)
        if not len(chosen.query):
            pool = chosen if rest is None else rest
            continue
        scores = _checked((yield Rows(chosen.query, chosen.prefixes, expansion)), expansion)
        constant = _row_constants(scores, expansion.offsets, chosen.log_prob, normalise)
        expanded += np.bincount(chosen.query, minlength=n_queries)
        entries = None if allowed is None else np.flatnonzero(expansion.allowed(allowed))
        first_rows = np.searchsorted(chosen.query, np.arange(n_queries + 1))
        best = _best(scores, constant, expansion.offsets, first_rows, entries, np.where(spent, width + 1, -1))
        children = _children(chosen, expansion, best, scores, constant)
        pool = (children if rest is None else children + rest).ranked(live)
    return _rankings(live, finished, dropped, expanded)


def _width(k: int, width: int | None, budget: int | None) -> int:
    if k < 1 or (width is not None and width < 1) or (budget is not None and budget < 0):
        raise SearchError(f"k={k} and width={width} must be at least 1, budget={budget} at least 0.")
    return max(k, 10 if width is None else width)


def _roots(trie: LiveTrie, n: int) -> _Beams:
    return _Beams(np.arange(n), np.zeros(n), trie.roots(n), np.full((n, trie.depth), -1, np.int32))


class _Dropped:
    """The best prefix that each query's search dropped: its bound and its order."""

    def __init__(self, n_queries: int) -> None:
        self.log_prob, self.order = np.full(n_queries, -np.inf), np.zeros(n_queries, np.int64)
        self.any = np.zeros(n_queries, np.bool_)

    def note(self, trie: LiveTrie, beams: _Beams) -> None:
        """Take account of at most one a query."""
        query, order = beams.query, trie.order(beams.nodes)
        better = ~self.any[query] | (beams.log_prob > self.log_prob[query])
        better |= (beams.log_prob == self.log_prob[query]) & (order < self.order[query])
        query = query[better]
        self.log_prob[query], self.order[query], self.any[query] = beams.log_prob[better], order[better], True


def _cut(trie: LiveTrie, pool: _Beams, width: int, spent: NDArray[np.bool_], dropped: _Dropped) -> _Beams:
    """The best `width` of each query that has spent its budget, and all of the others."""
    place = pool.place()
    beyond = (place >= width) & spent[pool.query]
    if not beyond.any():
        return pool
    dropped.note(trie, pool.take(np.flatnonzero(beyond & (place == width))))
    return pool.take(np.flatnonzero(~beyond))


def _chosen(pool: _Beams, width: int) -> tuple[_Beams, _Beams]:
    """(the best `width` of each query, the rest)."""
    place = pool.place()
    return pool.where(place < width), pool.take(np.flatnonzero(place >= width))


class _Finished:
    """The best k finished identifiers of each query, and the bar that they set for prefixes once they are k."""

    def __init__(self, none: _Beams, n_queries: int, k: int) -> None:
        self.beams, self.k = none, k
        self.bar, self.order = np.full(n_queries, -np.inf), np.full(n_queries, np.iinfo(np.int64).max)
        self._any = False

    def set_aside(self, trie: LiveTrie, pool: _Beams) -> _Beams:
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

    def unbeaten(self, trie: LiveTrie, pool: _Beams) -> _Beams:
        """Without the prefixes that k finished identifiers already beat: a longer one is never more probable."""
        if not self._any or not len(pool.query):
            return pool
        bar = self.bar[pool.query]
        better, equal = pool.log_prob > bar, pool.log_prob == bar
        if equal.any():
            better |= equal & (trie.order(pool.nodes) < self.order[pool.query])
        return pool.where(better)


def _follow_forced_moves(
    trie: LiveTrie, beams: _Beams, expansion: Expansion, finished: _Finished
) -> tuple[_Beams, Expansion]:
    """Walk down while there is one child only, whose probability is 1; identifiers that end so are set aside."""
    while (forced := np.flatnonzero(np.diff(expansion.offsets) == 1)).size:
        entries = expansion.offsets[forced]
        prefixes = beams.prefixes.copy()
        prefixes[forced, (prefixes[forced] >= 0).sum(axis=1)] = expansion.token_ids_at(entries)
        nodes = beams.nodes.put(forced, expansion.take(entries))
        moved = _Beams(beams.query, beams.log_prob, nodes, prefixes)
        beams = finished.unbeaten(trie, finished.set_aside(trie, moved))
        expansion = trie.expand(beams.nodes)
    return beams, expansion


def _checked(scores: NDArray[np.floating], expansion: Expansion) -> NDArray[np.floating]:
    scores = np.asarray(scores)
    if scores.shape != (expansion.offsets[-1],):
        raise SearchError(f"the scorer answered {scores.shape} scores for {expansion.offsets[-1]} tokens.")
    if not scores.max() < np.inf:
        raise SearchError("the scorer answered NaN or +inf: its weights are damaged, or its dtype overflows.")
    return scores


def _row_constants(scores: NDArray[np.floating], offsets: Int64, parent: Float64, normalise: Normalise) -> Float64:
    """(n,) what is to be added to the scores of each row to make them log-probabilities, the prefix's included."""
    if normalise is Normalise.VOCABULARY:
        return parent
    starts, counts = offsets[:-1], np.diff(offsets)
    top = np.maximum.reduceat(scores, starts)
    top[np.isneginf(top)] = 0.0
    shifted = np.repeat(top, counts)
    np.subtract(scores, shifted, out=shifted)
    total = np.add.reduceat(np.exp(shifted, out=shifted), starts, dtype=np.float64)
    return np.asarray(parent - top - np.log(total, where=total > 0, out=np.zeros_like(total)))


def _best(
    scores: NDArray[np.floating],
    constant: Float64,
    offsets: Int64,
    first_rows: Int64,
    entries: Int64 | None,
    wanted: Int64,
) -> Int64:
    """The entries that hold each query's best `wanted`, and a few others; all where `wanted` is negative.

    Each row is cut into pieces. The maxima of a query's pieces are entries of it: the one in place `wanted` among them
    bounds the best from below, and only the entries above the bound are left to sort.

    Args:
        first_rows: (queries + 1,) where the rows of each query begin.
        entries: those to choose from, ascending; None for all.
    """
    if entries is not None:
        scores, offsets = scores[entries], np.searchsorted(entries, offsets)
    if not len(scores) or wanted.max() < 0:
        return np.arange(len(scores)) if entries is None else entries
    counts, n_rows = np.diff(offsets), np.diff(first_rows)
    n_pieces = min(max(8, 4 * int(wanted.max()) // int(n_rows[n_rows > 0].min())), int(counts.max()))
    cuts = offsets[:-1, None] + counts[:, None] * np.arange(n_pieces) // n_pieces
    maxima = (
        np.maximum.reduceat(scores, np.minimum(cuts, len(scores) - 1).ravel()).reshape(cuts.shape) + constant[:, None]
    )
    maxima[np.diff(cuts, axis=1, append=offsets[1:, None]) == 0] = -np.inf
    table = np.full((len(n_rows), max(int(n_rows.max()) * n_pieces, int(wanted.max()))), -np.inf)
    query = np.repeat(np.arange(len(n_rows)), n_rows)
    column = (np.arange(len(query)) - first_rows[query])[:, None] * n_pieces + np.arange(n_pieces)
    table[query[:, None], column] = maxima
    table.sort(axis=1)
    bound = np.where(wanted > 0, table[np.arange(len(n_rows)), -np.maximum(wanted, 1)], -np.inf)
    limit, some = np.full(len(query), -np.inf), bound[query] > -np.inf
    limit[some] = bound[query][some] - constant[some]
    limit[some] -= 1e-5 * np.clip(np.abs(limit[some]), 1.0, 1e30)  # sums are rounded: rather keep one too many
    kept = np.flatnonzero(scores >= np.repeat(limit.astype(scores.dtype), counts))
    return kept if entries is None else entries[kept]


def _children(
    parents: _Beams, expansion: Expansion, entries: Int64, scores: NDArray[np.floating], constant: Float64
) -> _Beams:
    row = np.searchsorted(expansion.offsets, entries, side="right") - 1
    prefixes = parents.prefixes[row]
    prefixes[np.arange(len(row)), (prefixes >= 0).sum(axis=1)] = expansion.token_ids_at(entries)
    log_prob = scores[entries].astype(np.float64) + constant[row]
    return _Beams(parents.query[row], log_prob, expansion.take(entries), prefixes)


def _rankings(trie: LiveTrie, finished: _Finished, dropped: _Dropped, expanded: Int64) -> list[Ranking]:
    beams, n_queries = finished.beams, len(expanded)
    leaves = trie.leaf(beams.nodes)
    prefixes = list(map(tuple, beams.prefixes.tolist()))
    if (beams.prefixes < 0).any():
        prefixes = [tuple(token for token in prefix if token >= 0) for prefix in prefixes]
    log_probs = np.minimum(beams.log_prob, 0.0)
    hits = list(map(Hit, leaves.tolist(), trie.key(leaves).tolist(), prefixes, log_probs.tolist()))
    bounds = np.searchsorted(beams.query, np.arange(n_queries + 1))
    certain = finished.bar > dropped.log_prob
    certain |= (finished.bar == dropped.log_prob) & (finished.order < dropped.order)
    exact = ~dropped.any | certain
    places = pairwise(bounds.tolist())
    return [
        Ranking(tuple(hits[lo:hi]), is_exact, n_expanded)
        for (lo, hi), is_exact, n_expanded in zip(places, exact.tolist(), expanded.tolist(), strict=True)
    ]
