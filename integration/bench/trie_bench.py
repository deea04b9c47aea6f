"""The gather step: which tokens may follow, with their logits. Ours against tries and grammar engines.

It has 10 rows (one query) and 640 rows (64 queries of 10 beams). Figures are means over the four steps of an
identifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from integration.bench import ours
from integration.bench.corpus import BEAMS, LEVELS, Corpus, logits_matrix
from integration.bench.peers import PEERS, Peer, gather
from integration.bench.timing import Report, Time, interleaved, mean_time, options

ROWS = (BEAMS, 64 * BEAMS)
QUOTES = (
    "STATIC (arXiv:2602.22647), not measured here: 0.033 ms a step on an accelerator, 0.25 % of inference time, 948 x",
    "faster than a trie on the CPU (with its transfers), 47 - 1,033 x faster than binary search on the accelerator.",
)


def main(argv: Sequence[str] | None = None) -> Report:
    """Measure every size, then the growth between the smallest and the largest."""
    args = options(__doc__ or "", sizes=(1_000, 10_000, 100_000, 1_000_000), argv=argv)
    report = Report("trie_bench", args.seed)
    for n in args.sizes:
        corpus = Corpus.sample(n, args.seed)
        report.section(f"gather step, {n:,} identifiers")
        peers = [peer() for peer in PEERS if peer().most_identifiers >= n]
        for peer in peers:
            peer.build(corpus)
        for rows in ROWS:
            measure(report, corpus, peers, rows, args.rounds)
    growth(report, args.sizes, args.rounds, args.seed)
    print("\n" + "\n".join(QUOTES))
    report.results["quoted, not measured"] = " ".join(QUOTES)
    report.write(args.json)
    return report


def measure(report: Report, corpus: Corpus, peers: Sequence[Peer], rows: int, rounds: int) -> None:
    """Measure one size and one number of rows: check all, then time all in turns, level by level."""
    trie, logits = ours.build(corpus), logits_matrix(rows, corpus.seed)
    batches = 2
    by_level: list[dict[str, Time]] = []
    fan_out = []
    for depth in range(LEVELS):
        calls: dict[str, list[Callable[[], Any]]] = {"ours": []}
        for batch in range(batches):
            leaves = corpus.leaves(rows, batch)
            prefixes = corpus.prefixes(leaves, depth)
            nodes = ours.nodes_at(trie, prefixes)
            expected = corpus.allowed(leaves, depth)
            fan_out.append(float(np.mean([len(token_ids) for token_ids in expected])))
            assert_same(expected, ours.allowed(trie, nodes), "ours")
            values = np.concatenate([row[token_ids] for row, token_ids in zip(logits, expected, strict=True)])
            assert (ours.values(trie, nodes, logits) == values).all()
            calls["ours"].append(lambda nodes=nodes: ours.values(trie, nodes, logits))
            for peer in peers:
                place = peer.stand(prefixes)
                assert_same(expected, peer.allowed(place), peer.name)
                calls.setdefault(peer.name, []).append(lambda peer=peer, place=place: gather(peer, place, logits))
        candidates = {name: (lambda batch, made=made: made[batch]()) for name, made in calls.items()}
        by_level.append(interleaved(candidates, batches=batches, rounds=rounds))
    times = {name: mean_time([level[name] for level in by_level]) for name in by_level[0]}
    report.times(f"gather {rows} rows, N={len(corpus)}", times)
    report.value(f"fan-out {rows} rows, N={len(corpus)}", float(np.mean(fan_out)), "children a row")


def growth(report: Report, sizes: Sequence[int], rounds: int, seed: int) -> None:
    """Time our step of the smallest and of the largest size, in turns."""
    small, large = (Corpus.sample(max(n, 10_000), seed) for n in (min(sizes), max(sizes)))
    if len(small) == len(large):
        return
    report.section("growth of our gather step")
    for rows in ROWS:
        logits = logits_matrix(rows, seed)
        candidates: dict[str, Callable[[int], object]] = {}
        for corpus in (small, large):
            trie = ours.build(corpus)
            nodes = [
                ours.nodes_at(trie, corpus.prefixes(corpus.leaves(rows, batch), depth))
                for depth in range(LEVELS)
                for batch in range(2)
            ]
            candidates[f"N={len(corpus)}"] = lambda at, t=trie, n=nodes, m=logits: ours.values(t, n[at], m)
        times = interleaved(candidates, batches=2 * LEVELS, rounds=rounds)
        report.times(f"growth {rows} rows", times, ours=f"N={len(small)}")


def assert_same(expected: Sequence[Any], found: Sequence[Any], name: str) -> None:
    """Check that every row's tokens equal those of brute force."""
    for row, (want, got) in enumerate(zip(expected, found, strict=True)):
        assert np.array_equal(want, np.sort(np.asarray(got))), f"{name}, row {row}: {got}, not {want}"


if __name__ == "__main__":
    main()
