"""A distribution over images as distributions over the next symbol: what a model is to say at every level.

Knows identifiers as token ids, sorted, so that the images below a prefix are a range; nothing of models or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def softmax_of_cosines(
    images: NDArray[np.float32], query: NDArray[np.float32], temperature: float
) -> NDArray[np.float64]:
    """(n,) how likely each of n images is meant by a query: softmax of cosine / temperature.

    Args:
        images: (n, d), query: (d,), unit vectors.
        temperature: low means only the nearest.
    """
    similarity = (images @ query).astype(np.float64) / temperature
    raised = np.exp(similarity - similarity.max())
    return np.asarray(raised / raised.sum(), np.float64)


@dataclass(frozen=True)
class SoftTarget:
    """After `depth` symbols of an identifier: which may follow, and with which probability.

    columns: (children,) places among `Paths.token_ids`; probabilities: (children,) float32, of sum 1.
    """

    depth: int
    columns: NDArray[np.int64]
    probabilities: NDArray[np.float32]


class Paths:
    """The identifiers of all images. `token_ids` (u,) int64: every token in one of them, sorted.

    Args:
        identifiers: of every image, token ids; none begins another.
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
        """The distribution of the next symbol at every prefix of image `row` where several may follow.

        Their cross-entropies, over images drawn from `probabilities`, add up to that of the distribution over images:

            p(image) = product over depth of p(symbol | prefix)

        Args:
            probabilities: (n,) of every image; more than 0 for `row`.
        """
        mass, path = probabilities[self._order], self._sorted[self._place[row]]
        lo, hi, found = 0, len(mass), []
        for depth, token_id in enumerate(path[path >= 0]):
            column = self._sorted[lo:hi, depth]
            starts = np.flatnonzero(np.concatenate([[True], column[1:] != column[:-1]]))
            children = column[starts]
            if len(children) > 1:
                below = np.add.reduceat(mass[lo:hi], starts)
                columns = np.searchsorted(self.token_ids, children)
                found.append(SoftTarget(depth, columns, (below / below.sum()).astype(np.float32)))
            child = int(np.searchsorted(children, token_id))
            ends = np.append(starts, hi - lo)
            lo, hi = lo + int(ends[child]), lo + int(ends[child + 1])
        return found
