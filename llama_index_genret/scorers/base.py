"""What a scorer promises, and the two drivers that run a search with one.

Knows searches and prompts; nothing of models or HTTP.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.rerank import Continuation, Float64, Rerank
from llama_index_genret.search import Normalise, Ranking, Rows, SearchOptions, Steps, search
from llama_index_genret.trie import LiveTrie, Trie

Scores = NDArray[np.floating]


class Session(Protocol):
    """One search's hold on a scorer, which may keep what its rows share (a KV cache)."""

    def score(self, rows: Rows) -> Scores:
        """(m,) floats, one for each of `rows.token_ids`; see `search.search` for the meaning."""

    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        """(n,) natural log of the probability of each one's tokens after its prompt, over the whole vocabulary.

            for one in continuations: yield sum(log p(token | prompt, tokens before it) for token in one.token_ids)

        The prompts are those of the continuations, not of the session.
        """


class AsyncSession(Protocol):
    """The same for an event loop; it never blocks it."""

    async def score(self, rows: Rows) -> Scores:
        """As `Session.score`."""

    async def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        """As `Session.log_likelihoods`."""


@dataclass(frozen=True)
class ThreadSession:
    """A `Session` that computes in this process, for an event loop: each step in a thread, one at a time."""

    session: Session
    lock: threading.Lock

    async def score(self, rows: Rows) -> Scores:
        """As `Session.score`."""
        return await asyncio.to_thread(self._locked, self.session.score, rows)

    async def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        """As `Session.log_likelihoods`."""
        return await asyncio.to_thread(self._locked, self.session.log_likelihoods, continuations)

    def _locked(self, compute: Callable[[Any], Any], asked: Any) -> Any:
        with self.lock:
            return compute(asked)


class AsyncScorer(Protocol):
    """Gives log-probabilities of next tokens, inside an event loop.

    `normalise` tells a session what its search will do: under CHILDREN it may answer raw logits.
    A search's prompts are known when its session opens; its rows name them by position.
    """

    def async_session(
        self, prompts: Sequence[Prompt], normalise: Normalise
    ) -> AbstractAsyncContextManager[AsyncSession]:
        """Open a session inside the running event loop."""


class Scorer(AsyncScorer, Protocol):
    """The same, and without an event loop too."""

    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AbstractContextManager[Session]:
        """Open a session."""


def recall(
    scorer: Scorer,
    trie: Trie | LiveTrie,
    prompts: Sequence[Prompt],
    options: SearchOptions,
    *,
    rerank: Rerank | None = None,
) -> list[Ranking]:
    """Return the best `k` identifiers for each prompt. Errors are those of `search.search`.

    Args:
        options: of the search; `scorers.rerank.with_scoring` adds the prior of an index.
        rerank: re-ranks the best hits, None for none. `Ranking.exact` then describes the candidates.
    Raises:
        QueryError: a prompt that is re-ranked has no words.
    """
    steps = _steps(trie, len(prompts), options, rerank)
    with scorer.session(prompts, options.normalise) as session:
        answer: Any = None
        try:
            while True:
                answer = session.score(steps.send(answer))
        except StopIteration as stop:
            rankings: list[Ranking] = stop.value
        if rerank is None:
            return rankings
        asked = rerank.asked(prompts, rankings)
        return rerank.ranked(rankings, session.log_likelihoods(asked) if asked else np.zeros(0), options.k)


async def arecall(
    scorer: AsyncScorer,
    trie: Trie | LiveTrie,
    prompts: Sequence[Prompt],
    options: SearchOptions,
    *,
    rerank: Rerank | None = None,
) -> list[Ranking]:
    """Run `recall` in an event loop: the same steps, each awaited."""
    steps = _steps(trie, len(prompts), options, rerank)
    async with scorer.async_session(prompts, options.normalise) as session:
        answer: Any = None
        while True:
            try:
                rows = steps.send(answer)
            except StopIteration as stop:
                rankings: list[Ranking] = stop.value
                break
            answer = await session.score(rows)
        if rerank is None:
            return rankings
        asked = rerank.asked(prompts, rankings)
        return rerank.ranked(rankings, await session.log_likelihoods(asked) if asked else np.zeros(0), options.k)


def _steps(trie: Trie | LiveTrie, n_queries: int, options: SearchOptions, rerank: Rerank | None) -> Steps:
    """Search for as many hits as the re-ranking takes."""
    k = max(options.k, rerank.candidates) if rerank else options.k
    return search(trie, replace(options, k=k), n_queries=n_queries)
