"""Measuring recall on held-out queries, beside text baselines over the same captions.

Every query of the file counts, an unanswerable one as a miss. Knows scorers; nothing of LlamaIndex.
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
from llama_index_genret.evaluation.queries import EvaluationQuery
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import Scorer, recall
from llama_index_genret.scorers.recording import Prefix, RecordingScorer
from llama_index_genret.scorers.rerank import reranking, with_scoring
from llama_index_genret.search import Hit, SearchOptions
from llama_index_genret.store import Index, ScoringChoice, text_key

DEPTH = 10
"""Results looked at for each query."""

TOP_10 = SearchOptions(k=DEPTH)


@dataclass(frozen=True)
class Evaluation:
    """Ranked image ids of every query, and what follows from them.

    hits: of a generative recall, as many as `ranked`. latency_ms: of each query alone, where it was measured.
    kept: of each query, where it was watched: whether the search kept the first 1, 2, ... symbols of a right image.
    """

    queries: tuple[EvaluationQuery, ...]
    ranked: tuple[tuple[str, ...], ...]
    hits: tuple[tuple[Hit, ...], ...] = ()
    latency_ms: tuple[float, ...] = ()
    kept: tuple[tuple[bool, ...], ...] = ()

    def figures(self) -> dict[str, Any]:
        """n, recall@1/5/10, mrr, ndcg@10 and the `interval` of each.

        Where they were measured: `latency_ms` percentiles, `prefix_survival`, and of hits `calibration_error`.
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
        """Share of the queries whose search kept the first 1, 2, ... symbols of a right image; see `level_survival`.

        The last figure is recall@10.
        """
        return np.mean(self.levels(), axis=0).tolist() if self.kept else []

    def levels(self) -> NDArray[np.bool_]:
        """(queries, levels) `kept`, a shorter identifier being kept at the levels below its end if it is as a whole."""
        depth = max(map(len, self.kept), default=0)
        return np.array([[*kept, *[kept[-1]] * (depth - len(kept))] for kept in self.kept], np.bool_)

    def first_hits(self) -> tuple[list[float], list[bool]]:
        """The score of every first hit, and whether it is right; without the queries that were refused."""
        found = [(hits[0].score, ids[0] in query.image_ids) for query, ids, hits in self._rows() if hits]
        return [score for score, _ in found], [right for _, right in found]

    def _rows(self) -> Iterable[tuple[EvaluationQuery, tuple[str, ...], tuple[Hit, ...]]]:
        return zip(self.queries, self.ranked, self.hits, strict=True)

    def of_each_query(self) -> dict[str, list[float]]:
        """recall@1/5/10, mrr and ndcg@10 of every query alone, in the order of `queries`."""
        expected = [query.image_ids for query in self.queries]
        values = {f"recall@{k}": hits_at(self.ranked, expected, k) for k in (1, 5, 10)}
        values["mrr"] = reciprocal_ranks(self.ranked, expected)
        return values | {"ndcg@10": ndcgs_at(self.ranked, expected, 10)}

    def intervals(self) -> dict[str, Interval]:
        """95 % intervals of all of them; queries that ask for the same images are drawn together."""
        asked = [query.image_ids for query in self.queries]
        return {name: bootstrap_interval(values, asked) for name, values in self.of_each_query().items()}

    def of_kind(self, kind: str) -> Evaluation:
        """The part with queries of one kind."""
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
    """Recall every query, one at a time, time each, and watch which prefixes are kept.

    A query that is refused has no results: a miss.

    Args:
        options: of the search, whose prior and eta `scoring` sets; `k` is how deep MRR looks. A beam if not given.
        scoring: how hits are ranked; None, and None in it: the value chosen by `genret tune`.
    """
    chosen = index.scoring(scoring)
    options, rerank = with_scoring(options, index, chosen), reranking(index, chosen)
    watching = RecordingScorer(scorer)
    found, latency_ms, kept = [], [], []
    for query in progress(queries):
        start = time.perf_counter()
        try:
            prompt = query.prompt(index)
            (ranking,) = recall(watching, index.trie, [prompt], options, rerank=rerank)
            hits = ranking.hits
        except QueryError:
            hits = ()
        latency_ms.append((time.perf_counter() - start) * 1e3)
        found.append(hits)
        kept.append(level_survival(index, query, watching.kept(1)[0] if hits else (), hits))
    return replace(evaluation_of(index, queries, found, latency_ms), kept=tuple(kept))


def level_survival(
    index: Index, query: EvaluationQuery, kept: Sequence[Prefix], hits: Sequence[Hit]
) -> tuple[bool, ...]:
    """Whether a search kept the first 1, 2, ... symbols of a right image's identifier.

    A beginning that only one image has is that image: it is kept where the image is recalled. An identifier that is
    shorter than others must have been kept as a whole.

    Args:
        kept: prefixes whose children were scored, as of `RecordingScorer.kept`. hits: what was found in the end.
    """
    right = [index.token_ids(index.rows_by_id[image_id]) for image_id in query.image_ids]
    beams = [*kept, *(hit.token_ids for hit in hits)]

    def survives(level: int) -> bool:
        return any(beam[: len(name[:level])] == name[:level] for beam in beams for name in right)

    return tuple(survives(level) for level in range(1, max(map(len, right)) + 1))


def count_pseudo_queries(index: Index, queries: Sequence[EvaluationQuery]) -> int:
    """How many of the queries a model has written of a right image: after training, they are not held out."""
    return sum(
        any(
            text_key(written.text) == text_key(query.text)
            for image_id in query.image_ids
            for written in index.pseudo_queries_of(index.records[index.rows_by_id[image_id]])
        )
        for query in queries
    )


def evaluation_of(
    index: Index, queries: Sequence[EvaluationQuery], hits: Sequence[Sequence[Hit]], latency_ms: Sequence[float] = ()
) -> Evaluation:
    """What the hits of the queries amount to."""
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
    """Return the hits of many prompts, `batch` of them in one search."""
    hits: list[tuple[Hit, ...]] = []
    for start in progress(range(0, len(prompts), batch)):
        asked = prompts[start : start + batch]
        hits += [ranking.hits for ranking in recall(scorer, index.trie, asked, options)]
    return hits
