"""Frozen codebooks: from a feature vector to its codes, by grouped matrix products.

Knows arrays only. `clustering` makes them; assignment needs numpy alone.
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
"""Most similarities computed at once (64 MiB)."""


class Codebooks(Protocol):
    """Gives every feature one code a level."""

    def encode(self, features: Float32) -> Int64:
        """(n, levels) codes of (n, d) features; their length does not matter."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is stored."""


@dataclass(frozen=True, eq=False)
class TreeLevel:
    """The centroids of one level of a k-means tree, those of one parent after another.

    centroids: (m, d) float32. offsets: (parents + 1,) int64: those of parent p are offsets[p] .. offsets[p + 1] - 1,
    at least one. The m centroids are the parents of the next level.
    codes: (m,) int64, no two of one parent equal.
    """

    centroids: Float32
    offsets: Int64
    codes: Int64

    def nearest(self, unit: Float32, parent: Int64) -> Int64:
        """(n,) the nearest centroid of each row's parent; of equals the first.

        for row, p in enumerate(parent): argmin over j in offsets[p] .. offsets[p + 1] of |unit[row] - centroids[j]|²
        """
        nearest = np.empty(len(unit), np.int64)
        order = np.argsort(parent, kind="stable")
        groups, starts = np.unique(parent[order], return_index=True)
        for group, rows in zip(groups.tolist(), np.split(order, starts[1:]), strict=True):
            first, end = self.offsets[group], self.offsets[group + 1]
            nearest[rows] = first + nearest_rows(unit[rows], self.centroids[first:end])
        return nearest


@dataclass(frozen=True, eq=False)
class TreeCodebooks:
    """Hierarchical k-means: each code is that of a child of the node that the codes before it lead to."""

    levels: tuple[TreeLevel, ...]

    def encode(self, features: Float32) -> Int64:
        """See `Codebooks.encode`."""
        unit = unit_rows(features)
        node = np.zeros(len(unit), np.int64)
        codes = []
        for level in self.levels:
            child = level.nearest(unit, node)
            codes.append(level.codes[child])
            node = child
        return np.stack(codes, axis=1)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`centroids{l}`, `offsets{l}` and `codes{l}` of each `TreeLevel`."""
        return {f"{name}{i}": array for i, level in enumerate(self.levels) for name, array in vars(level).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], levels: int) -> TreeCodebooks:
        """Take back what `arrays` gave; trees that were stored without codes count the children of a node."""
        found = []
        for i in range(levels):
            offsets = arrays[f"offsets{i}"]
            found.append(
                TreeLevel(arrays[f"centroids{i}"], offsets, arrays.get(f"codes{i}", sibling_positions(offsets)))
            )
        return cls(tuple(found))


@dataclass(frozen=True, eq=False)
class ResidualCodebooks:
    """Residual quantisation: each level codes what the centroids before it left over.

    centroids: one (m_l, d) float32 a level.
    """

    centroids: tuple[Float32, ...]

    def encode(self, features: Float32) -> Int64:
        """See `Codebooks.encode`.

        for row, level: codes[row, level] = argmin_c |residual - centroids[level][c]|²; residual -= that centroid
        """
        residual = unit_rows(features)
        codes = []
        for level in self.centroids:
            code = nearest_rows(residual, level)
            codes.append(code)
            residual = residual - level[code]
        return np.stack(codes, axis=1)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`centroids{l}`: (m_l, d) float32."""
        return {f"centroids{i}": level for i, level in enumerate(self.centroids)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], levels: int) -> ResidualCodebooks:
        """Take back what `arrays` gave."""
        return cls(tuple(arrays[f"centroids{i}"] for i in range(levels)))


def sibling_positions(offsets: Int64) -> Int64:
    """(m,) the place of each child among those of its parent; for `offsets` see `TreeLevel`."""
    return np.asarray(np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets)))


def nearest_rows(points: Float32, centroids: Float32) -> Int64:
    """(n,) argmin_c |points[row] - centroids[c]|², as |c|² - 2 p·c; of equals the first."""
    nearest = np.empty(len(points), np.int64)
    half_norms = (centroids**2).sum(axis=1) / 2
    chunk = max(1, PRODUCT_ENTRIES // len(centroids))
    for start in range(0, len(points), chunk):
        part = slice(start, start + chunk)
        nearest[part] = np.argmin(half_norms - points[part] @ centroids.T, axis=1)
    return nearest


def unit_rows(features: Float32) -> Float32:
    """(n, d) of length 1; a row of zeros stays."""
    norm = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(features / np.where(norm == 0, 1, norm), np.float32)
