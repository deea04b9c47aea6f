"""The trained model and the index's encoder as one scorer: a log-linear blend of the two at every node.

    log p(child | node, query) = w * log p_model + (1 - w) * log p_encoder + constant

Where the model has not learnt an image, its share is the encoder's. `model_weight=1` is the model alone.
Depends on sessions of two scorers and, for `Blender`, on the index; independent of torch.

Source: logarithmic opinion pools (Genest and Zidek 1986), applied to the next symbol instead of whole images.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import NotTrained, SearchError
from llama_index_genret.models.encoder import Encoder
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Scorer, Scores, Session
from llama_index_genret.scorers.encoder import EncoderScorer
from llama_index_genret.scorers.rerank import Continuation, Float64
from llama_index_genret.search import Normalise, Rows
from llama_index_genret.store import Index, Scoring
from llama_index_genret.store.model_state import unseen_rows
from llama_index_genret.store.scoring import DEFAULT_TEMPERATURE
from llama_index_genret.trie import LeafFilter


@dataclass(frozen=True)
class BlendScorer:
    """Blends a model with an encoder over the valid children of each node.

    A query that the encoder cannot embed, such as an image for an encoder of texts, is scored by the model alone. So is
    a search under `Normalise.VOCABULARY`, since the encoder knows no tokens but the children.

    Args:
        model: scores next tokens. An `AsyncScorer` serves `arecall` only.
        model_weight: w, in (0, 1].
        learned: the leaves of the images that the model was trained on; None for all.
    Raises:
        SearchError: the weight is out of range.
    """

    model: Scorer
    encoder: EncoderScorer
    model_weight: float
    learned: LeafFilter | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.model_weight <= 1.0:
            raise SearchError(f"model_weight={self.model_weight} must be above 0 and at most 1.")

    @contextmanager
    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Iterator[Session]:
        """See `Scorer.session`."""
        with self.model.session(prompts, normalise) as session:
            if not self._blends(prompts, normalise):
                yield session
                return
            with self.encoder.session(prompts, normalise) as encoded:
                yield _BlendSession(self, session, encoded)

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """See `Scorer.async_session`: both score at the same time."""
        async with self.model.async_session(prompts, normalise) as session:
            if not self._blends(prompts, normalise):
                yield session
                return
            async with self.encoder.async_session(prompts, normalise) as encoded:
                yield _AsyncBlendSession(self, session, encoded)

    def _blends(self, prompts: Sequence[Prompt], normalise: Normalise) -> bool:
        readable = all(map(self.encoder.reads, prompts))
        return readable and normalise is Normalise.CHILDREN and (self.model_weight < 1.0 or self.learned is not None)

    def combine(self, rows: Rows, by_model: Scores, by_encoder: Scores) -> Scores:
        """Return (m,) float64 scores of the children of each row.

            for row in rows:
                p_model = p_encoder where no learned image lies below
                p_model = softmax(by_model over the other children) * (their sum of p_encoder)
                yield w * log p_model + (1 - w) * log p_encoder

        Args:
            by_model, by_encoder: (m,) scores of each, a constant per row away from log-probabilities.
        """
        encoder = _log_softmax(np.asarray(by_encoder, np.float64), rows.offsets)
        model = np.asarray(by_model, np.float64)
        if self.learned is None or rows.expansion is None:
            model = _log_softmax(model, rows.offsets)
        else:
            model = _with_unlearned(model, encoder, rows.expansion.allowed(self.learned), rows.offsets)
        return self.model_weight * model + (1.0 - self.model_weight) * encoder


@dataclass(frozen=True)
class _BlendSession:
    blend: BlendScorer
    model: Session
    encoder: Session

    def score(self, rows: Rows) -> Scores:
        return self.blend.combine(rows, self.model.score(rows), self.encoder.score(rows))

    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        return self.model.log_likelihoods(continuations)


@dataclass(frozen=True)
class _AsyncBlendSession:
    blend: BlendScorer
    model: AsyncSession
    encoder: AsyncSession

    async def score(self, rows: Rows) -> Scores:
        by_model, by_encoder = await asyncio.gather(self.model.score(rows), self.encoder.score(rows))
        return self.blend.combine(rows, by_model, by_encoder)

    async def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        return await self.model.log_likelihoods(continuations)


class Blender:
    """Makes the scorer that recalls from one version of an index: a blend, the model alone or the encoder alone.

    Args:
        encoder: that of the index; None to recall by the model alone.
    Raises:
        EncoderError: the encoder has another dimension than the index's vectors.
    """

    def __init__(self, index: Index, encoder: Encoder | None) -> None:
        self._folder, self._encoder, self._learned = index.folder, None, None
        if encoder is None or index.vectors is None:
            return
        self._encoder = EncoderScorer(encoder, index.trie, index.vectors, temperature=DEFAULT_TEMPERATURE)
        if index.is_trained and (unseen := unseen_rows(index)):
            learned = np.ones(len(index.records), np.bool_)
            learned[unseen] = False
            self._learned = index.leaf_filter_of(learned)

    def scorer(self, model: Scorer | None, scoring: Scoring) -> Scorer:
        """Return the scorer for a model and a scoring.

        Args:
            model: scores with the trained weights of the index; None for an index that was not trained.
        Raises:
            NotTrained: there is neither a model nor an encoder.
        """
        if self._encoder is None:
            if model is None:
                raise NotTrained(
                    f"{self._folder} has no trained weights yet, and no encoder to recall with: run `genret train "
                    f"{self._folder}`, or make the index with an encoder (`genret index --encoder`)."
                )
            return model
        encoder = self._encoder.at_temperature(scoring.temperature)
        if model is None or scoring.model_weight == 0.0:
            return encoder
        if scoring.model_weight == 1.0 and self._learned is None:
            return model
        return BlendScorer(model, encoder, scoring.model_weight, self._learned)


def _log_softmax(scores: Float64, offsets: NDArray[np.int64]) -> Float64:
    """Return the logarithm of the softmax over each segment."""
    counts = np.diff(offsets)
    top = np.maximum.reduceat(scores, offsets[:-1])
    top[np.isneginf(top)] = 0.0
    shifted = scores - np.repeat(top, counts)
    total = np.add.reduceat(np.exp(shifted), offsets[:-1])
    return np.asarray(shifted - np.repeat(np.log(total, where=total > 0, out=np.zeros_like(total)), counts))


def _with_unlearned(
    model: Float64, encoder: Float64, learned: NDArray[np.bool_], offsets: NDArray[np.int64]
) -> Float64:
    """Return log p of the model, of which children without a learned image below take the encoder's."""
    if learned.all():
        return _log_softmax(model, offsets)
    share = np.add.reduceat(np.where(learned, np.exp(encoder), 0.0), offsets[:-1])
    log_share = np.log(share, where=share > 0, out=np.full_like(share, -np.inf))
    among = _log_softmax(np.where(learned, model, -np.inf), offsets)
    return np.where(learned, among + np.repeat(log_share, np.diff(offsets)), encoder)
