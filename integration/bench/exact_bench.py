"""Exact search: it returns the same images as scoring every identifier. Measures its cost beside a beam.

First it compares a thousand random tries and models with the definition. Then it searches 100,000 identifiers under
models from flat to sharp. It counts expanded prefixes, and how often a beam of ten found the same ten or was exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from integration.bench.corpus import Corpus
from integration.bench.timing import Report, options
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import Ranking, SearchOptions
from llama_index_genret.search._reference import rank_all
from llama_index_genret.trie import Trie, build_trie

TRIES, K = 1_000, 10
SPREADS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Standard deviations of the logits. The perplexity over 256 children goes from 226 down to about 1.5."""

PROMPTS = [Prompt((seed,)) for seed in range(20)]


def main(argv: Sequence[str] | None = None) -> Report:
    """Check and measure."""
    args = options(__doc__ or "", sizes=(100_000,), argv=argv)
    report = Report("exact_bench", args.seed)
    report.section(f"{TRIES} random tries and models against the definition")
    report.value("equal to scoring every identifier", assert_exact(args.seed))
    for n in args.sizes:
        corpus = Corpus.sample(n, args.seed)
        trie, _ = build_trie(corpus.codes.astype(np.int64) + 256 * np.arange(corpus.codes.shape[1]))
        report.section(f"{n:,} identifiers, best {K} of {len(PROMPTS)} queries, 256 symbols, 4 levels")
        for spread in SPREADS:
            compare(report, trie, spread, args.seed)
    report.write(args.json)
    return report


def assert_exact(seed: int) -> int:
    """Compare random tries, of one length or of several, with the definition.

    Returns their number; fails on a difference.
    """
    random = np.random.default_rng(seed)
    for number in range(TRIES):
        depth, symbols = int(random.integers(1, 5)), int(random.integers(2, 9))
        identifiers = sorted({tuple(row) for row in random.integers(0, symbols, (40, depth)).tolist()})
        identifiers += [(symbols, *row) for row in identifiers[:5]]
        scorer = FakeScorer(symbols + 1, seed=number, spread=float(random.uniform(0.2, 6)))
        (ranking,) = recall(scorer, build_trie(identifiers)[0], PROMPTS[:1], SearchOptions(k=K, mode="exact"))

        def logits(prefix: tuple[int, ...], scorer: FakeScorer = scorer) -> list[float]:
            return scorer.logits(PROMPTS[0], prefix).tolist()

        expected = rank_all(identifiers, logits, over_children=True)[:K]
        assert [hit.token_ids for hit in ranking.hits] == [identifier for _, identifier in expected], number
        assert np.allclose([hit.log_prob for hit in ranking.hits], [log_prob for log_prob, _ in expected]), number
        assert ranking.exact
    return TRIES


def compare(report: Report, trie: Trie, spread: float, seed: int) -> None:
    """Measure one model: means over the queries."""
    scorer = FakeScorer(1024, seed=seed, spread=spread)
    beam = recall(scorer, trie, PROMPTS, SearchOptions(k=K))
    exact = recall(scorer, trie, PROMPTS, SearchOptions(k=K, mode="exact"))
    assert all(ranking.exact for ranking in exact)
    assert all(a.hits == b.hits for a, b in zip(beam, exact, strict=True) if a.exact), "a false certificate"
    same = [{h.leaf for h in a.hits} == {h.leaf for h in b.hits} for a, b in zip(beam, exact, strict=True)]
    best = [a.hits[0].leaf == b.hits[0].leaf for a, b in zip(beam, exact, strict=True)]
    key = f"spread {spread}"
    report.value(f"{key}: prefixes expanded, beam", _expanded(beam))
    report.value(f"{key}: prefixes expanded, exact", _expanded(exact))
    report.value(f"{key}: beam has the best image", float(np.mean(best)))
    report.value(f"{key}: beam has the same {K}", float(np.mean(same)))
    report.value(f"{key}: beam says that it is exact", float(np.mean([ranking.exact for ranking in beam])))


def _expanded(rankings: Sequence[Ranking]) -> float:
    return float(np.mean([ranking.nodes_expanded for ranking in rankings]))


if __name__ == "__main__":
    main()
