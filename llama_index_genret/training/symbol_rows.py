"""Where the rows of new symbols start: at what they stand for, as vectors of the images that bear them.

Knows identifiers as token ids, and vectors; nothing of models but their matrix of rows and their hidden states.
Source: centroids as start values, after GRACE's atomic classes (arXiv:2402.10805), whose rows are image embeddings;
a linear probe before fine-tuning, so that features are not spoiled for random rows (arXiv:2202.10054).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

NOISE = 0.2
"""Share of noise in a row's direction."""

RIDGE = 0.01
"""Of `fitted_projection`, as a share of the mean squared feature."""

Float32 = NDArray[np.float32]


def fitted_projection(hidden: Float32, targets: Float32, *, scale: float) -> Float32:
    """(v, d): reads hidden states as a teacher's embeddings, so that a row may start at what its images' vectors say.

        min over A of |hidden A - targets|^2 + ridge |A|^2    and then    projection = scale * A transposed

    Args:
        hidden: (n, d) what the LM head reads at the end of n queries' prompts; targets: (n, v) the queries by the
            teacher; scale: of the logits, 1 / temperature.
    """
    spread = np.maximum(hidden.std(0), 1e-6)
    features = (hidden / spread).astype(np.float64)
    gram = features.T @ features
    gram[np.diag_indices_from(gram)] += RIDGE * len(features)
    solution = np.linalg.solve(gram, features.T @ (targets - targets.mean(0)))
    return np.asarray(scale * (solution / spread[:, None]).T, np.float32)


@torch.no_grad()
def start_rows(
    weight: torch.Tensor,
    rows: Sequence[int],
    *,
    seed: int,
    identifiers: Sequence[Sequence[int]] = (),
    vectors: Float32 | None = None,
    projection: Float32 | None = None,
) -> None:
    """Give new symbols rows that are spread like the trained ones, in place: equal rows learn nothing apart.

        offset = mean over the images that bear the symbol: unit vector - mean of all images
        row = mean of the trained rows + (unit(random projection of the offset) + a little noise) * their deviation

    A random projection keeps the angles between offsets; the noise parts those of equal images. With a fitted one,

        offset = mean over the images that bear the symbol: unit vector - mean of those that it is chosen among
        row = mean of the trained rows + offset @ projection

    where the images that a symbol is chosen among share those before it, or if it is the only one that may follow, are
    those of the last choice. Symbols that no image bears start as noise, as all do without vectors.

    Args:
        weight: (vocabulary, d) embeddings or LM head; rows: token ids of the new symbols, after all trained ones.
        identifiers: of every image, token ids. vectors: (images, v) of any scale. projection: (v, d), see
            `fitted_projection`.
    """
    if not rows:
        return
    trained = weight[: min(rows)].float()
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn((len(rows), weight.shape[1]), generator=generator) * trained.std(0).cpu()
    if vectors is not None:
        said, borne = _offsets(rows, identifiers, vectors, by_choice=projection is not None)
        if projection is not None:
            offsets[borne] = torch.from_numpy(said @ projection)[borne]
        else:
            chance = torch.randn((vectors.shape[1], weight.shape[1]), generator=generator)
            projected = torch.from_numpy(said) @ chance
            projected *= weight.shape[1] ** 0.5 / projected.norm(dim=-1, keepdim=True)
            offsets[borne] = ((1 - NOISE**2) ** 0.5 * projected * trained.std(0).cpu() + NOISE * offsets)[borne]
    weight[rows] = (trained.mean(0) + offsets.to(weight.device)).to(weight.dtype)


def _offsets(
    rows: Sequence[int], identifiers: Sequence[Sequence[int]], vectors: NDArray[np.float32], *, by_choice: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(rows, v) what each symbol says of its images, see `start_rows`, and (rows,) whether it is more than nothing.

    Args:
        by_choice: less the mean of those that it is chosen among, not of all images.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    place = {token_id: number for number, token_id in enumerate(rows)}
    sums, bearers = np.zeros((len(rows), vectors.shape[1]), np.float32), np.zeros(len(rows), np.float32)
    nodes = [(list(range(len(identifiers))), 0, unit.mean(0))]
    while nodes:
        images, depth, last = nodes.pop()
        children: dict[int, list[int]] = {}
        for row in images:
            if depth < len(identifiers[row]):
                children.setdefault(identifiers[row][depth], []).append(row)
        among = unit[images].mean(0) if by_choice and len(children) > 1 else last
        for symbol, own in children.items():
            nodes.append((own, depth + 1, among))
            if symbol in place:
                sums[place[symbol]] += (unit[own] - among).sum(0)
                bearers[place[symbol]] += len(own)
    means = np.asarray(sums / np.maximum(bearers, 1)[:, None], np.float32)
    return means, np.linalg.norm(sums, axis=1) > 1e-6
