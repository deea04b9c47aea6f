"""Measure recall on held-out queries.

Every query of the file counts. A query that the prompt builder refuses counts as a miss. Depends on scorers and the
index; independent of LlamaIndex.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import QueryError
from llama_index_genret.evaluation.metrics import (
    Interval,
    bootstrap_interval,
    expected_calibration_error,
    hits_at,
    mean_reciprocal_rank,
    ndcg_at,
    ndcgs_at,
    recall_at,
    reciprocal_ranks,
)
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import Scorer, recall
from llama_index_genret.scorers.recording import Prefix, RecordingScorer
from llama_index_genret.scorers.rerank import reranking, with_scoring
from llama_index_genret.search import Hit, SearchOptions
from llama_index_genret.store import Index, ScoringChoice, text_key
from llama_index_genret.store.queries import EvaluationQuery

DEPTH = 10
"""Number of results per query."""

TOP_10 = SearchOptions(k=DEPTH)


@dataclass(frozen=True)
class Evaluation:
    """The ranked image ids of every query, and the metrics that follow from them.

    queries: (n,) the queries.
    ranked: (n,) image ids per query, best first.
    hits: (n,) hits per query of a generative recall, parallel to `ranked`. Empty for a baseline.
    latency_ms: (n,) milliseconds per query, one query at a time. Empty if not measured.
    kept: (n,) per query, whether the search kept the first 1, 2, ... symbols of a right image. Empty if not recorded.
    """

    queries: tuple[EvaluationQuery, ...]
    ranked: tuple[tuple[str, ...], ...]
    hits: tuple[tuple[Hit, ...], ...] = ()
    latency_ms: tuple[float, ...] = ()
    kept: tuple[tuple[bool, ...], ...] = ()

    def figures(self) -> dict[str, Any]:
        """Return n, recall@1/5/10, mrr, ndcg@10 and the `interval` of each.

        If measured, the result also has `latency_ms` percentiles, `prefix_survival` and `calibration_error` of hits.
        """
        expected = [query.image_ids for query in self.queries]
        figures: dict[str, Any] = {"n": len(self.queries)}
        figures |= {f"recall@{k}": recall_at(self.ranked, expected, k) for k in (1, 5, 10)}
        figures |= {"mrr": mean_reciprocal_rank(self.ranked, expected), "ndcg@10": ndcg_at(self.ranked, expected, 10)}
        figures["interval"] = {name: list(interval) for name, interval in self.intervals().items()}
        if self.latency_ms:
            p50, p95 = np.percentile(self.latency_ms, [50, 95])
            figures["latency_ms"] = {"p50": round(float(p50), 1), "p95": round(float(p95), 1)}
        if self.kept:
            figures["prefix_survival"] = self.prefix_survival()
        if self.hits:
            figures["calibration_error"] = expected_calibration_error(*self.first_hits())
        return figures

    def prefix_survival(self) -> list[float]:
        """Return the share of the queries whose search kept the first 1, 2, ... symbols of a right image.

        The last figure is recall@10. `level_survival` defines "kept".
        """
        return np.mean(self.levels(), axis=0).tolist() if self.kept else []

    def levels(self) -> NDArray[np.bool_]:
        """Return `kept` as a (queries, levels) array.

        At levels below its end, an identifier that is shorter than others repeats its last value.
        """
        depth = max(map(len, self.kept), default=0)
        return np.array([[*kept, *[kept[-1]] * (depth - len(kept))] for kept in self.kept], np.bool_)

    def first_hits(self) -> tuple[list[float], list[bool]]:
        """Return the score of every first hit, and whether it is right. Refused queries are left out."""
        found = [(hits[0].score, ids[0] in query.image_ids) for query, ids, hits in self._rows() if hits]
        return [score for score, _ in found], [right for _, right in found]

    def _rows(self) -> Iterable[tuple[EvaluationQuery, tuple[str, ...], tuple[Hit, ...]]]:
        return zip(self.queries, self.ranked, self.hits, strict=True)

    def of_each_query(self) -> dict[str, list[float]]:
        """Return recall@1/5/10, mrr and ndcg@10 of each single query, in the order of `queries`."""
        expected = [query.image_ids for query in self.queries]
        values = {f"recall@{k}": hits_at(self.ranked, expected, k) for k in (1, 5, 10)}
        values["mrr"] = reciprocal_ranks(self.ranked, expected)
        return values | {"ndcg@10": ndcgs_at(self.ranked, expected, 10)}

    def intervals(self) -> dict[str, Interval]:
        """Return the 95 % interval of each metric. Queries with the same right images are drawn together."""
        groups = [query.image_ids for query in self.queries]
        return {name: bootstrap_interval(values, groups) for name, values in self.of_each_query().items()}

    def of_kind(self, kind: str) -> Evaluation:
        """Return the evaluation of the queries of one kind."""
        rows = [row for row, query in enumerate(self.queries) if query.kind == kind]
        return Evaluation(
            tuple(self.queries[row] for row in rows),
            tuple(self.ranked[row] for row in rows),
            tuple(self.hits[row] for row in rows) if self.hits else (),
            tuple(self.latency_ms[row] for row in rows) if self.latency_ms else (),
            tuple(self.kept[row] for row in rows) if self.kept else (),
        )


def evaluate(
    index: Index,
    scorer: Scorer,
    queries: Sequence[EvaluationQuery],
    options: SearchOptions = TOP_10,
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    scoring: ScoringChoice | None = None,
) -> Evaluation:
    """Recall every query, one at a time. Record the latency and the prefixes that the search keeps.

    A refused query has no results and counts as a miss.

    Args:
        options: options of the search, default beam search with k=10. `scoring` sets the prior and eta. MRR counts the
            first `k` results.
        scoring: how hits are ranked. None, or a field that is None: the value chosen by `genret tune`.
    """
    chosen = index.scoring(scoring)
    options, rerank = with_scoring(options, index, chosen), reranking(index, chosen)
    recorder = RecordingScorer(scorer)
    found, latency_ms, kept = [], [], []
    for query in progress(queries):
        start = time.perf_counter()
        try:
            prompt = query.prompt(index)
            (ranking,) = recall(recorder, index.trie, [prompt], options, rerank=rerank)
            hits = ranking.hits
        except QueryError:
            hits = ()
        latency_ms.append((time.perf_counter() - start) * 1e3)
        found.append(hits)
        kept.append(level_survival(index, query, recorder.kept(1)[0] if hits else (), hits))
    return replace(evaluation_of(index, queries, found, latency_ms), kept=tuple(kept))


def level_survival(
    index: Index, query: EvaluationQuery, kept: Sequence[Prefix], hits: Sequence[Hit]
) -> tuple[bool, ...]:
    """Return, per level, whether a search kept the first 1, 2, ... symbols of a right image's identifier.

    A prefix that only one image has counts as kept if the search recalls the image. An identifier that is shorter than
    others counts as kept only as a whole.

    Args:
        kept: prefixes whose children were scored, from `RecordingScorer.kept`.
        hits: final results of the search.
    """
    right = [index.token_ids(index.rows_by_id[image_id]) for image_id in query.image_ids]
    beams = [*kept, *(hit.token_ids for hit in hits)]

    def survives(level: int) -> bool:
        return any(beam[: len(path[:level])] == path[:level] for beam in beams for path in right)

    return tuple(survives(level) for level in range(1, max(map(len, right)) + 1))


def count_pseudo_queries(index: Index, queries: Sequence[EvaluationQuery]) -> int:
    """Count the queries that equal a pseudo-query of a right image. After training, these are not held out."""
    return sum(
        any(
            text_key(pseudo_query.text) == text_key(query.text)
            for image_id in query.image_ids
            for pseudo_query in index.pseudo_queries_of(index.records[index.rows_by_id[image_id]])
        )
        for query in queries
    )


def evaluation_of(
    index: Index, queries: Sequence[EvaluationQuery], hits: Sequence[Sequence[Hit]], latency_ms: Sequence[float] = ()
) -> Evaluation:
    """Return the evaluation of the given hits, (n,) per query, best first."""
    ranked = tuple(tuple(index.record_of(hit).image_id for hit in found) for found in hits)
    return Evaluation(tuple(queries), ranked, tuple(map(tuple, hits)), tuple(latency_ms))


def recall_in_batches(
    index: Index,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    options: SearchOptions = TOP_10,
    *,
    batch: int = 32,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[tuple[Hit, ...]]:
    """Return the hits of many prompts, with `batch` prompts per search."""
    hits: list[tuple[Hit, ...]] = []
    for start in progress(range(0, len(prompts), batch)):
        part = prompts[start : start + batch]
        hits += [ranking.hits for ranking in recall(scorer, index.trie, part, options)]
    return hits
