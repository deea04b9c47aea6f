"""Search for the most probable identifiers of a trie, for many queries at once: beam search, or exact.

Knows the trie and numbers; nothing of text, models or servers. A search is a pure generator: it yields the rows that
must be scored and receives their scores, so that sync and async drivers share one logic (`scorers.base` has both).
The slow twin is `search._reference.rank_all`; the tests hold the two equal.

A prefix's probability bounds those of all its identifiers. So expanding the most probable prefixes first, until k
identifiers beat every prefix that is left, finds the k most probable ones for certain (best-first search with an
admissible bound, A* without a heuristic). A beam is the same search that keeps the best `width` prefixes only; what
it dropped tells whether its result is certain all the same.

With a prior, an identifier is ranked by log p - eta * log prior, a beam by the same of its prefixes, the prior of a
prefix being the sum of those below; and log p - eta * log(the least prior below) bounds the identifiers of a prefix.

Source: constrained beam search of GENRE (arXiv:2010.00904) and GRACE (arXiv:2402.10805). The score
less the prior: generative retrieval by an image-generating model without training (TIGeR, arXiv:2406.05814).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import SearchError
from llama_index_genret.search.beams import (
    BOUND,
    SCORE,
    Beams,
    Discount,
    Dropped,
    Finished,
    best_of_each,
    cut,
    roots,
)
from llama_index_genret.search.protocol import Float64, Hit, Int64, Normalise, Ranking, Rows, Steps
from llama_index_genret.search.scores import best, checked, row_constants
from llama_index_genret.trie import Expansion, LeafFilter, LiveTrie, Trie, TriePrior


def search(
    trie: Trie | LiveTrie,
    *,
    n_queries: int,
    k: int,
    width: int | None = None,
    normalise: Normalise = Normalise.CHILDREN,
    allowed: LeafFilter | None = None,
    budget: int | None = 0,
    prior: TriePrior | None = None,
    eta: float = 0.0,
) -> Steps:
    """Rank the identifiers of `trie` for `n_queries` prompts.

    Yields the rows of one step over all queries (none is ever a finished identifier). Expects (m,) float scores of
    their `token_ids`: natural-log probabilities over the vocabulary if `normalise` is VOCABULARY; else anything that
    differs from them by a constant per row, such as raw logits.

    Args:
        k: results wanted for each query; fewer come back only where fewer identifiers are allowed.
        width: prefixes that are expanded together for each query; never less than `k`, 10 if not given.
        allowed: leaves that may be returned. It prunes, and leaves the scores of the others unchanged.
        budget: for each query, prefixes to expand before all but the best `width` are dropped. 0: a beam search.
            None: never, the result is exact.
        prior: of `trie`. eta: how much of its logarithm is taken off, 0 for nothing.
    Returns:
        One ranking for each query.
    Raises:
        SearchError: k < 1, width < 1, budget < 0, eta < 0 or without a prior, or a score that is not a number.
        FilterError: `allowed` was made for another trie.
    """
    width, discount = _width(k, width, budget), _discount(prior, eta)
    live = trie if isinstance(trie, LiveTrie) else LiveTrie(trie)
    allowed = None if allowed is None else live.restrict(allowed)
    most = live.n_live if allowed is None else allowed.n_allowed
    if most == 0:
        return [Ranking((), exact=True, nodes_expanded=0)] * n_queries
    k, width = min(k, most), min(width, most)  # there are no more to find, and no more prefixes of them
    pool, finished = roots(live, n_queries, discount), Finished(roots(live, 0, discount), n_queries, k)
    expanded, dropped = np.zeros(n_queries, np.int64), Dropped(n_queries)
    while len(pool.query):
        spent = np.zeros(n_queries, np.bool_) if budget is None else expanded >= budget
        if discount:  # a beam is ordered by its scores, an exact search by its bounds
            pool = pool.ranked(live, np.where(spent[pool.query], pool.score, pool.bound))
        pool = finished.unbeaten(live, finished.set_aside(live, cut(live, pool, width, spent, dropped)))
        chosen, rest = (pool, None) if spent.all() else best_of_each(pool, width)
        expansion = live.expand(chosen.nodes)
        if normalise is Normalise.CHILDREN:
            chosen, expansion = _follow_forced_moves(live, chosen, expansion, finished)
        if not len(chosen.query):
            pool = chosen if rest is None else rest
            continue
        scores = checked((yield Rows(chosen.query, chosen.prefixes, expansion)), expansion.offsets)
        constant = row_constants(scores, expansion.offsets, chosen.log_prob, normalise)
        expanded += np.bincount(chosen.query, minlength=n_queries)
        entries = None if allowed is None else np.flatnonzero(expansion.allowed(allowed))
        wanted = np.where(spent, width + 1, -1)
        if discount:
            children = _discounted_children(chosen, expansion, entries, scores, constant, wanted, discount, dropped)
            pool = children if rest is None else children + rest
            continue
        first_rows = np.searchsorted(chosen.query, np.arange(n_queries + 1))
        entries = best(scores, constant, expansion.offsets, first_rows, entries, wanted)
        children = _children(chosen, expansion, entries, scores, constant)
        pool = children if rest is None else children + rest
        pool = pool.ranked(live, pool.log_prob)
    return _rankings(live, finished, dropped, expanded)


def _width(k: int, width: int | None, budget: int | None) -> int:
    if k < 1 or (width is not None and width < 1) or (budget is not None and budget < 0):
        raise SearchError(f"k={k} and width={width} must be at least 1, budget={budget} at least 0.")
    return max(k, 10 if width is None else width)


def _discount(prior: TriePrior | None, eta: float) -> Discount | None:
    if not 0.0 <= eta < np.inf:
        raise SearchError(f"eta={eta} must be at least 0, and finite.")
    if eta and prior is None:
        raise SearchError(f"eta={eta} needs the prior of the images, which is not there: run `genret tune INDEX`.")
    return Discount(prior, eta) if eta and prior else None


def _follow_forced_moves(
    trie: LiveTrie, beams: Beams, expansion: Expansion, finished: Finished
) -> tuple[Beams, Expansion]:
    """Walk down while there is one child only, whose probability is 1; identifiers that end so are set aside."""
    while (forced := np.flatnonzero(np.diff(expansion.offsets) == 1)).size:
        entries = expansion.offsets[forced]
        prefixes = beams.prefixes.copy()
        prefixes[forced, (prefixes[forced] >= 0).sum(axis=1)] = expansion.token_ids_at(entries)
        nodes = beams.nodes.put(forced, expansion.take(entries))
        moved = Beams(beams.query, beams.log_prob, nodes, prefixes, beams.discount)  # the same images lie below
        beams = finished.unbeaten(trie, finished.set_aside(trie, moved))
        expansion = trie.expand(beams.nodes)
    return beams, expansion


def _discounted_children(
    parents: Beams,
    expansion: Expansion,
    entries: Int64 | None,
    scores: NDArray[np.floating],
    constant: Float64,
    wanted: Int64,
    discount: Discount,
    dropped: Dropped,
) -> Beams:
    """The children that can be among each query's best `wanted` by score; the bounds of the others are noted."""
    entries = np.arange(len(scores)) if entries is None else entries
    row = np.searchsorted(expansion.offsets, entries, side="right") - 1
    log_prob, of_prior = scores[entries] + constant[row], discount.of(expansion.take(entries))
    offsets = np.searchsorted(entries, expansion.offsets)
    first_rows = np.searchsorted(parents.query, np.arange(len(wanted) + 1))
    kept = best(log_prob - of_prior[:, SCORE], np.zeros_like(constant), offsets, first_rows, None, wanted)
    lost = np.ones(len(entries), np.bool_)
    lost[kept] = False
    dropped.note_bounds(parents.query[row[lost]], (log_prob - of_prior[:, BOUND])[lost])
    children = _children(parents, expansion, entries[kept], scores, constant)
    return replace(children, discount=of_prior[kept])


