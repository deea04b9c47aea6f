"""Hierarchical k-means. The only part of the identifiers that needs scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import MissingExtra
from llama_index_genret.identifiers.structured import nearest_children

try:
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
except ImportError as error:
    raise MissingExtra("structured identifiers need scikit-learn: pip install 'llama-index-genret[train]'.") from error

MINI_BATCH_FROM = 4096
"""Rows from which the mini-batch variant is used (Sculley 2010)."""


def hierarchical_kmeans(
    unit_features: NDArray[np.float32], levels: int, size: int, *, seed: int
) -> list[NDArray[np.float32]]:
    """Codebooks of a k-means tree: each cluster of a level is clustered again on the next.

    Args:
        unit_features: (n, d) float32 of length 1.
    Returns:
        For each level l, (size**l, size, d) float32 centroids, NaN where a node has fewer clusters. Path
        (c0, c1, ...) reaches node ((c0 * size) + c1) ...
    """
    dim = unit_features.shape[1]
    nodes = np.zeros(len(unit_features), np.int64)
    codebooks = []
    for level in range(levels):
        codebook = np.full((size**level, size, dim), np.nan, np.float32)
        for node in np.unique(nodes):
            centroids = _centroids(unit_features[nodes == node], size, seed)
            codebook[node, : len(centroids)] = centroids
        codebooks.append(codebook)
        nodes = nodes * size + nearest_children(unit_features, codebook, nodes)
    return codebooks


def _centroids(points: NDArray[np.float32], size: int, seed: int) -> NDArray[np.float32]:
    distinct = np.unique(points, axis=0)
    if len(distinct) <= size:
        return distinct
    kind = MiniBatchKMeans if len(points) >= MINI_BATCH_FROM else KMeans
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        centers = kind(size, n_init=4, random_state=seed).fit(points).cluster_centers_
    return np.asarray(centers, np.float32)
