"""Define the protocol of scorers, and the two drivers that run a search with a scorer.

Depends on searches and prompts; independent of models and HTTP.
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
    """A scorer opened for the prompts of one search. It may cache what its rows share, such as a KV cache."""

    def score(self, rows: Rows) -> Scores:
        """Return (m,) floats, one for each of `rows.token_ids`; `search.search` defines their meaning."""

    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        """Return (n,) natural log-probabilities of the continuations' tokens, over the whole vocabulary.

            for one in continuations: yield sum(log p(token | prompt, tokens before it) for token in one.token_ids)

        Each continuation brings its own prompt; the prompts of the session are not used.
        """


class AsyncSession(Protocol):
    """A `Session` for an event loop, which it never blocks."""

    async def score(self, rows: Rows) -> Scores:
        """Return the same as `Session.score`."""

    async def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        """Return the same as `Session.log_likelihoods`."""


@dataclass(frozen=True)
class ThreadSession:
    """An `AsyncSession` around a `Session` of this process. Each step runs in a thread, one step at a time."""

    session: Session
    lock: threading.Lock

    async def score(self, rows: Rows) -> Scores:
        """Return the same as `Session.score`."""
        return await asyncio.to_thread(self._locked, self.session.score, rows)

    async def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        """Return the same as `Session.log_likelihoods`."""
        return await asyncio.to_thread(self._locked, self.session.log_likelihoods, continuations)

    def _locked(self, compute: Callable[[Any], Any], argument: Any) -> Any:
        with self.lock:
            return compute(argument)


class AsyncScorer(Protocol):
    """A source of log-probabilities of next tokens, inside an event loop.

    `normalise` is the option of the search. Under CHILDREN a session may return raw logits.
    A session receives the prompts of its search when it opens; rows refer to them by position.
    """

    def async_session(
        self, prompts: Sequence[Prompt], normalise: Normalise
    ) -> AbstractAsyncContextManager[AsyncSession]:
        """Open a session inside the running event loop."""


class Scorer(AsyncScorer, Protocol):
    """An `AsyncScorer` that also works without an event loop."""

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
        options: options of the search; `scorers.rerank.with_scoring` adds the prior of an index.
        rerank: re-ranks the best hits, None for none. `Ranking.exact` then describes the candidates.
    Raises:
        QueryError: `rerank` is given and a prompt has no words.
    """
    steps = _steps(trie, len(prompts), options, rerank)
    with scorer.session(prompts, options.normalise) as session:
        scores: Any = None
        try:
            while True:
                scores = session.score(steps.send(scores))
        except StopIteration as stop:
            rankings: list[Ranking] = stop.value
        if rerank is None:
            return rankings
        continuations = rerank.continuations(prompts, rankings)
        likelihoods = session.log_likelihoods(continuations) if continuations else np.zeros(0)
        return rerank.apply(rankings, likelihoods, options.k)


async def arecall(
    scorer: AsyncScorer,
    trie: Trie | LiveTrie,
    prompts: Sequence[Prompt],
    options: SearchOptions,
    *,
    rerank: Rerank | None = None,
) -> list[Ranking]:
    """Run `recall` in an event loop, with the same steps, each awaited."""
    steps = _steps(trie, len(prompts), options, rerank)
    async with scorer.async_session(prompts, options.normalise) as session:
        scores: Any = None
        while True:
            try:
                rows = steps.send(scores)
            except StopIteration as stop:
                rankings: list[Ranking] = stop.value
                break
            scores = await session.score(rows)
        if rerank is None:
            return rankings
        continuations = rerank.continuations(prompts, rankings)
        likelihoods = await session.log_likelihoods(continuations) if continuations else np.zeros(0)
        return rerank.apply(rankings, likelihoods, options.k)


def _steps(trie: Trie | LiveTrie, n_queries: int, options: SearchOptions, rerank: Rerank | None) -> Steps:
    """Search for the number of hits that the re-ranking needs, at least the `k` of the options."""
    k = max(options.k, rerank.candidates) if rerank else options.k
    return search(trie, replace(options, k=k), n_queries=n_queries)
