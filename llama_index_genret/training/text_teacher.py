"""What a teacher says of queries: how near each image's captions are to any query. Used while training only.

Knows captions and queries as text; nothing of images, identifiers or the model that learns.
Source: distillation of Hinton et al. (arXiv:1503.02531), on queries that nobody has to write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import TrainingError
from llama_index_genret.models.encoder import Float32, Progress, TextEncoder, embed_by_captions
from llama_index_genret.training.soft_targets import softmax_of_cosines

COMPARE_BATCH = 256
KEYWORD_LISTS = 16
"""Lists of keywords that are made up for each image."""
MOST_KEYWORDS = 6
KEYWORDS = 256
"""Words nearest to an image, of which its lists are made."""
NEAR = 0.05
"""Temperature at which an image's keywords are drawn."""


@dataclass(frozen=True)
class TextTeacher:
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
        """(n,) how likely each image is meant by a query."""
        return softmax_of_cosines(self.images, self.queries[query], self.temperature)

    def nearest_images(self) -> list[int]:
        """(q) the image that each query means most."""
        starts = range(0, len(self.queries), COMPARE_BATCH)
        parts = [(self.queries[start : start + COMPARE_BATCH] @ self.images.T).argmax(1) for start in starts]
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
) -> TextTeacher:
    """Embed images by their captions, and queries: the captions, `words`, lists of words near each image, `queries`.

    Where an image lies: `models.encoder.embed_by_captions`. Its made-up keywords are drawn by their nearness to it:
    common words that its captions may lack.

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
    reader = TextEncoder(encoder, device=device, progress=progress)
    images, known = embed_by_captions(reader, captions)
    others = [word for word in dict.fromkeys(words) if word not in known]
    known |= zip(others, reader.embed(others), strict=True)
    flat = list(known)
    lists = _keyword_lists(flat, np.stack([known[text] for text in flat]), images, seed=seed)
    more = [text for text in dict.fromkeys([*lists, *queries]) if text not in known]
    texts = (*flat, *more)
    return TextTeacher(texts, np.concatenate([np.stack(list(known.values())), reader.embed(more)]), images, temperature)


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
