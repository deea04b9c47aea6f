"""Recall of many queries by a trained index: hits, scores of all images, and prefix survival.

Depends on scorers and tries; independent of peers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import QueryError
from llama_index_genret.evaluation.evaluate import Evaluation, evaluation_of, level_survival, recall_in_batches
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import Scorer
from llama_index_genret.scorers.recording import RecordingScorer
from llama_index_genret.search import Hit, Mode, SearchOptions
from llama_index_genret.store import Index
from llama_index_genret.store.queries import EvaluationQuery

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Recalled:
    """The results of a search. hits: for each query, empty if the query was refused."""

    index: Index
    queries: tuple[EvaluationQuery, ...]
    hits: tuple[tuple[Hit, ...], ...]

    def evaluation(self) -> Evaluation:
        """Return the first ten hits of each query."""
        return evaluation_of(self.index, self.queries, [found[:10] for found in self.hits])

    def log_probs(self) -> NDArray[np.float64]:
        """Return (queries, images) scores, in the order of the index's records, -inf where an image was not found."""
        scores = np.full((len(self.queries), len(self.index.records)), -np.inf)
        for row, found in enumerate(self.hits):
            scores[row, [hit.key for hit in found]] = [hit.log_prob for hit in found]
        return scores


def recall_queries(
    index: Index,
    scorer: Scorer,
    queries: Sequence[EvaluationQuery],
    *,
    k: int = 10,
    mode: Mode = "beam",
    batch: int = 32,
    progress: Progress = iter,
) -> Recalled:
    """Return the best `k` of every query, by a beam of width `k`, or exactly."""
    prompts: list[Prompt | None] = []
    for query in queries:
        try:
            prompts.append(query.prompt(index))
        except QueryError:
            prompts.append(None)
    valid = [prompt for prompt in prompts if prompt]
    options = SearchOptions(k=k, mode=mode)
    found = iter(recall_in_batches(index, scorer, valid, options, batch=batch, progress=progress))
    return Recalled(index, tuple(queries), tuple(next(found) if prompt else () for prompt in prompts))


def prefix_survival(
    index: Index, scorer: Scorer, queries: Sequence[EvaluationQuery], *, batch: int = 32, progress: Progress = iter
) -> list[float]:
    """Return `Evaluation.prefix_survival` for a beam of ten. A refused query keeps nothing."""
    watching, kept_levels = RecordingScorer(scorer), []
    for start in progress(range(0, len(queries), batch)):
        recalled = recall_queries(index, watching, queries[start : start + batch], batch=batch)
        kept = iter(watching.kept(batch))
        kept_levels += [
            level_survival(index, query, next(kept) if hits else (), hits)
            for query, hits in zip(recalled.queries, recalled.hits, strict=True)
        ]
    return Evaluation(tuple(queries), (), kept=tuple(kept_levels)).prefix_survival()
