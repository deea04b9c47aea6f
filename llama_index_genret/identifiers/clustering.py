"""Fits codebooks to features.

Depends on scikit-learn, as the only module of this package; independent of captions, tokenizers and models.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from llama_index_genret.errors import MissingExtra
from llama_index_genret.identifiers.codebooks import (
    Float32,
    Int64,
    ResidualCodebooks,
    TreeCodebooks,
    TreeLevel,
    nearest_rows,
    sibling_positions,
    unit_rows,
)

try:
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
except ImportError as error:
    raise MissingExtra("structured identifiers need scikit-learn: pip install 'llama-index-genret[train]'.") from error

MINI_BATCH_FROM = 4096
"""Number of distinct rows from which mini-batch k-means is used (Sculley 2010)."""


def kmeans_tree(features: Float32, sizes: Sequence[int], *, seed: int) -> TreeCodebooks:
    """Fit a k-means tree by cosine similarity. The next level clusters each cluster of a level again.

    A code means a similar direction under every parent, as the model has one embedding row for it (`_shared_codes`).

    Args:
        features: (n, d) float32, of any scale.
        sizes: largest number of children of a node, one number per level. Every node contains at least one feature.
        seed: of k-means.
    """
    unit = unit_rows(features)
    node = np.zeros(len(unit), np.int64)
    parents = np.zeros((1, unit.shape[1]), np.float32)
    levels: list[TreeLevel] = []
    for size in sizes:
        order = np.argsort(node, kind="stable")
        _, starts = np.unique(node[order], return_index=True)
        parts = [kmeans(unit[rows], size, seed=seed) for rows in np.split(order, starts[1:])]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        centroids = np.concatenate(parts)
        codes, directions = sibling_positions(offsets), centroids[:0]
        if len(parts) > 1:
            away = centroids - np.repeat(parents, np.diff(offsets), axis=0)
            directions = kmeans(away, size, seed=seed)
            codes = _shared_codes(away, offsets, directions)
        level = TreeLevel(centroids, offsets, codes, directions)
        node, parents = level.nearest(unit, node), centroids
        levels.append(level)
    return TreeCodebooks(tuple(levels))


def _shared_codes(away: Float32, offsets: Int64, directions: Float32) -> Int64:
    """Return (m,) codes for the children of all parents of a level, unique under each parent.

    The children of each parent get numbers of directions by the assignment with the least sum of squared distances
    (Kuhn 1955). If a parent has more children than there are directions, the rest get any free numbers.

    Args:
        away: (m, d) child minus parent.
        offsets: (parents + 1,), see `TreeLevel`.
        directions: (k, d) the clusters of `away` over all parents.
    """
    codes = np.empty(len(away), np.int64)
    for first, end in pairwise(offsets.tolist()):
        own = away[first:end]
        cost = np.full((len(own), max(len(own), len(directions))), np.float32(32))  # above any squared distance here
        cost[:, : len(directions)] = (own**2).sum(1)[:, None] + (directions**2).sum(1) - 2 * own @ directions.T
        children, numbers = linear_sum_assignment(cost)
        codes[first + children] = numbers
    return codes


def residual_quantiser(features: Float32, sizes: Sequence[int], *, seed: int) -> ResidualCodebooks:
    """Fit one codebook per level by k-means over the residuals of the levels before it.

    Source: the residual quantisation of TIGER's semantic ids (arXiv:2305.05065), on the features themselves.
    """
    residual = unit_rows(features)
    centroids = []
    for size in sizes:
        level = kmeans(residual, size, seed=seed)
        centroids.append(level)
        residual = residual - level[nearest_rows(residual, level)]
    return ResidualCodebooks(tuple(centroids))


def kmeans(points: Float32, size: int, *, seed: int) -> Float32:
    """Return (m, d) centroids, m <= size. Each is the nearest one of at least one of the (n, d) points."""
    distinct = np.stack(list({point.tobytes(): point for point in points}.values()))
    if len(distinct) > size:
        kind = MiniBatchKMeans if len(distinct) >= MINI_BATCH_FROM else KMeans
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = kind(size, n_init=4, random_state=seed).fit(points).cluster_centers_
        distinct = np.asarray(fitted, np.float32)
    return distinct[np.unique(nearest_rows(points, distinct))]
