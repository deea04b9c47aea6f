"""Recall of many queries by a trained index: hits, scores of all images, and how far the right prefix survives.

Knows scorers and tries; nothing of peers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import QueryError
from llama_index_genret.evaluation import Evaluation, Query, evaluation_of, recall_in_batches
from llama_index_genret.prompts import Prompt
from llama_index_genret.scorers.base import Scorer, Session
from llama_index_genret.search import Hit, Normalise, Rows
from llama_index_genret.store import Index

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Recalled:
    """What a search found for queries. hits: of each, none where the query was refused."""

    index: Index
    queries: tuple[Query, ...]
    hits: tuple[tuple[Hit, ...], ...]

    def evaluation(self) -> Evaluation:
        """Its first ten hits."""
        return evaluation_of(self.index, self.queries, [found[:10] for found in self.hits])

    def log_probs(self) -> NDArray[np.float64]:
        """(queries, images), in the order of the index's records; -inf where an image was not found."""
        scores = np.full((len(self.queries), len(self.index.records)), -np.inf)
        for row, found in enumerate(self.hits):
            scores[row, [hit.key for hit in found]] = [hit.log_prob for hit in found]
        return scores


def recall_queries(
    index: Index,
    scorer: Scorer,
    queries: Sequence[Query],
    *,
    k: int = 10,
    exact: bool = False,
    batch: int = 32,
    progress: Progress = iter,
) -> Recalled:
    """The best `k` of every query, by a beam as wide, or certain to be the best if `exact`."""
    prompts: list[Prompt | None] = []
    for query in queries:
        try:
            prompts.append(query.prompt(index))
        except QueryError:
            prompts.append(None)
    asked = [prompt for prompt in prompts if prompt]
    budget = None if exact else 0
    found = iter(recall_in_batches(index, scorer, asked, k=k, batch=batch, budget=budget, progress=progress))
    return Recalled(index, tuple(queries), tuple(next(found) if prompt else () for prompt in prompts))


def prefix_survival(
    index: Index, scorer: Scorer, queries: Sequence[Query], *, batch: int = 32, progress: Progress = iter
) -> list[float]:
    """Share of the queries with a right image whose first 1, 2, ... symbols a beam of ten keeps.

    A beginning that only one image has is that image: it is kept where the image is recalled. The last figure is
    recall@10. A refused query keeps nothing.
    """
    watching = WatchingScorer(scorer)
    recalled = recall_queries(index, watching, queries, batch=batch, progress=progress)
    kept = iter(watching.kept)
    beams: list[list[Prefix]] = []
    for hits in recalled.hits:
        beams.append([*(next(kept) if hits else ()), *(hit.token_ids for hit in hits)])
    right = [[index.token_ids(index.rows_by_id[name]) for name in query.image_ids] for query in queries]
    levels = max(len(token_ids) for names in right for token_ids in names)
    return [
        float(np.mean([_survives(beam, names, level) for beam, names in zip(beams, right, strict=True)]))
        for level in range(1, levels + 1)
    ]


def _survives(beam: Sequence[Prefix], right: Sequence[Prefix], level: int) -> bool:
    """An identifier that is shorter than `level` must have survived as a whole."""
    return any(kept[: len(name[:level])] == name[:level] for kept in beam for name in right)


@dataclass
class WatchingScorer:
    """A scorer that notes which prefixes a search keeps.

    kept: those of every query, in the order in which they were asked.
    """

    scorer: Scorer
    kept: list[list[Prefix]] = field(default_factory=list)

    @contextmanager
    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Iterator[Session]:
        """See `Scorer.session`."""
        start = len(self.kept)
        self.kept += [[] for _ in prompts]
        with self.scorer.session(prompts, normalise) as session:
            yield _Watching(session, self.kept[start:])

    def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Any:
        """Not watched: searches here are synchronous."""
        return self.scorer.async_session(prompts, normalise)


@dataclass(frozen=True)
class _Watching:
    session: Session
    kept: list[list[Prefix]]

    def score(self, rows: Rows) -> Any:
        for row in rows:
            self.kept[row.query].append(row.prefix)
        return self.session.score(rows)
