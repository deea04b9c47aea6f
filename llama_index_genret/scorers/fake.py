"""Score without a model: deterministic and table-driven, for tests and documentation.

Independent of models. You may use it in your own tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import numpy as np

from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Scores, Session
from llama_index_genret.scorers.rerank import Continuation, Float64
from llama_index_genret.search import Normalise, Rows


@dataclass(frozen=True)
class FakeScorer:
    """A scorer whose logits come from a hash of prompt and prefix, unless a table overrides them.

    vocab_size: number of tokens.
    seed: seed of the hash, default 0.
    spread: standard deviation of the hash's logits, default 1.
    table: (prompt token ids, identifier prefix) -> {token id: logit}; overrides the hash's logits, default empty.
    """

    vocab_size: int
    seed: int = 0
    spread: float = 1.0
    table: Mapping[tuple[tuple[int, ...], tuple[int, ...]], Mapping[int, float]] = field(default_factory=dict)

    def logits(self, prompt: Prompt, prefix: tuple[int, ...]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return (vocab_size,) float64 logits of all next tokens."""
        key = repr((self.seed, prompt.token_ids, str(prompt.image or ""), prefix)).encode()
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:8], "little"))
        logits = rng.normal(scale=self.spread, size=self.vocab_size)
        for token, logit in self.table.get((prompt.token_ids, prefix), {}).items():
            logits[token] = logit
        return logits

    @contextmanager
    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Iterator[Session]:
        """See `Scorer.session`."""
        yield _FakeSession(self, tuple(prompts), normalise)

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """See `Scorer.async_session`."""
        yield _AsyncFakeSession(_FakeSession(self, tuple(prompts), normalise))


@dataclass(frozen=True)
class _FakeSession:
    scorer: FakeScorer
    prompts: tuple[Prompt, ...]
    normalise: Normalise

    def score(self, rows: Rows) -> Scores:
        scores = []
        for row in rows:
            logits = self.scorer.logits(self.prompts[row.query], row.prefix)
            if self.normalise is Normalise.VOCABULARY:
                logits = logits - np.logaddexp.reduce(logits)
            scores.append(logits[row.token_ids])
        return np.concatenate(scores)

    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        return np.array([self._log_likelihood(one) for one in continuations])

    def _log_likelihood(self, one: Continuation) -> float:
        logits = [self.scorer.logits(one.prompt, one.token_ids[:place]) for place in range(len(one.token_ids))]
        return sum(
            float(row[token] - np.logaddexp.reduce(row)) for row, token in zip(logits, one.token_ids, strict=True)
        )


@dataclass(frozen=True)
class _AsyncFakeSession:
    sync: _FakeSession

    async def score(self, rows: Rows) -> Scores:
        return self.sync.score(rows)

    async def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        return self.sync.log_likelihoods(continuations)
