"""The trained model and the index's encoder as one scorer: a log-linear blend of the two at every node.

    log p(child | node, query) = w * log p_model + (1 - w) * log p_encoder + constant

The model's probability of an image that it has not learned is the encoder's. `model_weight=1` is the model alone.
Depends on sessions of two scorers and, for `Blender`, on the index; independent of torch.

Source: logarithmic opinion pools (Genest and Zidek 1986), applied to the next symbol instead of whole images.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import NotTrained, SearchError
from llama_index_genret.models.encoder import Encoder
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Scorer, Scores, Session
from llama_index_genret.scorers.encoder import EncoderScorer, EncoderSession
from llama_index_genret.scorers.rerank import Continuation, Float64
from llama_index_genret.search import Normalise, Rows
from llama_index_genret.store import Index, Scoring
from llama_index_genret.store.model_state import unseen_rows
from llama_index_genret.store.scoring import DEFAULT_TEMPERATURE
from llama_index_genret.trie import LeafFilter

Int64 = NDArray[np.int64]


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
            yield _BlendSession(self._blending(prompts), session) if self._blends(prompts, normalise) else session

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """See `Scorer.async_session`: both score at the same time, the encoder in a thread."""
        async with self.model.async_session(prompts, normalise) as session:
            yield _AsyncBlendSession(self._blending(prompts), session) if self._blends(prompts, normalise) else session

    def _blends(self, prompts: Sequence[Prompt], normalise: Normalise) -> bool:
        readable = all(map(self.encoder.reads, prompts))
        return readable and normalise is Normalise.CHILDREN and (self.model_weight < 1.0 or self.learned is not None)

    def _blending(self, prompts: Sequence[Prompt]) -> _Blending:
        return _Blending(self.model_weight, EncoderSession(self.encoder, prompts), self.learned)


class _Blending:
    """Combines the scores of one search.

    The model says how the share of the images that it has learned is divided among them. Let A(node) be the part of
    that share below a node, and U(node) the encoder's probability of the other images below:

        A(root)  = the encoder's probability of all learned images
        A(child) = A(node) * softmax(model's logits over the children with a learned image)
        log p(child | node) = w * log(A(child) + U(child)) + (1 - w) * log p_encoder(child) + constant

    So the model's probability of an image that it has not learned is the encoder's, wherever it lies in the tree.
    """

    def __init__(self, model_weight: float, encoder: EncoderSession, learned: LeafFilter | None) -> None:
        self._weight, self._encoder, self._learned = model_weight, encoder, learned
        self._log_shares: dict[tuple[int, tuple[int, ...]], tuple[Int64, Float64]] = {}

    def embed(self, rows: Rows) -> tuple[Float64, Float64 | None]:
        """Return (m,) log sums of the encoder below each child: over all images, and over those not learned."""
        unlearned = None if self._learned is None else self._encoder.score(rows, without=self._learned)
        return self._encoder.score(rows), unlearned

    def combine(self, rows: Rows, by_model: Scores, by_encoder: tuple[Float64, Float64 | None]) -> Scores:
        """Return (m,) float64 scores of the children of each row, a constant per row away from log p."""
        model, (encoder, unlearned) = np.asarray(by_model, np.float64), by_encoder
        if self._learned is not None and rows.expansion is not None and unlearned is not None:
            below = rows.expansion.allowed(self._learned)
            shares = _log_softmax(np.where(below, model, -np.inf), rows.offsets)
            shares += np.repeat(self._shares_of(rows, self._learned), np.diff(rows.offsets))
            self._keep(rows, shares)
            model = np.logaddexp(shares, unlearned)
        return self._weight * model + (1.0 - self._weight) * encoder

    def _shares_of(self, rows: Rows, learned: LeafFilter) -> Float64:
        """Return (n,) log A of the node of each row. A node without a row is the only child of its parent."""
        shares = np.empty(len(rows))
        for place, (query, prefix) in enumerate(_keys(rows)):
            for depth in range(len(prefix) - 1, -1, -1):
                if known := self._log_shares.get((query, prefix[:depth])):
                    tokens, log_shares = known
                    shares[place] = log_shares[np.searchsorted(tokens, prefix[depth])]
                    break
            else:
                shares[place] = self._encoder.log_total(learned)[query]
        return shares

    def _keep(self, rows: Rows, log_shares: Float64) -> None:
        ends = rows.offsets.tolist()
        for place, key in enumerate(_keys(rows)):
            own = slice(ends[place], ends[place + 1])
            self._log_shares[key] = rows.token_ids[own], log_shares[own]


def _keys(rows: Rows) -> list[tuple[int, tuple[int, ...]]]:
    prefixes = (tuple(token for token in prefix if token >= 0) for prefix in rows.prefixes.tolist())
    return list(zip(rows.query.tolist(), prefixes, strict=True))


@dataclass(frozen=True)
class _BlendSession:
    blending: _Blending
    model: Session

    def score(self, rows: Rows) -> Scores:
        return self.blending.combine(rows, self.model.score(rows), self.blending.embed(rows))

    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        return self.model.log_likelihoods(continuations)


@dataclass(frozen=True)
class _AsyncBlendSession:
    blending: _Blending
    model: AsyncSession

    async def score(self, rows: Rows) -> Scores:
        by_model, by_encoder = await asyncio.gather(
            self.model.score(rows), asyncio.to_thread(self.blending.embed, rows)
        )
        return self.blending.combine(rows, by_model, by_encoder)

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
        entry = index.manifest.encoder
        self._folder, self._name = index.folder, None if entry is None else entry.name
        self._encoder: EncoderScorer | None = None
        self._learned: LeafFilter | None = None
        if encoder is None or index.vectors is None:
            return
        self._encoder = EncoderScorer(encoder, index.trie, index.vectors, temperature=DEFAULT_TEMPERATURE)
        if index.is_trained and (unseen := unseen_rows(index)):
            learned = np.ones(len(index.records), np.bool_)
            learned[unseen] = False
            self._learned = index.leaf_filter_of(learned)

    @property
    def lacks_encoder(self) -> bool:
        """Tell whether the index has an encoder, but this blender was made without one."""
        return self._name is not None and self._encoder is None

    def scoring_of(self, scoring: Scoring, model: Scorer | None, prompts: Sequence[Prompt] = ()) -> Scoring:
        """Return the scoring with the `model_weight` that a search for these prompts has.

        It is 0 without a model. It is 1 without an encoder, and for queries that the encoder cannot embed.
        """
        if self._encoder is None or (model is not None and not all(map(self._encoder.reads, prompts))):
            return replace(scoring, model_weight=1.0)
        return scoring if model is not None else replace(scoring, model_weight=0.0)

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
                    f"{self._folder}`, or {self._way_to_an_encoder()}."
                )
            return model
        encoder = self._encoder.at_temperature(scoring.temperature)
        if model is None or scoring.model_weight == 0.0:
            return encoder
        if scoring.model_weight == 1.0:
            return model
        return BlendScorer(model, encoder, scoring.model_weight, self._learned)

    def _way_to_an_encoder(self) -> str:
        if self._name is None:
            return "make the index with an encoder (`genret index --encoder`)"
        return f"give the encoder of the index, {self._name!r}, as encoder"


def _log_softmax(scores: Float64, offsets: NDArray[np.int64]) -> Float64:
    """Return the logarithm of the softmax over each segment."""
    counts = np.diff(offsets)
    top = np.maximum.reduceat(scores, offsets[:-1])
    top[np.isneginf(top)] = 0.0
    shifted = scores - np.repeat(top, counts)
    total = np.add.reduceat(np.exp(shifted), offsets[:-1])
    return np.asarray(shifted - np.repeat(np.log(total, where=total > 0, out=np.zeros_like(total)), counts))
