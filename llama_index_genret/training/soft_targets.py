"""Soft targets: a distribution over images, as distributions over the next symbol at every level.

Depends on identifiers as token ids, sorted so that the images below a prefix are a range; independent of models and
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def softmax_of_cosines(
    images: NDArray[np.float32], query: NDArray[np.float32], temperature: float
) -> NDArray[np.float64]:
    """Return (n,) the softmax over n images of cosine / temperature.

    Args:
        images: (n, d) unit vectors.
        query: (d,) a unit vector.
        temperature: a low value puts all probability on the nearest image.
    """
    similarity = (images @ query).astype(np.float64) / temperature
    weights = np.exp(similarity - similarity.max())
    return np.asarray(weights / weights.sum(), np.float64)


@dataclass(frozen=True)
class SoftTarget:
    """The distribution of the symbol after a prefix of an identifier.

    depth: number of symbols in the prefix.
    columns: (children,) positions of the possible next symbols in `Paths.token_ids`.
    probabilities: (children,) float32, with sum 1.
    """

    depth: int
    columns: NDArray[np.int64]
    probabilities: NDArray[np.float32]


class Paths:
    """The identifiers of all images. `token_ids` (u,) int64 has all their distinct tokens, sorted.

    Args:
        identifiers: the identifier of every image, as token ids. None is a prefix of another.
    """

    def __init__(self, identifiers: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, identifiers))
        rows = np.full((len(identifiers), longest), -1, np.int64)
        for row, identifier in enumerate(identifiers):
            rows[row, : len(identifier)] = identifier
        self._order = np.lexsort(rows.T[::-1])
        self._sorted = rows[self._order]
        self._place = np.empty(len(rows), np.int64)
        self._place[self._order] = np.arange(len(rows))
        self.token_ids = np.unique(rows[rows >= 0])

    def targets(self, row: int, probabilities: NDArray[np.float64]) -> list[SoftTarget]:
        """Return the distribution of the next symbol at every prefix of image `row` with several continuations.

        Their cross-entropies, over images sampled from `probabilities`, sum to that of the distribution over images:

            p(image) = product over depth of p(symbol | prefix)

        Args:
            row: the row of an image with a probability above 0.
            probabilities: (n,) the probability of every image.
        """
        mass, path = probabilities[self._order], self._sorted[self._place[row]]
        lo, hi, targets = 0, len(mass), []
        for depth, token_id in enumerate(path[path >= 0]):
            column = self._sorted[lo:hi, depth]
            starts = np.flatnonzero(np.concatenate([[True], column[1:] != column[:-1]]))
            children = column[starts]
            if len(children) > 1:
                below = np.add.reduceat(mass[lo:hi], starts)
                columns = np.searchsorted(self.token_ids, children)
                targets.append(SoftTarget(depth, columns, (below / below.sum()).astype(np.float32)))
            child = int(np.searchsorted(children, token_id))
            ends = np.append(starts, hi - lo)
            lo, hi = lo + int(ends[child]), lo + int(ends[child + 1])
        return targets
