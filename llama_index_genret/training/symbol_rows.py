"""Where the rows of new symbols start: at what they stand for, as vectors of the images that bear them.

Knows identifiers as token ids, and vectors; nothing of models but their matrix of rows.
Source: centroids as start values, after GRACE's atomic classes (arXiv:2402.10805), whose rows are image embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

NOISE = 0.2
"""Share of noise in a row's direction."""


@torch.no_grad()
def start_rows(
    weight: torch.Tensor,
    rows: Sequence[int],
    *,
    seed: int,
    identifiers: Sequence[Sequence[int]] = (),
    vectors: NDArray[np.float32] | None = None,
) -> None:
    """Give new symbols rows that are spread like the trained ones, in place: equal rows learn nothing apart.

        centroid = mean of the unit vectors of the images that bear the symbol, less that of all images
        row = mean of the trained rows + (unit(random projection of the centroid) + a little noise) * their deviation

    A random projection keeps the angles between centroids; the noise parts those of equal images. Symbols that no
    image bears start as noise, as all do without vectors.

    Args:
        weight: (vocabulary, d) embeddings or LM head; rows: token ids of the new symbols, after all trained ones.
        identifiers: of every image, token ids. vectors: (images, v) of any scale.
    """
    if not rows:
        return
    trained = weight[: min(rows)].float()
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn((len(rows), weight.shape[1]), generator=generator)
    if vectors is not None:
        centroids, borne = _centroids(rows, identifiers, vectors)
        projection = torch.randn((vectors.shape[1], weight.shape[1]), generator=generator)
        projected = torch.from_numpy(centroids) @ projection
        projected *= weight.shape[1] ** 0.5 / projected.norm(dim=-1, keepdim=True)
        directions[borne] = ((1 - NOISE**2) ** 0.5 * projected + NOISE * directions)[borne]
    weight[rows] = (trained.mean(0) + directions.to(weight.device) * trained.std(0)).to(weight.dtype)


def _centroids(
    rows: Sequence[int], identifiers: Sequence[Sequence[int]], vectors: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(rows, v) centred means of the images of each symbol, and (rows,) whether it is more than nothing."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit = unit - unit.mean(0)
    place = {token_id: number for number, token_id in enumerate(rows)}
    sums = np.zeros((len(rows), vectors.shape[1]), np.float32)
    for identifier, vector in zip(identifiers, unit, strict=True):
        for token_id in set(identifier) & place.keys():
            sums[place[token_id]] += vector
    return sums, np.linalg.norm(sums, axis=1) > 1e-6
