"""Constrained beam search over the identifiers of a trie, for many queries at once.

Knows the trie and numbers; nothing of text, models or servers. A search is a pure generator: it yields
the rows that must be scored and receives their scores, so that sync and async drivers share one logic
(`scorers.base` has both). The slow twin is `_reference.rank_all`; the tests hold the two equal.

Source: constrained beam search of GENRE (arXiv:2010.00904) and GRACE (arXiv:2402.10805).
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import FilterError, SearchError
from llama_index_genret.trie import LeafFilter, Trie


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
    token_ids: NDArray[np.int64]


@dataclass(frozen=True)
class Hit:
    """One image found. `leaf` is the rank of its identifier in the trie.

    log_prob: natural logarithm, <= 0, under the search's `Normalise`.
    """

    leaf: int
    token_ids: tuple[int, ...]
    log_prob: float

    @property
    def score(self) -> float:
        """The probability, in (0, 1]. One too small for a float is given as the smallest normal float."""
        return max(float(np.exp(min(self.log_prob, 0.0))), sys.float_info.min)


Steps = Generator[list[Row], Sequence[NDArray[np.float64]], list[list[Hit]]]


@dataclass(frozen=True)
class _Beams:
    """All beams of all queries, parallel arrays of length n."""

    query: NDArray[np.int64]
    node: NDArray[np.int64]
    log_prob: NDArray[np.float64]
    prefix: list[tuple[int, ...]]

    def take(self, rows: NDArray[np.int64]) -> _Beams:
        prefix = [self.prefix[row] for row in rows.tolist()]
        return _Beams(self.query[rows], self.node[rows], self.log_prob[rows], prefix)


def beam_search(
    trie: Trie,
    *,
    n_queries: int,
    k: int,
    width: int | None = None,
    normalise: Normalise = Normalise.CHILDREN,
    allowed: LeafFilter | None = None,
) -> Steps:
    """Rank the identifiers of `trie` for `n_queries` prompts.

    Yields the rows of one step over all queries (none is ever a finished identifier). Expects, for each row,
    (m,) float64 scores of its `token_ids`: natural-log probabilities over the vocabulary if `normalise` is
    VOCABULARY; else anything that differs from them by a constant per row, such as raw logits.

    Args:
        k: results wanted for each query; fewer come back only where fewer identifiers are allowed.
        width: beams kept for each query after each step; never less than `k`, 10 if not given.
        allowed: leaves that may be returned. It prunes, and leaves the scores of the others unchanged.
    Returns:
        For each query its hits, best first; ties in the order of the identifiers' token ids.
    Raises:
        SearchError: k < 1, width < 1, or a score that is not a number.
        FilterError: `allowed` was made for a trie of another size.
    """
    width = _check(trie, k, width, allowed)
    if allowed is not None and allowed.n_allowed == 0:
        return [[] for _ in range(n_queries)]
    finished = _Beams(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), [])
    beams = _Beams(np.arange(n_queries), np.zeros(n_queries, np.int64), np.zeros(n_queries), [()] * n_queries)
    while True:
        if normalise is Normalise.CHILDREN:
            beams = _follow_forced_moves(trie, beams)
        finished, beams = _select(trie, finished, beams, width)
        beams = _drop_hopeless(finished, beams, k, n_queries)
        if len(beams.node) == 0:
            break
        children = trie.children(beams.node)
        rows = [
            Row(query, prefix, children.token_ids[lo:hi])
            for query, prefix, lo, hi in zip(
                beams.query.tolist(), beams.prefix, children.offsets[:-1], children.offsets[1:], strict=True
            )
        ]
        steps = _as_steps((yield rows), rows, children.offsets, normalise)
        kept = np.arange(len(steps))
        if allowed is not None:
            kept = kept[allowed.count(*trie.leaf_range(children.node)) > 0]
        parent = children.row[kept]
        prefix = [
            (*beams.prefix[row], token)
            for row, token in zip(parent.tolist(), children.token_ids[kept].tolist(), strict=True)
        ]
        beams = _Beams(beams.query[parent], children.node[kept], beams.log_prob[parent] + steps[kept], prefix)
    return _hits(trie, finished, k, n_queries)


def _check(trie: Trie, k: int, width: int | None, allowed: LeafFilter | None) -> int:
    if k < 1 or (width is not None and width < 1):
        raise SearchError(f"k={k} and width={width} must be at least 1.")
    if allowed is not None and allowed.n_leaves != trie.n_leaves:
        raise FilterError(f"the filter knows {allowed.n_leaves} identifiers, the trie {trie.n_leaves}: build it anew.")
    return max(k, 10 if width is None else width)


def _as_steps(
    scores: Sequence[NDArray[np.float64]], rows: list[Row], offsets: NDArray[np.int64], normalise: Normalise
) -> NDArray[np.float64]:
    """The log-probabilities of all children of all rows, flat, normalised as asked."""
    if len(scores) != len(rows) or any(len(s) != len(r.token_ids) for s, r in zip(scores, rows, strict=True)):
        raise SearchError(f"the scorer answered {len(scores)} rows for {len(rows)}, or rows of another length.")
    flat = np.concatenate(scores).astype(np.float64)
    if np.isnan(flat).any() or np.isposinf(flat).any():
        raise SearchError("the scorer answered NaN or +inf: its weights are damaged, or its dtype overflows.")
    if normalise is Normalise.VOCABULARY:
        return flat
    starts = offsets[:-1]
    counts = np.diff(offsets)
    top = np.repeat(np.maximum.reduceat(flat, starts), counts)
    top = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        log_sum = np.log(np.add.reduceat(np.exp(flat - top), starts))
    return np.asarray(flat - top - np.repeat(log_sum, counts), np.float64)


def _follow_forced_moves(trie: Trie, beams: _Beams) -> _Beams:
    """Walk down from every beam while its node has one child: that child's probability is 1."""
    node, prefix = beams.node.copy(), list(beams.prefix)
    open_rows = np.flatnonzero(~trie.is_leaf(node))
    while len(open_rows):
        children = trie.children(node[open_rows])
        single = np.diff(children.offsets) == 1
        open_rows, first = open_rows[single], children.offsets[:-1][single]
        node[open_rows] = children.node[first]
        for row, token in zip(open_rows.tolist(), children.token_ids[first].tolist(), strict=True):
            prefix[row] = (*prefix[row], token)
        open_rows = open_rows[~trie.is_leaf(node[open_rows])]
    return _Beams(beams.query, node, beams.log_prob, prefix)


