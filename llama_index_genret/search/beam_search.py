"""Search for the most probable identifiers of a trie, for many queries at once: beam search, or exact.

Depends on the trie and on numbers; independent of text, models and servers. A search is a pure generator: it yields
the rows that must be scored and receives their scores. Sync and async drivers therefore share one logic
(`scorers.base` has both). The slow twin is `search._reference.rank_all`; the tests hold the two equal.

The probability of a prefix is an upper bound for the probabilities of all its identifiers. Exact search expands the
most probable prefixes first, until k identifiers beat every prefix that is left. The result is then certain
(best-first search with an admissible bound, A* without a heuristic). A beam is the same search, but it keeps only the
best `width` prefixes. The bounds of the dropped prefixes decide whether the result of a beam is certain.

With a prior, the score of an identifier is log p - eta * log prior. A beam ranks its prefixes by the same score; the
prior of a prefix is the sum of the priors below it. The value log p - eta * log(the least prior below) is an upper
bound for the scores of the identifiers of a prefix.

Source: constrained beam search of GENRE (arXiv:2010.00904) and GRACE (arXiv:2402.10805). Subtracting the prior from
the score: generative retrieval by an image-generating model without training (TIGeR, arXiv:2406.05814).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.search.beams import (
    BOUND,
    SCORE,
    Beams,
    Discount,
    Dropped,
    Finished,
    cut,
    roots,
    split_best,
)
from llama_index_genret.search.protocol import Float64, Hit, Int64, Normalise, Ranking, Rows, SearchOptions, Steps
from llama_index_genret.search.scores import best, check_scores, row_constants
from llama_index_genret.trie import Expansion, LiveTrie, Trie


def search(trie: Trie | LiveTrie, options: SearchOptions, *, n_queries: int) -> Steps:
    """Rank the identifiers of `trie` for `n_queries` prompts.

    The generator yields the rows of one step over all queries. No row is a finished identifier. It expects (m,) float
    scores of their `token_ids`. Under `Normalise.VOCABULARY` these are natural-log probabilities over the vocabulary.
    Under `Normalise.CHILDREN` they may differ from these by a constant per row, as raw logits do.

    Returns:
        One ranking for each query.
    Raises:
        SearchError: the number of scores differs from the number of tokens.
        NotANumber: a score is NaN or +inf.
        FilterError: the leaf filter was made for another trie.
    """
    discount = Discount(options.prior, options.eta) if options.eta and options.prior else None
    live = trie if isinstance(trie, LiveTrie) else LiveTrie(trie)
    leaf_filter = None if options.leaf_filter is None else live.restrict(options.leaf_filter)
    most = live.n_live if leaf_filter is None else leaf_filter.n_allowed
    if most == 0:
        return [Ranking((), exact=True, nodes_expanded=0)] * n_queries
    width = max(options.k, 10 if options.width is None else options.width)
    k, width = min(options.k, most), min(width, most)  # no depth of the trie has more valid prefixes than leaves
    max_expansions = 0 if options.mode == "beam" else options.max_expansions
    pool, finished = roots(live, n_queries, discount), Finished(roots(live, 0, discount), n_queries, k)
    expanded, dropped = np.zeros(n_queries, np.int64), Dropped(n_queries)
    while len(pool.query):
        spent = np.zeros(n_queries, np.bool_) if max_expansions is None else expanded >= max_expansions
        if discount:  # a beam orders its prefixes by score, an exact search by bound
            pool = pool.ranked(live, np.where(spent[pool.query], pool.score, pool.bound))
        pool = finished.unbeaten(live, finished.extract(live, cut(live, pool, width, spent, dropped)))
        chosen, rest = (pool, None) if spent.all() else split_best(pool, width)
        expansion = live.expand(chosen.nodes)
        if options.normalise is Normalise.CHILDREN:
            chosen, expansion = _follow_forced_moves(live, chosen, expansion, finished)
        if not len(chosen.query):
            pool = chosen if rest is None else rest
            continue
        scores = check_scores((yield Rows(chosen.query, chosen.prefixes, expansion)), expansion.offsets)
        constant = row_constants(scores, expansion.offsets, chosen.log_prob, options.normalise)
        expanded += np.bincount(chosen.query, minlength=n_queries)
        entries = None if leaf_filter is None else np.flatnonzero(expansion.allowed(leaf_filter))
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


def _follow_forced_moves(
    trie: LiveTrie, beams: Beams, expansion: Expansion, finished: Finished
) -> tuple[Beams, Expansion]:
    """Advance prefixes that have only one child, whose probability is 1. Identifiers that end go to `finished`."""
    while (forced := np.flatnonzero(np.diff(expansion.offsets) == 1)).size:
        entries = expansion.offsets[forced]
        prefixes = beams.prefixes.copy()
        prefixes[forced, (prefixes[forced] >= 0).sum(axis=1)] = expansion.token_ids_at(entries)
        nodes = beams.nodes.put(forced, expansion.take(entries))
        moved = Beams(beams.query, beams.log_prob, nodes, prefixes, beams.discount)  # same leaves below, same prior
        beams = finished.unbeaten(trie, finished.extract(trie, moved))
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
    """Return the children that can be among each query's best `wanted` by score, and note the bounds of the others."""
    entries = np.arange(len(scores)) if entries is None else entries
    row = np.searchsorted(expansion.offsets, entries, side="right") - 1
    log_prob, discounts = scores[entries] + constant[row], discount.of(expansion.take(entries))
    offsets = np.searchsorted(entries, expansion.offsets)
    first_rows = np.searchsorted(parents.query, np.arange(len(wanted) + 1))
    kept = best(log_prob - discounts[:, SCORE], np.zeros_like(constant), offsets, first_rows, None, wanted)
    lost = np.ones(len(entries), np.bool_)
    lost[kept] = False
    dropped.note_bounds(parents.query[row[lost]], (log_prob - discounts[:, BOUND])[lost])
    children = _children(parents, expansion, entries[kept], scores, constant)
    return replace(children, discount=discounts[kept])


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
