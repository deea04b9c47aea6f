"""A text encoder as teacher: the similarity of each image's captions to any query. Used while training only.

Depends on captions and queries as text; independent of images, identifiers and the trained model.
Source: distillation of Hinton et al. (arXiv:1503.02531), on generated queries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import TrainingError
from llama_index_genret.models.encoder import Encoder, Float32, Progress
from llama_index_genret.store import text_key
from llama_index_genret.training.soft_targets import softmax_of_cosines

COMPARE_BATCH = 256
KEYWORD_LISTS = 16
"""Keyword lists generated per image."""
MOST_KEYWORDS = 6
"""Maximum length of a keyword list."""
KEYWORDS = 256
"""Number of words nearest to an image from which its keyword lists are sampled."""
NEAR = 0.05
"""Temperature at which an image's keywords are sampled."""


@dataclass(frozen=True)
class TextTeacher:
    """The teacher's queries, and the embeddings of queries and images.

    texts: (q) queries.
    queries: (q, d) unit embeddings of `texts`.
    images: (n, d) unit embeddings of the images' captions. An image without captions has the zero vector, so that its
        similarity to every query is 0.
    temperature: temperature of the distribution over images. A low value puts all probability on the nearest image.
    """

    texts: tuple[str, ...]
    queries: Float32
    images: Float32
    temperature: float

    def probabilities(self, query: int) -> NDArray[np.float64]:
        """Return (n,) the probability that each image is the target of a query, given by its number in `texts`."""
        return softmax_of_cosines(self.images, self.queries[query], self.temperature)

    def nearest_images(self) -> list[int]:
        """Return (q) the row of the most probable image of each query."""
        starts = range(0, len(self.queries), COMPARE_BATCH)
        parts = [(self.queries[start : start + COMPARE_BATCH] @ self.images.T).argmax(1) for start in starts]
        return [int(row) for part in parts for row in part]


def teach(
    encoder: Encoder,
    images: Float32,
    captions: Sequence[Sequence[str]],
    *,
    words: Sequence[str],
    queries: Sequence[str] = (),
    held_out: Collection[str] = (),
    temperature: float,
    seed: int,
    progress: Progress = iter,
) -> TextTeacher:
    """Embed the queries to imitate: the captions, `words`, keyword lists per image and `queries`.

    Keywords are sampled by their similarity to the image, so that a list may hold common words that the captions lack.

    Args:
        images: (n, d) float32 vectors of the index, 0 for an image without one.
        captions: captions of every image.
        held_out: `text_key` of texts that are not imitated.
    Raises:
        TrainingError: there is only one image, or no image has a vector.
    """
    if len(images) < 2:
        raise TrainingError(
            "the task imitate needs at least 2 images to compare, and the index has 1: train with --mix retrieve=1."
        )
    if not images.any():
        raise TrainingError(
            "no image of the index has a vector, since none has a caption and the encoder embeds texts only. Give "
            "captions, or train without the task imitate (--mix)."
        )

    def allowed(texts: Iterable[str]) -> list[str]:
        return [text for text in dict.fromkeys(texts) if text_key(text) not in held_out]

    flat = allowed([*(caption for own in captions for caption in own), *words])
    vectors = encoder.embed_queries(flat, progress)
    lists = _keyword_lists(flat, vectors, images, seed=seed)
    known = frozenset(flat)
    more = [text for text in allowed([*lists, *queries]) if text not in known]
    return TextTeacher(
        (*flat, *more), np.concatenate([vectors, encoder.embed_queries(more, progress)]), images, temperature
    )


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
