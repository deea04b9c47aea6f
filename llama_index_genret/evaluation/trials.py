"""Evaluate many scorings of an index on the same queries, and score each prefix of a query with the model only once.

Depends on scorers and the index; independent of what is chosen and stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import QueryError
from llama_index_genret.evaluation.evaluate import DEPTH, evaluation_of
from llama_index_genret.models.encoder import CallableEncoder, Encoder
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import Scorer, Scores, Session, recall
from llama_index_genret.scorers.blend import Blender
from llama_index_genret.scorers.rerank import Continuation, Float64, describing_prompt, reranking, with_scoring
from llama_index_genret.search import Hit, Normalise, Rows, SearchOptions
from llama_index_genret.store import Index, Scoring
from llama_index_genret.store.queries import EvaluationQuery
from llama_index_genret.store.scoring import RerankBy

BATCH = 32
"""Queries that are searched together under every scoring. The scores of the model are kept for these queries only."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Hits = list[tuple[Hit, ...]]


@dataclass(frozen=True)
class Trial:
    """One scoring with its figures: n, recall@1/5/10, mrr, ndcg@10."""

    scoring: Scoring
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the scoring and the figures as one flat JSON object."""
        return {**asdict(self.scoring), **self.figures}


class Trials:
    """Validation queries, and the two parts of an index that rank images for them.

    Args:
        model: scores with the trained weights; None for an index that was not trained.
        encoder: that of the index; None for an index without one.
        queries: text queries. A query that is refused counts as a miss.
    """

    def __init__(
        self, index: Index, model: Scorer | None, encoder: Encoder | None, queries: Sequence[EvaluationQuery]
    ) -> None:
        self.index, self.model, self.queries = index, model, queries
        self.prompts = [_prompt(index, query.text) for query in queries]
        self.has_encoder = encoder is not None
        remembered = None if encoder is None else _remembering(encoder, [p.query for p in self.prompts if p])
        self._blender = Blender(index, remembered)

    def hits(self, scorings: Sequence[Scoring], *, k: int = DEPTH, progress: Progress = iter) -> dict[Scoring, Hits]:
        """Return the hits of every query under every scoring, () for a refused query.

        Args:
            scorings: which rank the hits. Scorings that differ in the blend or in eta share the scores of the model.
            k: number of hits of a query.
        """
        found: dict[Scoring, Hits] = {scoring: [] for scoring in scorings}
        for start in progress(range(0, len(self.prompts), BATCH)):
            part = self.prompts[start : start + BATCH]
            valid = [prompt for prompt in part if prompt is not None]
            with _scoring_once(self.model, valid) as model:
                for scoring in found:
                    rankings = iter(self._recall(self._blender.scorer(model, scoring), valid, scoring, k))
                    found[scoring] += [() if prompt is None else next(rankings) for prompt in part]
        return found

    def _recall(self, scorer: Scorer, prompts: Sequence[Prompt], scoring: Scoring, k: int) -> Hits:
        if not prompts:
            return []
        options = with_scoring(SearchOptions(k=k), self.index, scoring)
        rankings = recall(scorer, self.index.trie, prompts, options, rerank=reranking(self.index, scoring))
        return [ranking.hits for ranking in rankings]

    def trial(self, scoring: Scoring, hits: Hits) -> Trial:
        """Return the figures of hits that a scoring ranks."""
        best = [found[:DEPTH] for found in hits]
        return Trial(scoring, evaluation_of(self.index, self.queries, best).figures())

    def likelihoods(self, hits: Iterable[Hits], by: RerankBy) -> Callable[[int, Sequence[Hit]], NDArray[np.float64]]:
        """Compute log p(query | image), natural log, once for every query and image among the hits.

        Returns:
            A function from a query and its hits to the (n,) values of the hits.
        """
        if self.model is None:
            raise QueryError("re-ranking needs a trained model: run `genret train` first.")
        pairs = sorted({(row, hit.key) for ranked in hits for row, own in enumerate(ranked) for hit in own})
        continuations = [
            Continuation(describing_prompt(self.index, key, by), prompt.words)
            for row, key in pairs
            if (prompt := self.prompts[row]) is not None
        ]
        with self.model.session([], Normalise.CHILDREN) as session:
            values = session.log_likelihoods(continuations).tolist() if continuations else []
        known = dict(zip(pairs, values, strict=True))
        return lambda row, own: np.array([known[row, hit.key] for hit in own])


def _prompt(index: Index, text: str) -> Prompt | None:
    """Return the prompt, or None if the query is refused. A refused query counts as a miss."""
    try:
        return index.prompts.for_query(index.tokenizer, text)
    except QueryError:
        return None


def _remembering(encoder: Encoder, queries: Sequence[str]) -> Encoder:
    """Return an encoder that knows the vectors of the queries."""
    texts = list(dict.fromkeys([*queries, "?"]))
    known = dict(zip(texts, encoder.embed_queries(texts), strict=True))
    return CallableEncoder(lambda wanted: np.stack([known[text] for text in wanted]), name=encoder.name)


@contextmanager
def _scoring_once(model: Scorer | None, prompts: Sequence[Prompt]) -> Iterator[Scorer | None]:
    """Open one session of a model for many searches of the same prompts. It scores each prefix of a query once."""
    if model is None:
        yield None
        return
    with model.session(prompts, Normalise.CHILDREN) as session:
        yield cast(Scorer, _OneSession(_RememberingSession(session, {})))  # no search here runs in an event loop


@dataclass(frozen=True)
class _OneSession:
    """A scorer whose sessions are one and the same."""

    only: Session

    @contextmanager
    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Iterator[Session]:
        yield self.only


@dataclass(frozen=True)
class _RememberingSession:
    """A session that keeps the scores of the children of every (query, prefix)."""

    session: Session
    known: dict[tuple[int, bytes], Scores]

    def score(self, rows: Rows) -> Scores:
        lengths = (rows.prefixes >= 0).sum(axis=1).tolist()
        keys = [
            (query, prefix[:length].tobytes())
            for query, prefix, length in zip(rows.query.tolist(), rows.prefixes, lengths, strict=True)
        ]
        new = [place for place, key in enumerate(keys) if key not in self.known]
        if new:
            missing = Rows.of([rows[place] for place in new])
            scores = np.split(self.session.score(missing), missing.offsets[1:-1])
            self.known.update(zip((keys[place] for place in new), scores, strict=True))
        return np.concatenate([self.known[key] for key in keys])

    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        return self.session.log_likelihoods(continuations)
