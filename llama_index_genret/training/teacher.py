"""A text encoder as a teacher: how near each image's captions are to any query. Used while training only.

Knows captions and queries as text; nothing of images, identifiers or the model that learns.
Source: distillation of Hinton et al. (arXiv:1503.02531), on queries that nobody has to write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import MissingExtra, TrainingError

ENCODED_TOGETHER = 256
KEYWORD_LISTS = 16
"""Lists of keywords that are made up for each image."""
MOST_KEYWORDS = 6
KEYWORDS = 256
"""Words nearest to an image, of which its lists are made."""
NEAR = 0.05
"""Temperature at which an image's keywords are drawn."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Teacher:
    """What the teacher is asked, and where in its space queries and images lie.

    texts: (q) queries; queries: (q, d) their unit embeddings; images: (n, d) unit embeddings of the images' captions,
    0 of an image without any, which is meant by no query in particular.
    temperature: of the distribution over images: low means only the nearest.
    """

    texts: tuple[str, ...]
    queries: Float32
    images: Float32
    temperature: float

    def probabilities(self, query: int) -> NDArray[np.float64]:
        """(n,) how likely each image is meant by a query: softmax of cosines."""
        similarity = (self.images @ self.queries[query]).astype(np.float64) / self.temperature
        raised = np.exp(similarity - similarity.max())
        return np.asarray(raised / raised.sum(), np.float64)

    def meant(self) -> list[int]:
        """(q) the image that each query means most."""
        starts = range(0, len(self.queries), ENCODED_TOGETHER)
        parts = [(self.queries[start : start + ENCODED_TOGETHER] @ self.images.T).argmax(1) for start in starts]
        return [int(row) for part in parts for row in part]


def teach(
    encoder: str,
    captions: Sequence[Sequence[str]],
    *,
    words: Sequence[str],
    queries: Sequence[str] = (),
    temperature: float,
    seed: int,
    device: str,
    progress: Progress = iter,
) -> Teacher:
    """Embed images by their captions, and queries: the captions, `words`, lists of words near each image, `queries`.

    An image lies at the sum of the mean of its captions and of all of them as one text. Its made-up keywords are
    drawn by their nearness to it: common words that its captions may lack.

    Args:
        encoder: a local folder or hub id that `sentence-transformers` loads.
        captions: of every image.
    Raises:
        TrainingError: it does not load, there is one image only, or none has a caption. MissingExtra:
            sentence-transformers is missing.
    """
    if len(captions) < 2:
        raise TrainingError("a teacher tells images apart, and the index has one alone. Leave the teacher out.")
    if not any(captions):
        raise TrainingError("a teacher needs captions: no image of the index has one. Leave the teacher out.")
    embed = _encoder(encoder, device, progress)
    flat = list(dict.fromkeys([*(caption for own in captions for caption in own), *words]))
    known = dict(zip(flat, embed(flat), strict=True))
    joined = iter(embed([" ".join(own) for own in captions if own]))
    images = np.zeros((len(captions), len(next(iter(known.values())))), np.float32)
    for row, own in enumerate(captions):
        if own:
            images[row] = _unit(np.mean([known[caption] for caption in own], axis=0)) + next(joined)
    images = _unit(images)
    lists = _keyword_lists(flat, np.stack([known[text] for text in flat]), images, seed=seed)
    more = [text for text in dict.fromkeys([*lists, *queries]) if text not in known]
    texts = (*flat, *more)
    return Teacher(texts, np.concatenate([np.stack(list(known.values())), embed(more)]), images, temperature)


def _encoder(name: str, device: str, progress: Progress) -> Callable[[Sequence[str]], Float32]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtra("a teacher needs sentence-transformers: pip install 'llama-index-genret[train]'.") from error
    try:
        model = SentenceTransformer(name, device=device)
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"the teacher {name!r} does not load as a text encoder: {error}") from error

    def embed(texts: Sequence[str]) -> Float32:
        texts = [text.replace(", ", " ") for text in texts]  # encoders of sentences read lists better so
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        parts: list[Float32] = []
        for start in progress(range(0, len(texts), ENCODED_TOGETHER)):
            chosen = [texts[place] for place in order[start : start + ENCODED_TOGETHER]]
            parts.append(model.encode(chosen, normalize_embeddings=True, show_progress_bar=False))
        return np.concatenate(parts)[np.argsort(order)] if parts else np.zeros((0, 0), np.float32)

    return embed


def _keyword_lists(words: Sequence[str], embeddings: Float32, images: Float32, *, seed: int) -> Iterator[str]:
    for row, image in enumerate(images):
        if image.any():
            draw = np.random.default_rng((seed, row))
            similarity = (embeddings @ image).astype(np.float64)
            near = np.argsort(-similarity, kind="stable")[:KEYWORDS]
            likely = np.exp((similarity[near] - similarity[near[0]]) / NEAR)
            likely /= likely.sum()
            for _ in range(KEYWORD_LISTS):
                n_words = int(draw.integers(1, min(MOST_KEYWORDS, len(near)), endpoint=True))
                chosen = draw.choice(near, n_words, replace=False, p=likely)
                yield str(draw.choice([" ", ", "])).join(words[place] for place in chosen)


def _unit(vectors: Float32) -> Float32:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12), np.float32)
