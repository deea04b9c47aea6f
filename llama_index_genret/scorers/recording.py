"""Record the rows that a search sends to a scorer, and their scores.

Depends on searches; independent of tries, images and models.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Scorer, Scores, Session
from llama_index_genret.scorers.rerank import Continuation, Float64
from llama_index_genret.search import Normalise, Rows

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """The rows of one step of a search, and the (m,) scores of `rows.token_ids` that the scorer returned."""

    rows: Rows
    scores: Scores


@dataclass
class RecordingScorer:
    """A scorer that returns the scores of `scorer` and records each step.

    steps: the steps of the last session, in order. A search does not score a prefix that has only one child, so no
        step contains it.
    """

    scorer: Scorer
    steps: list[Step] = field(default_factory=list)

    @contextmanager
    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Iterator[Session]:
        """See `Scorer.session`."""
        self.steps = []
        with self.scorer.session(prompts, normalise) as session:
            yield _RecordingSession(session, self.steps)

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """See `AsyncScorer.async_session`."""
        self.steps = []
        async with self.scorer.async_session(prompts, normalise) as session:
            yield _AsyncRecordingSession(session, self.steps)

    def kept(self, n_queries: int) -> list[list[Prefix]]:
        """Return the prefixes whose children were scored, for each query of the last session."""
        kept: list[list[Prefix]] = [[] for _ in range(n_queries)]
        for step in self.steps:
            for query, prefix in zip(step.rows.query.tolist(), step.rows.prefixes.tolist(), strict=True):
                kept[query].append(tuple(token for token in prefix if token >= 0))
        return kept


@dataclass(frozen=True)
class _RecordingSession:
    session: Session
    steps: list[Step]

    def score(self, rows: Rows) -> Scores:
        scores = self.session.score(rows)
        self.steps.append(Step(rows, scores))
        return scores

    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        return self.session.log_likelihoods(continuations)


@dataclass(frozen=True)
class _AsyncRecordingSession:
    session: AsyncSession
    steps: list[Step]

    async def score(self, rows: Rows) -> Scores:
        scores = await self.session.score(rows)
        self.steps.append(Step(rows, scores))
        return scores

    async def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        return await self.session.log_likelihoods(continuations)
