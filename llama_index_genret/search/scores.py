"""Turn the scores of a step into log-probabilities, and select the few entries that can be among the best.

Depends on ragged arrays of numbers; independent of tries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import NotANumber, SearchError
from llama_index_genret.search.protocol import Float64, Int64, Normalise


def check_scores(scores: NDArray[np.floating], offsets: Int64) -> NDArray[np.floating]:
    """Return the (m,) scores of a scorer as an array.

    Raises:
        SearchError: the number of scores differs from the number of tokens.
        NotANumber: a score is NaN or +inf.
    """
    scores = np.asarray(scores)
    if scores.shape != (offsets[-1],):
        raise SearchError(
            f"the scorer returned scores of shape {scores.shape}, expected ({offsets[-1]},): one for each token."
        )
    if not scores.max() < np.inf:
        raise NotANumber(
            "the scorer returned NaN or +inf, expected log-probabilities or logits. The weights are damaged, or the "
            "dtype overflows: load the checkpoint again, or use float32."
        )
    return scores


def row_constants(scores: NDArray[np.floating], offsets: Int64, parent: Float64, normalise: Normalise) -> Float64:
    """Return the (n,) constants that turn the scores of each row into log-probabilities of the whole prefixes."""
    if normalise is Normalise.VOCABULARY:
        return parent
    starts, counts = offsets[:-1], np.diff(offsets)
    top = np.maximum.reduceat(scores, starts)
    top[np.isneginf(top)] = 0.0
    shifted = np.repeat(top, counts)
    np.subtract(scores, shifted, out=shifted)
    total = np.add.reduceat(np.exp(shifted, out=shifted), starts, dtype=np.float64)
    return np.asarray(parent - top - np.log(total, where=total > 0, out=np.zeros_like(total)))


def best(
    scores: NDArray[np.floating],
    constant: Float64,
    offsets: Int64,
    first_rows: Int64,
    entries: Int64 | None,
    wanted: Int64,
) -> Int64:
    """Return the entries that hold each query's best `wanted`, and a few others; all if `wanted` is negative.

    Each row is cut into pieces. The maximum of a piece is an entry of its query. Among these maxima, the one at rank
    `wanted` is therefore a lower bound for the wanted entries, and the function returns only the entries above it.

    Args:
        first_rows: (queries + 1,) the first row of each query.
        entries: the entries to choose from, ascending; None for all.
    """
    if entries is not None:
        scores, offsets = scores[entries], np.searchsorted(entries, offsets)
    if not len(scores) or wanted.max() < 0:
        return np.arange(len(scores)) if entries is None else entries
    counts, n_rows = np.diff(offsets), np.diff(first_rows)
    n_pieces = min(max(8, 4 * int(wanted.max()) // int(n_rows[n_rows > 0].min())), int(counts.max()))
    cuts = offsets[:-1, None] + counts[:, None] * np.arange(n_pieces) // n_pieces
    maxima = (
        np.maximum.reduceat(scores, np.minimum(cuts, len(scores) - 1).ravel()).reshape(cuts.shape) + constant[:, None]
    )
    maxima[np.diff(cuts, axis=1, append=offsets[1:, None]) == 0] = -np.inf
    table = np.full((len(n_rows), max(int(n_rows.max()) * n_pieces, int(wanted.max()))), -np.inf)
    query = np.repeat(np.arange(len(n_rows)), n_rows)
    column = (np.arange(len(query)) - first_rows[query])[:, None] * n_pieces + np.arange(n_pieces)
    table[query[:, None], column] = maxima
    table.sort(axis=1)
    bound = np.where(wanted > 0, table[np.arange(len(n_rows)), -np.maximum(wanted, 1)], -np.inf)
    limit, some = np.full(len(query), -np.inf), bound[query] > -np.inf
    limit[some] = bound[query][some] - constant[some]
    limit[some] -= 1e-5 * np.clip(np.abs(limit[some]), 1.0, 1e30)  # sums are rounded: better one entry too many
    kept = np.flatnonzero(scores >= np.repeat(limit.astype(scores.dtype), counts))
    return kept if entries is None else entries[kept]
