"""Resolves collisions of codes: an image whose codes are taken gets the next nearest free ones.

Depends on codebooks; independent of symbols. All identifiers keep one length.

Source: collision-free semantic ids without a suffix (arXiv:2509.16446), which relax the choice of the nearest centroid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod

import numpy as np

from llama_index_genret.errors import IdentifierError
from llama_index_genret.identifiers.codebooks import Codebooks, Float32

Codes = tuple[int, ...]


class FreeCodes:
    """The codes that no image has yet.

    Args:
        codebooks: say which codes are near.
        sizes: codes per level.
        taken: the codes in use.
    """

    def __init__(self, codebooks: Codebooks, sizes: tuple[int, ...], taken: Iterable[Codes]) -> None:
        self._codebooks, self._sizes = codebooks, sizes
        self._room = [prod(sizes[depth:]) for depth in range(len(sizes) + 1)]
        self._used: Counter[Codes] = Counter()
        for codes in set(taken):
            self._take(codes)

    def assign(self, features: Float32) -> list[Codes]:
        """Take free codes for (n, d) features, and return them.

            of the images with equal codes, the one nearest to the centroid keeps them, unless they are in use
            for image in the others, the nearest to their centroids first:
                take the nearest free code of the last level; of the level before, if none is free; ...

        Raises:
            IdentifierError: there are fewer free codes than features.
        """
        if not len(features):
            return []
        if self._used[()] + len(features) > self._room[0]:
            self._raise_full(len(features))
        found, distance = self._codebooks.encode(features)
        codes: list[Codes] = list(map(tuple, found.tolist()))
        displaced = []
        for row in np.argsort(distance, kind="stable").tolist():
            if self._used[codes[row]]:
                displaced.append(row)
            else:
                self._take(codes[row])
        for row in displaced:
            codes[row] = self._nearest_free(features[row], codes[row])
            self._take(codes[row])
        return codes

    def _nearest_free(self, feature: Float32, own: Codes) -> Codes:
        prefix = own
        while self._is_full(prefix):
            prefix = prefix[:-1]
        for size in self._sizes[len(prefix) :]:
            nearest = self._codebooks.nearest_codes(feature, prefix, size).tolist()
            prefix = next(child for code in nearest if not self._is_full(child := (*prefix, code)))
        return prefix

    def _is_full(self, prefix: Codes) -> bool:
        return self._used[prefix] >= self._room[len(prefix)]

    def _take(self, codes: Codes) -> None:
        for depth in range(len(codes) + 1):
            self._used[codes[:depth]] += 1

    def _raise_full(self, wanted: int) -> None:
        levels, sizes = len(self._sizes), " x ".join(map(str, self._sizes))
        raise IdentifierError(
            f"{wanted} images need a code each, and {self._room[0] - self._used[()]} of {self._room[0]} are free "
            f"({levels} levels of {sizes}). Remove images (`genret remove`), or make the index anew from all images "
            "(`genret index`), which then has at least two codes for each."
        )
