"""A scorer that notes what a search asks of another: which prefixes are kept, and how their children score.

Knows searches; nothing of tries, images or models.
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
    """What one step of a search asked, and the (m,) scores of `rows.token_ids` that it was given."""

    rows: Rows
    scores: Scores


@dataclass
class RecordingScorer:
    """Scores as `scorer` does.

    steps: of the last session, in their order. A prefix with one child only is asked nothing, and is in no step.
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
        """The prefixes whose children were scored, of each query of the last session."""
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
