"""`structured`: codes of an image embedding by hierarchical k-means, one symbol alphabet a level. The default.

Knows image features; nothing of captions or models. The codebooks are frozen and image-only, so that a new image
gets its codes without training.

Source: structured identifiers of GRACE (arXiv:2402.10805, recursive k-means), after DSI (arXiv:2202.06991).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import IdentifierError
from llama_index_genret.identifiers.base import Identifier, register_scheme, suffix_collisions

SUFFIX_SYMBOLS = 32
"""Alphabet of the symbol that parts images with equal codes; more of them take more such symbols."""


@register_scheme("structured")
class StructuredScheme:
    """`<g0_17><g1_5>`, and `<s_1>` after it only where images share their codes.

    levels: codes per identifier; derived from the number of images if not given (2 up to 1,024, 3 up to 32,768).
    size: clusters of each node; derived so that a leaf holds about one image if not given.
    """

    name: ClassVar[str] = "structured"
    needs_features: ClassVar[bool] = True
    new_images: ClassVar[str] = "codes from the frozen codebooks, without training"

    def __init__(self, levels: int | None = None, size: int | None = None) -> None:
        if (levels is not None and levels < 1) or (size is not None and size < 2):
            raise IdentifierError(f"levels={levels} must be at least 1, size={size} at least 2.")
        self.levels = levels
        self.size = size
        self._codebooks: list[NDArray[np.float32]] = []
        self._n_suffix_symbols = 0

    def fit(self, n_images: int, features: NDArray[np.float32] | None, *, seed: int) -> list[Identifier]:
        """Cluster the features, freeze the codebooks, and name the images.

        Args:
            features: (n_images, d) float32, any scale; compared by cosine.
        Raises:
            IdentifierError: features are missing, of another length, or not finite.
        """
        if features is None or features.shape[0] != n_images or features.ndim != 2:
            shape = None if features is None else features.shape
            raise IdentifierError(f"structured identifiers need ({n_images}, d) image features, not {shape}.")
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise IdentifierError(f"the features of image {row} are not finite: its file or the encoder is damaged.")
        self.levels = self.levels or max(2, int(np.ceil(np.log(n_images) / np.log(32) - 1e-9)))
        self.size = self.size or max(2, int(np.ceil(1.25 * n_images ** (1 / self.levels))))
        from llama_index_genret.identifiers.clustering import hierarchical_kmeans

        self._codebooks = hierarchical_kmeans(_unit(features), self.levels, self.size, seed=seed)
        codes = [
            tuple(f"<g{level}_{code}>" for level, code in enumerate(row)) for row in self.encode(features).tolist()
        ]
        identifiers = suffix_collisions(codes, self._suffix)
        self._n_suffix_symbols = _largest_suffix(identifiers, self.levels) + 1
        return identifiers

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """(n, levels) codes of (n, d) features by the frozen codebooks: the nearest centroid, level by level.

        for row, level: codes[row, level] = argmin_c |unit(features[row]) - codebook[level][path of row, c]|
        """
        unit = _unit(features)
        node = np.zeros(len(unit), np.int64)
        codes = []
        for codebook in self._codebooks:
            code = nearest_children(unit, codebook, node)
            codes.append(code)
            node = node * codebook.shape[1] + code
        return np.stack(codes, axis=1)

    def new_symbols(self) -> list[str]:
        """All codes of all levels, and the suffix symbols that are in use."""
        codes = [f"<g{level}_{code}>" for level in range(self.levels or 0) for code in range(self.size or 0)]
        return codes + [f"<s_{count}>" for count in range(self._n_suffix_symbols)]

    def options(self) -> dict[str, Any]:
        """Levels and size, as chosen or derived."""
        return {"levels": self.levels, "size": self.size}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`level{l}`: (size**l, size, d) float32 centroids, NaN where unused; `n_suffix_symbols`: (1,) int64."""
        arrays: dict[str, NDArray[Any]] = {f"level{i}": codebook for i, codebook in enumerate(self._codebooks)}
        return arrays | {"n_suffix_symbols": np.array([self._n_suffix_symbols], np.int64)}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `arrays` gave."""
        self._codebooks = [arrays[f"level{i}"] for i in range(self.levels or 0)]
        self._n_suffix_symbols = int(arrays["n_suffix_symbols"][0])

    @staticmethod
    def _suffix(count: int, group_size: int) -> Identifier:
        digits = []
        while group_size > 1:
            digits.append(f"<s_{count % SUFFIX_SYMBOLS}>")
            count, group_size = count // SUFFIX_SYMBOLS, -(-group_size // SUFFIX_SYMBOLS)
        return tuple(reversed(digits))


def _largest_suffix(identifiers: Sequence[Identifier], levels: int) -> int:
    return max((int(s[3:-1]) for identifier in identifiers for s in identifier[levels:]), default=-1)


def nearest_children(
    unit: NDArray[np.float32], codebook: NDArray[np.float32], node: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(n,) the nearest centroid of each row's node: argmin_c |unit[row] - codebook[node[row], c]|².

    Args:
        codebook: (nodes, size, d); an unused centroid is NaN and never the nearest.
    """
    nearest = np.empty(len(unit), np.int64)
    chunk = max(1, 2**24 // (codebook.shape[1] * codebook.shape[2]))
    for start in range(0, len(unit), chunk):
        part = slice(start, start + chunk)
        distance = ((unit[part, None, :] - codebook[node[part]]) ** 2).sum(-1)
        nearest[part] = np.nanargmin(distance, axis=1)
    return nearest


def _unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.where(norm == 0, 1, norm), np.float32)
