"""Maps feature vectors to codes with frozen codebooks, by grouped matrix products.

Depends on NumPy arrays; independent of scikit-learn. `clustering` fits the codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

PRODUCT_ENTRIES = 2**24
"""Largest number of similarities computed at once (64 MiB)."""


class Codebooks(Protocol):
    """Maps every feature to one code per level."""

    def encode(self, features: Float32) -> tuple[Int64, Float32]:
        """Return (n, levels) codes of (n, d) features, and their (n,) squared distances to the last centroid.

        The norm of a feature has no effect.
        """

    def nearest_codes(self, feature: Float32, prefix: tuple[int, ...], size: int) -> Int64:
        """Return (size,) all codes of the level after `prefix`, the nearest to a (d,) feature first.

        Codes that have no centroid there come last, ascending.
        """

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays to store."""


@dataclass(frozen=True, eq=False)
class TreeLevel:
    """The centroids of one level of a k-means tree, grouped by parent.

    centroids: (m, d) float32. They are the parents of the next level.
    offsets: (parents + 1,) int64: parent p has the centroids offsets[p] .. offsets[p + 1] - 1, at least one.
    codes: (m,) int64, unique under each parent.
    directions: (k, d) float32, k at most the number of codes: what a code adds to its parent where no child has it.
        (0, d) for a level that has one parent.
    """

    centroids: Float32
    offsets: Int64
    codes: Int64
    directions: Float32

    def nearest(self, unit: Float32, parent: Int64) -> Int64:
        """Return (n,) the nearest centroid under each row's parent, the first of equally near ones.

        for row, p in enumerate(parent): argmin of |unit[row] - centroids[j]|² over j in range(offsets[p], offsets[p+1])
        """
        nearest = np.empty(len(unit), np.int64)
        order = np.argsort(parent, kind="stable")
        groups, starts = np.unique(parent[order], return_index=True)
        for group, rows in zip(groups.tolist(), np.split(order, starts[1:]), strict=True):
            first, end = self.offsets[group], self.offsets[group + 1]
            nearest[rows] = first + nearest_rows(unit[rows], self.centroids[first:end])
        return nearest

    def child(self, parent: int, code: int) -> int:
        """Return the child of a parent that has a code, -1 if none has it or the parent is -1."""
        if parent < 0:
            return -1
        first, end = self.offsets[parent : parent + 2].tolist()
        found = np.flatnonzero(self.codes[first:end] == code)
        return first + int(found[0]) if len(found) else -1


@dataclass(frozen=True, eq=False)
class TreeCodebooks:
    """Codebooks of hierarchical k-means. Each code selects a child of the node that the previous codes lead to."""

    levels: tuple[TreeLevel, ...]

    def encode(self, features: Float32) -> tuple[Int64, Float32]:
        """See `Codebooks.encode`."""
        unit = unit_rows(features)
        node = np.zeros(len(unit), np.int64)
        codes = []
        for level in self.levels:
            child = level.nearest(unit, node)
            codes.append(level.codes[child])
            node = child
        return np.stack(codes, axis=1), squared_norms(unit - self.levels[-1].centroids[node])

    def nearest_codes(self, feature: Float32, prefix: tuple[int, ...], size: int) -> Int64:
        """See `Codebooks.nearest_codes`. A code that no child has lies at its direction from the parent."""
        (unit,) = unit_rows(feature[None])
        node, centre = 0, np.zeros_like(unit)  # node -1: no image of the fitted tree lies below
        for level, code in zip(self.levels, prefix, strict=False):
            child = level.child(node, code)
            if child >= 0:
                centre = level.centroids[child]
            elif code < len(level.directions):
                centre = centre + level.directions[code]
            node = child
        level = self.levels[len(prefix)]
        distance = np.full(size, np.inf, np.float32)
        distance[: len(level.directions)] = squared_norms(unit - centre - level.directions)
        if node >= 0:
            children = slice(level.offsets[node], level.offsets[node + 1])
            distance[level.codes[children]] = squared_norms(unit - level.centroids[children])
        return np.argsort(distance, kind="stable")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return `centroids{l}`, `offsets{l}`, `codes{l}` and `directions{l}` of each `TreeLevel`."""
        return {f"{name}{i}": array for i, level in enumerate(self.levels) for name, array in vars(level).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], levels: int) -> TreeCodebooks:
        """Restore the codebooks that `arrays` returned.

        In trees that were stored without codes, the codes number the children of each node from 0. In trees that were
        stored without directions, a code that no child has lies nowhere.
        """
        tree_levels = []
        for i in range(levels):
            centroids, offsets = arrays[f"centroids{i}"], arrays[f"offsets{i}"]
            codes = arrays.get(f"codes{i}", sibling_positions(offsets))
            tree_levels.append(TreeLevel(centroids, offsets, codes, arrays.get(f"directions{i}", centroids[:0])))
        return cls(tuple(tree_levels))


@dataclass(frozen=True, eq=False)
class ResidualCodebooks:
    """Codebooks of residual quantisation. Each level encodes the residual of the previous levels.

    centroids: (m_l, d) float32 for each level l.
    """

    centroids: tuple[Float32, ...]

    def encode(self, features: Float32) -> tuple[Int64, Float32]:
        """See `Codebooks.encode`.

        for row, level: codes[row, level] = argmin_c |residual - centroids[level][c]|²; residual -= that centroid
        """
        residual = unit_rows(features)
        codes = []
        for level in self.centroids:
            code = nearest_rows(residual, level)
            codes.append(code)
            residual = residual - level[code]
        return np.stack(codes, axis=1), squared_norms(residual)

    def nearest_codes(self, feature: Float32, prefix: tuple[int, ...], size: int) -> Int64:
        """See `Codebooks.nearest_codes`."""
        (residual,) = unit_rows(feature[None])
        for level, code in zip(self.centroids, prefix, strict=False):
            if code < len(level):
                residual = residual - level[code]
        level = self.centroids[len(prefix)]
        distance = np.full(size, np.inf, np.float32)
        distance[: len(level)] = squared_norms(residual - level)
        return np.argsort(distance, kind="stable")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return `centroids{l}`: (m_l, d) float32."""
        return {f"centroids{i}": level for i, level in enumerate(self.centroids)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], levels: int) -> ResidualCodebooks:
        """Restore the codebooks that `arrays` returned."""
        return cls(tuple(arrays[f"centroids{i}"] for i in range(levels)))


def sibling_positions(offsets: Int64) -> Int64:
    """Return (m,) the position of each child among its siblings. See `TreeLevel` for `offsets`."""
    return np.asarray(np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets)))


def nearest_rows(points: Float32, centroids: Float32) -> Int64:
    """Return (n,) argmin_c |points[row] - centroids[c]|², computed from |c|² / 2 - p·c. Of equals, the first wins."""
    nearest = np.empty(len(points), np.int64)
    half_norms = (centroids**2).sum(axis=1) / 2
    chunk = max(1, PRODUCT_ENTRIES // len(centroids))
    for start in range(0, len(points), chunk):
        part = slice(start, start + chunk)
        nearest[part] = np.argmin(half_norms - points[part] @ centroids.T, axis=1)
    return nearest


def squared_norms(rows: Float32) -> Float32:
    """Return (n,) |row|² of (n, d)."""
    return np.asarray(np.einsum("nd,nd->n", rows, rows))


def unit_rows(features: Float32) -> Float32:
    """Scale the rows of (n, d) to length 1. A row of zeros stays zero."""
    norm = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(features / np.where(norm == 0, 1, norm), np.float32)
