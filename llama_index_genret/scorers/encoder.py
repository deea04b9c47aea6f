"""A scorer without a language model: the index's encoder says how near each image is to a query.

    p(image | query) = softmax over the images of cosine(query, image) / temperature
    p(node | query)  = sum of p(image | query) over the leaves below the node

So an index recalls before any training, with the same search, filters, edits and certificates as a trained one.
Depends on the trie and unit vectors; independent of torch, tokenizers and of how vectors are stored.

Source: dense retrieval with sentence embeddings (Sentence-BERT, arXiv:1908.10084), as a distribution over a trie.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import EncoderError, QueryError, SearchError
from llama_index_genret.models.encoder import Encoder, unit
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Session, ThreadSession
from llama_index_genret.scorers.rerank import Continuation, Float64
from llama_index_genret.search import Normalise, Rows
from llama_index_genret.store.scoring import MIN_TEMPERATURE
from llama_index_genret.trie import LeafFilter, LiveTrie, child_masses

CACHED_BYTES = 2**29
"""Vectors are kept in float32 up to this size. Larger ones are widened in blocks, at every query."""

BLOCK_ROWS = 1024
"""A block of float32 vectors fits the cache of a processor core."""

Float32 = NDArray[np.float32]


class EncoderScorer:
    """Scores nodes of a trie by the cosines between a query and the images below. Safe to share between threads.

    Args:
        encoder: embeds queries, and images where it can.
        trie: the one that is searched.
        vectors: (records, d) float16 or float32 unit vectors, in the order of the trie's keys.
        temperature: low means only the nearest image; at least `MIN_TEMPERATURE`.
    Raises:
        EncoderError: dimensions differ. SearchError: the temperature is out of range.
    """

    def __init__(self, encoder: Encoder, trie: LiveTrie, vectors: NDArray[Any], *, temperature: float) -> None:
        if vectors.shape[1] != encoder.dimension:
            raise EncoderError(
                f"the encoder {encoder.name!r} has {encoder.dimension} dimensions, the index's vectors have "
                f"{vectors.shape[1]}. Load the encoder that the index was made with."
            )
        self.encoder, self.temperature = encoder, _checked(temperature)
        self._vectors = vectors.astype(np.float32) if 4 * vectors.size <= CACHED_BYTES else vectors
        leaves = np.arange(trie.n_leaves)
        live = True if trie.live is None else trie.live.contains(leaves)
        self._row = trie.key(leaves)
        self._removed = np.flatnonzero(~(live & (self._row >= 0)))

    def at_temperature(self, temperature: float) -> EncoderScorer:
        """Return a scorer of another temperature that shares the vectors."""
        other = copy.copy(self)
        other.temperature = _checked(temperature)
        return other

    def reads(self, prompt: Prompt) -> bool:
        """Return whether the encoder can embed the query of a prompt: a text, or an image if it embeds images."""
        return self.encoder.embeds_images if prompt.image is not None else bool(prompt.query)

    @contextmanager
    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Iterator[Session]:
        """See `Scorer.session`. Scores do not depend on `normalise`: the encoder knows no tokens but the children."""
        yield EncoderSession(self, prompts)

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """See `Scorer.async_session`: embeds and scores in a thread."""
        yield ThreadSession(EncoderSession(self, prompts), threading.Lock())

    def embed(self, prompts: Sequence[Prompt]) -> Float32:
        """Return (n, d) unit vectors of the queries of prompts; an image with a text lies between the two.

        Raises:
            QueryError: a query is an image, and the encoder embeds texts only.
        """
        unread = [prompt for prompt in prompts if not self.reads(prompt)]
        if unread:
            kind = "an image" if unread[0].image is not None else "empty"
            raise QueryError(
                f"the query is {kind}, and the encoder {self.encoder.name!r} embeds texts only. Recall with a trained "
                "model (`genret train`), or make the index with a CLIP-like encoder."
            )
        texts = self.encoder.embed_queries([prompt.query or "?" for prompt in prompts])
        images = [prompt.image for prompt in prompts if prompt.image is not None]
        seen = iter(self.encoder.embed_images([load_image(image) for image in images]) if images else ())
        rows = [
            text if prompt.image is None else unit(next(seen) + (text if prompt.query else 0.0))
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return np.stack(rows)

    def leaf_weights(self, queries: Float32) -> Float64:
        """Return (queries, n_leaves + 1) float64, proportional to p(image | query); 0 for removed leaves.

        Args:
            queries: (queries, d) float32 unit vectors.
        """
        weights = np.zeros((len(queries), len(self._row) + 1))
        leaves = weights[:, :-1]
        leaves[...] = self._cosines(queries)[:, self._row]  # row -1 of a removed leaf: any vector
        leaves -= leaves.max(axis=1, keepdims=True)
        leaves /= self.temperature
        np.exp(leaves, out=leaves)
        leaves[:, self._removed] = 0.0
        return weights

    def _cosines(self, queries: Float32) -> Float32:
        if self._vectors.dtype == np.float32:
            return np.asarray(queries @ self._vectors.T)
        cosines = np.empty((len(queries), len(self._vectors)), np.float32)
        block = np.empty((BLOCK_ROWS, self._vectors.shape[1]), np.int32)
        for start in range(0, len(self._vectors), BLOCK_ROWS):
            part = self._vectors[start : start + BLOCK_ROWS]
            np.matmul(queries, widen(part, block[: len(part)]).T, out=cosines[:, start : start + len(part)])
        return cosines


def widen(half: NDArray[Any], into: NDArray[np.int32]) -> Float32:
    """Return finite float16 values as float32, in the memory of `into`; several times as fast as `astype`.

    Sign, exponent and mantissa move to their places. The factor corrects the exponent, of subnormal numbers, too.
    """
    np.copyto(into, half.view(np.int16))  # extends the sign
    np.left_shift(into, 13, out=into)
    np.bitwise_and(into, np.int32(-0x7000_2000), out=into)  # 0x8fff_e000: the sign, and what was moved
    wide = into.view(np.float32)
    wide *= np.float32(2.0**112)
    return wide


def _checked(temperature: float) -> float:
    if not MIN_TEMPERATURE <= temperature < np.inf:
        raise SearchError(f"temperature={temperature} must be at least {MIN_TEMPERATURE}, and finite.")
    return temperature


class EncoderSession:
    """The queries of one search as weights of all leaves, computed at the first step."""

    def __init__(self, scorer: EncoderScorer, prompts: Sequence[Prompt]) -> None:
        self._scorer, self._prompts = scorer, prompts
        self._without: tuple[LeafFilter, Float64] | None = None

    def score(self, rows: Rows, *, without: LeafFilter | None = None) -> Float64:
        """Return (m,) float64 log sums of p(image | query) below each child, a constant per query away.

        Args:
            without: leaves that are not summed. A child that has no others gets -inf. Default None: all are summed.
        """
        if rows.expansion is None:
            raise SearchError("the encoder scores nodes of its trie: only a search makes such rows.")
        weights = self._weights if without is None else self._weights_without(without)
        masses = child_masses(rows.expansion, weights, rows.query)
        return np.log(masses, where=masses > 0, out=np.full_like(masses, -np.inf))

    def log_total(self, leaves: LeafFilter) -> Float64:
        """Return (queries,) the log sum over the given leaves, away from log p by the constants of `score`."""
        chosen = leaves.contains(np.arange(leaves.n_leaves))
        return np.asarray(np.log(self._weights[:, :-1].sum(axis=1, where=chosen)))

    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        """Raise QueryError: an encoder gives no probability of words."""
        raise QueryError("re-ranking needs a trained model, and the index recalls by its encoder. Leave rerank out.")

    @cached_property
    def _weights(self) -> Float64:
        return self._scorer.leaf_weights(self._scorer.embed(self._prompts))

    def _weights_without(self, leaves: LeafFilter) -> Float64:
        if self._without is None or self._without[0] is not leaves:
            weights = self._weights.copy()
            weights[:, :-1][:, leaves.contains(np.arange(leaves.n_leaves))] = 0.0
            self._without = leaves, weights
        return self._without[1]
