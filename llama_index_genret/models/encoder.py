"""A text encoder: where captions, queries and images lie in its space.

Knows text and vectors; nothing of images but their captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import MissingExtra, TrainingError

ENCODE_BATCH = 256

Float32 = NDArray[np.float32]
Progress = Callable[[Iterable[Any]], Iterable[Any]]


class TextEncoder:
    """An encoder that `sentence-transformers` loads.

    Args:
        name: a local folder or a hub id.
    Raises:
        TrainingError: it does not load. MissingExtra: sentence-transformers is missing.
    """

    def __init__(self, name: str, *, device: str, progress: Progress = iter) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            needed = "a text encoder needs sentence-transformers: pip install 'llama-index-genret[train]'."
            raise MissingExtra(needed) from error
        try:
            self._model = SentenceTransformer(name, device=device)
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(
                f"{name!r} does not load as a text encoder: {error}. Name a folder or hub id of another."
            ) from error
        self.name, self._progress = name, progress

    def embed(self, texts: Sequence[str]) -> Float32:
        """(n, d) unit embeddings of n texts."""
        texts = [text.replace(", ", " ") for text in texts]  # encoders of sentences read lists better so
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        parts: list[Float32] = []
        for start in self._progress(range(0, len(texts), ENCODE_BATCH)):
            chosen = [texts[place] for place in order[start : start + ENCODE_BATCH]]
            parts.append(self._model.encode(chosen, normalize_embeddings=True, show_progress_bar=False))
        return np.concatenate(parts)[np.argsort(order)] if parts else np.zeros((0, 0), np.float32)


def embed_by_captions(encoder: TextEncoder, captions: Sequence[Sequence[str]]) -> tuple[Float32, dict[str, Float32]]:
    """(n, d) unit vectors of images, and (d,) of each caption.

    An image lies at the sum of the mean of its captions and of all of them as one text; one without any at 0.

    Args:
        captions: of every image; one has some at least.
    """
    flat = list(dict.fromkeys(caption for own in captions for caption in own))
    known = dict(zip(flat, encoder.embed(flat), strict=True))
    joined = iter(encoder.embed([" ".join(own) for own in captions if own]))
    images = np.zeros((len(captions), len(next(iter(known.values())))), np.float32)
    for row, own in enumerate(captions):
        if own:
            images[row] = unit(np.mean([known[caption] for caption in own], axis=0)) + next(joined)
    return unit(images), known


def unit(vectors: Float32) -> Float32:
    """Vectors (..., d) of length 1; 0 stays 0."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12), np.float32)
