"""Codebooks from features. The only part of the identifiers that needs scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from llama_index_genret.errors import MissingExtra
from llama_index_genret.identifiers.codebooks import (
    Float32,
    ResidualCodebooks,
    TreeCodebooks,
    TreeLevel,
    nearest_rows,
    unit_rows,
)

try:
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
except ImportError as error:
    raise MissingExtra("structured identifiers need scikit-learn: pip install 'llama-index-genret[train]'.") from error

MINI_BATCH_FROM = 4096
"""Rows from which the mini-batch variant is used (Sculley 2010)."""


def kmeans_tree(features: Float32, sizes: Sequence[int], *, seed: int) -> TreeCodebooks:
    """A k-means tree over (n, d) features by cosine: each cluster of a level is clustered again on the next.

    Args:
        sizes: most children of a node, level by level. Every node of the tree holds a feature.
    """
    unit = unit_rows(features)
    node = np.zeros(len(unit), np.int64)
    levels = []
    for size in sizes:
        order = np.argsort(node, kind="stable")
        _, starts = np.unique(node[order], return_index=True)
        parts = [kmeans(unit[rows], size, seed=seed) for rows in np.split(order, starts[1:])]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        level = TreeLevel(np.concatenate(parts), offsets)
        node = level.nearest(unit, node)
        levels.append(level)
    return TreeCodebooks(tuple(levels))


def residual_quantiser(features: Float32, sizes: Sequence[int], *, seed: int) -> ResidualCodebooks:
    """One codebook a level, each by k-means over what the levels before it left over.

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
    """(m, d) centroids, m <= size, each the nearest of at least one of the (n, d) points."""
    distinct = np.stack(list({point.tobytes(): point for point in points}.values()))
    if len(distinct) > size:
        kind = MiniBatchKMeans if len(distinct) >= MINI_BATCH_FROM else KMeans
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = kind(size, n_init=4, random_state=seed).fit(points).cluster_centers_
        distinct = np.asarray(fitted, np.float32)
    return distinct[np.unique(nearest_rows(points, distinct))]