def _concat(first: _Beams, second: _Beams) -> _Beams:
    return _Beams(
        np.concatenate([first.query, second.query]),
        np.concatenate([first.node, second.node]),
        np.concatenate([first.log_prob, second.log_prob]),
        first.prefix + second.prefix,
    )


def _select(trie: Trie, finished: _Beams, beams: _Beams, width: int) -> tuple[_Beams, _Beams]:
    """Keep the best `width` of each query, finished or not, best first; split them into the two kinds.

    A finished identifier that `width` prefixes beat is dropped: each of those holds at least one image.
    """
    pool = _concat(finished, beams)
    first_leaf, _ = trie.leaf_range(pool.node)
    pool = pool.take(np.lexsort((first_leaf, -pool.log_prob, pool.query)))
    place = np.arange(len(pool.query)) - np.searchsorted(pool.query, pool.query, side="left")
    pool = pool.take(np.flatnonzero(place < width))
    done = trie.is_leaf(pool.node)
    return pool.take(np.flatnonzero(done)), pool.take(np.flatnonzero(~done))


def _drop_hopeless(finished: _Beams, beams: _Beams, k: int, n_queries: int) -> _Beams:
    """Drop prefixes that k finished identifiers already beat: a longer one is never more probable."""
    place = np.arange(len(finished.query)) - np.searchsorted(finished.query, finished.query, side="left")
    bar = np.full(n_queries, -np.inf)
    kth = place == k - 1
    bar[finished.query[kth]] = finished.log_prob[kth]
    beatable = (beams.log_prob >= bar[beams.query]) | np.isneginf(bar[beams.query])
    return beams.take(np.flatnonzero(beatable))


def _hits(trie: Trie, finished: _Beams, k: int, n_queries: int) -> list[list[Hit]]:
    hits: list[list[Hit]] = [[] for _ in range(n_queries)]
    leaves = trie.leaf_rank(finished.node)
    for query, leaf, log_prob, prefix in zip(
        finished.query.tolist(), leaves.tolist(), finished.log_prob.tolist(), finished.prefix, strict=True
    ):
        if len(hits[query]) < k:
            hits[query].append(Hit(leaf, prefix, min(log_prob, 0.0)))
    return hits