def _children(
    parents: Beams, expansion: Expansion, entries: Int64, scores: NDArray[np.floating], constant: Float64
) -> Beams:
    row = np.searchsorted(expansion.offsets, entries, side="right") - 1
    prefixes = parents.prefixes[row]
    prefixes[np.arange(len(row)), (prefixes >= 0).sum(axis=1)] = expansion.token_ids_at(entries)
    log_prob = scores[entries].astype(np.float64) + constant[row]
    return Beams(parents.query[row], log_prob, expansion.take(entries), prefixes)


def _rankings(trie: LiveTrie, finished: Finished, dropped: Dropped, expanded: Int64) -> list[Ranking]:
    beams, n_queries = finished.beams, len(expanded)
    leaves = trie.leaf(beams.nodes)
    prefixes = list(map(tuple, beams.prefixes.tolist()))
    if (beams.prefixes < 0).any():
        prefixes = [tuple(token for token in prefix if token >= 0) for prefix in prefixes]
    log_probs = np.minimum(beams.log_prob, 0.0)
    ranked_by: list[Any] = [None] * len(prefixes) if beams.discount is None else beams.score.tolist()
    hits = list(map(Hit, leaves.tolist(), trie.key(leaves).tolist(), prefixes, log_probs.tolist(), ranked_by))
    bounds = np.searchsorted(beams.query, np.arange(n_queries + 1))
    certain = finished.bar > dropped.bound
    certain |= (finished.bar == dropped.bound) & (finished.order < dropped.order)
    exact = ~dropped.any | certain
    places = pairwise(bounds.tolist())
    return [
        Ranking(tuple(hits[lo:hi]), is_exact, n_expanded)
        for (lo, hi), is_exact, n_expanded in zip(places, exact.tolist(), expanded.tolist(), strict=True)
    ]
