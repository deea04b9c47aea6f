"""What a scorer promises, and the two drivers that run a search with one.

Knows searches and prompts; nothing of models or HTTP.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.prompts import Prompt
from llama_index_genret.search import Normalise, Ranking, Rows, search
from llama_index_genret.trie import LeafFilter, LiveTrie, Trie, TriePrior

Scores = NDArray[np.floating]


class Session(Protocol):
    """One search's hold on a scorer, which may keep what its rows share (a KV cache)."""

    def score(self, rows: Rows) -> Scores:
        """(m,) floats, one for each of `rows.token_ids`; see `search.search` for the meaning."""


class AsyncSession(Protocol):
    """The same for an event loop; it never blocks it."""

    async def score(self, rows: Rows) -> Scores:
        """As `Session.score`."""


@dataclass(frozen=True)
class ThreadSession:
    """A `Session` that computes in this process, for an event loop: each step in a thread, one at a time."""

    session: Session
    lock: threading.Lock

    async def score(self, rows: Rows) -> Scores:
        """As `Session.score`."""
        return await asyncio.to_thread(self._score, rows)

    def _score(self, rows: Rows) -> Scores:
        with self.lock:
            return self.session.score(rows)


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
    *,
    k: int,
    width: int | None = None,
    normalise: Normalise = Normalise.CHILDREN,
    allowed: LeafFilter | None = None,
    budget: int | None = 0,
    prior: TriePrior | None = None,
    eta: float = 0.0,
) -> list[Ranking]:
    """The best `k` identifiers for each prompt; arguments and errors of `search.search`."""
    steps = search(
        trie,
        n_queries=len(prompts),
        k=k,
        width=width,
        normalise=normalise,
        allowed=allowed,
        budget=budget,
        prior=prior,
        eta=eta,
    )
    with scorer.session(prompts, normalise) as session:
        answer: Any = None
        try:
            while True:
                answer = session.score(steps.send(answer))
        except StopIteration as stop:
            return list(stop.value)


async def arecall(
    scorer: AsyncScorer,
    trie: Trie | LiveTrie,
    prompts: Sequence[Prompt],
    *,
    k: int,
    width: int | None = None,
    normalise: Normalise = Normalise.CHILDREN,
    allowed: LeafFilter | None = None,
    budget: int | None = 0,
    prior: TriePrior | None = None,
    eta: float = 0.0,
) -> list[Ranking]:
    """`recall` for an event loop: the same steps, each awaited."""
    steps = search(
        trie,
        n_queries=len(prompts),
        k=k,
        width=width,
        normalise=normalise,
        allowed=allowed,
        budget=budget,
        prior=prior,
        eta=eta,
    )
    async with scorer.async_session(prompts, normalise) as session:
        answer: Any = None
        while True:
            try:
                rows = steps.send(answer)
            except StopIteration as stop:
                return list(stop.value)
            answer = await session.score(rows)
