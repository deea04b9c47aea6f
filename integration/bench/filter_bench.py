"""A metadata filter: the time to make it from a mask, and its cost per step. Uses random subsets of 1 % and of 50 %."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from integration.bench import ours
from integration.bench.corpus import BEAMS, LEVELS, Corpus, logits_matrix
from integration.bench.peers import DictTrie
from integration.bench.step_bench import Model
from integration.bench.timing import Report, Time, interleaved, options, stopwatch
from llama_index_genret.trie import LeafFilter, Trie

SHARES = (0.01, 0.5)
MOST_IN_DICTS = 1_000_000


def main(argv: Sequence[str] | None = None) -> Report:
    """Measure every size and share."""
    args = options(__doc__ or "", sizes=(10_000, 1_000_000), argv=argv)
    report, model = Report("filter_bench", args.seed), Model.random(args.seed)
    for n in args.sizes:
        report.section(f"filter, {n:,} identifiers")
        corpus = Corpus.sample(n, args.seed)
        trie = ours.build(corpus)
        for share in SHARES:
            mask = np.random.default_rng(args.seed).random(n) < share
            leaf_filter = LeafFilter.from_mask(mask)
            assert_exact(corpus, trie, mask, leaf_filter)
            set_up(report, corpus, mask, share, args.rounds)
            for rows in (BEAMS, 64 * BEAMS):
                gather(report, corpus, trie, mask, leaf_filter, share, rows, args.rounds)
            for n_queries in (1, 64):
                step(report, trie, model, leaf_filter, mask, share, n_queries, args.rounds)
    report.write(args.json)
    return report


def assert_exact(corpus: Corpus, trie: Trie, mask: np.ndarray, leaf_filter: LeafFilter) -> None:
    """Check that a child is kept exactly where brute force over the allowed identifiers alone finds it."""
    assert leaf_filter.n_allowed == mask.sum()
    subset = Corpus(corpus.codes[mask], corpus.seed)
    for depth in range(LEVELS):
        among = np.arange(len(subset))
        leaves = subset.leaves(8 * BEAMS, depth, among)
        nodes = ours.nodes_at(trie, subset.prefixes(leaves, depth))
        kept = ours.children_allowed(trie, nodes, leaf_filter)
        everything = np.concatenate(ours.allowed(trie, nodes))
        assert np.array_equal(everything[kept], np.concatenate(subset.allowed(leaves, depth)))


def set_up(report: Report, corpus: Corpus, mask: np.ndarray, share: float, rounds: int) -> None:
    """Time the setup from a mask in identifier order, and the alternative in the peers: a trie of the subset."""
    key = f"set-up {share:.0%}, N={len(corpus)}"
    subset = Corpus(corpus.codes[mask], corpus.seed)
    subset.token_ids  # noqa: B018  (made before the clock starts)
    times = interleaved(
        {"ours": lambda _: LeafFilter.from_mask(mask), "our trie, rebuilt": lambda _: ours.build(subset)},
        batches=1,
        rounds=rounds,
    )
    if len(corpus) <= MOST_IN_DICTS:
        times["dict trie, rebuilt"] = Time.of([stopwatch(lambda: DictTrie().build(subset)) for _ in range(rounds)])
    report.times(key, times)


def gather(
    report: Report,
    corpus: Corpus,
    trie: Trie,
    mask: np.ndarray,
    leaf_filter: LeafFilter,
    share: float,
    rows: int,
    rounds: int,
) -> None:
    """Time the gather step with and without the filter on the same rows, prefixes of allowed images.

    Mean of all steps.
    """
    logits, among = logits_matrix(rows, corpus.seed), np.flatnonzero(mask)
    places = [
        ours.nodes_at(trie, corpus.prefixes(corpus.leaves(rows, batch, among), depth))
        for depth in range(LEVELS)
        for batch in range(2)
    ]
    for nodes in places:
        kept = ours.children_allowed(trie, nodes, leaf_filter)
        expected = ours.values(trie, nodes, logits)[kept]
        assert np.array_equal(ours.allowed_values(trie, nodes, logits, leaf_filter), expected)
    times = interleaved(
        {
            "unfiltered": lambda at: ours.values(trie, places[at], logits),
            "filtered": lambda at: ours.allowed_values(trie, places[at], logits, leaf_filter),
        },
        batches=len(places),
        rounds=rounds,
    )
    report.times(f"gather {share:.0%}, {rows} rows, N={len(corpus)}", times, ours="unfiltered")


def step(
    report: Report,
    trie: Trie,
    model: Model,
    leaf_filter: LeafFilter,
    mask: np.ndarray,
    share: float,
    n_queries: int,
    rounds: int,
) -> None:
    """Time steps 2 to 4 of a search with and without the filter, in turns. The filtered one returns allowed images.

    A filtered search meets fewer candidates. The ratio may be below 1, where that of `gather` compares equal rows.
    """

    def seconds(chosen: LeafFilter | None) -> float:
        search = ours.Search(trie, n_queries, BEAMS, over_children=True, leaf_filter=chosen)
        steps = []
        while search.hits is None:
            block = model.block(search.query, search.node, search.alphabet)
            steps.append(stopwatch(lambda block=block: search.step(block)))
        if chosen is not None:
            assert all(mask[hit.leaf] for hits in search.hits for hit in hits)
            assert all(len(hits) == min(BEAMS, mask.sum()) for hits in search.hits)
        return float(np.mean(steps[1:]))

    repeat = 10 if n_queries == 1 else 1
    rows: dict[str, list[float]] = {"unfiltered": [], "filtered": []}
    for _ in range(rounds):
        for name, chosen in (("unfiltered", None), ("filtered", leaf_filter)):
            rows[name].append(float(np.mean([seconds(chosen) for _ in range(repeat)])))
    key = f"step {share:.0%}, {n_queries} queries, N={trie.n_leaves}"
    report.times(key, {name: Time.of(times) for name, times in rows.items()}, ours="unfiltered")


if __name__ == "__main__":
    main()
