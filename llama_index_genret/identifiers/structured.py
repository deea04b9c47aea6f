"""The `structured` scheme, the default, makes identifiers of the codes of an embedding, one alphabet per level.

Depends on features; independent of captions and models. The codebooks are frozen, so that a new image gets its codes
without training. Images with equal codes are told apart by the next free code (`free_codes`).

Source: structured identifiers of GRACE (arXiv:2402.10805, recursive k-means), after DSI (arXiv:2202.06991);
residual quantisation after TIGER (arXiv:2305.05065).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import IdentifierError
from llama_index_genret.identifiers.base import Identifier, ImageFacts, Need, register_scheme
from llama_index_genret.identifiers.codebooks import Codebooks, ResidualCodebooks, TreeCodebooks
from llama_index_genret.identifiers.free_codes import Codes, FreeCodes

log = logging.getLogger(__name__)

CODES_PER_IMAGE = 2
"""Codes that a new index has for each image at least, so that collisions find a near one and images can be added."""

MOST_LEVELS, MOST_CODES = 32, 2**16
"""Limits of the number of levels and of codes per level.

Two codes at each of 32 levels give four billion identifiers. Each code is one embedding row of the model.
"""


@register_scheme("structured")
class StructuredScheme:
    """Makes identifiers like `<g0_17><g1_5>`, all of one length.

    method: "kmeans", the default: a tree of clusters. "rq": residual quantisation, one codebook per level for all
        nodes. It is far smaller, but images of one dense cluster share codes more often, and more take a farther one.
    levels: codes per identifier. Default None: by the number of images (2 up to 1,024, 3 up to 32,768). `fit` raises it
        until there are `CODES_PER_IMAGE` codes for each image; added levels have the size of the last.
    sizes: codes per level: one number for all levels, or one for each. Default None: `CODES_PER_IMAGE` for each image.
    source: "features" of the model's vision tower, the default, which cluster images by appearance. "vectors" of the
        index's encoder, which cluster them by meaning and suit text queries.
    suffixes: number of suffix symbols `<s_0>`, ... in the vocabulary of an index of format 4 or older, whose images
        with equal codes have them. Default 0: no identifier has a suffix.
    """

    name: ClassVar[str] = "structured"
    writes: ClassVar[Literal["symbols", "text"]] = "symbols"
    new_images: ClassVar[str] = "codes from the frozen codebooks, without training; the next free where they are taken"

    def __init__(
        self,
        method: str = "kmeans",
        levels: int | None = None,
        sizes: int | Sequence[int] | None = None,
        source: Literal["vectors", "features"] = "features",
        suffixes: int = 0,
    ) -> None:
        if method not in ("kmeans", "rq"):
            raise IdentifierError(f"method={method!r} must be 'kmeans' or 'rq'.")
        given = [sizes] if isinstance(sizes, int) else list(sizes or [])
        if not all(isinstance(size, int) and 2 <= size <= MOST_CODES for size in given):
            raise IdentifierError(
                f"sizes={sizes} must be one integer or a list of integers, each from 2 to {MOST_CODES}."
            )
        if levels is not None and not (isinstance(levels, int) and 1 <= levels <= MOST_LEVELS):
            raise IdentifierError(f"levels={levels} must be an integer from 1 to {MOST_LEVELS}.")
        if sizes is not None and not isinstance(sizes, int):
            levels = len(given) if levels is None else levels
            if len(given) != levels:
                raise IdentifierError(f"sizes={given} must be one number, or one for each of {levels} levels.")
        if source not in ("vectors", "features"):
            raise IdentifierError(f"source={source!r} must be 'vectors' or 'features'.")
        self.method = method
        self.levels = levels
        self.sizes = sizes
        self.source = source
        self.suffixes = suffixes
        self._codebooks: Codebooks | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """Return the `source`."""
        return frozenset({self.source})

    def fit(self, images: ImageFacts, *, seed: int) -> list[Identifier]:
        """Cluster the features, freeze the codebooks, and assign identifiers.

        Args:
            images: with features of any scale. They are compared by cosine similarity.
        Raises:
            IdentifierError: there are no images or no features.
        """
        features = _features(images)
        n = len(features)
        if not n:
            raise IdentifierError("there are no images: structured identifiers need at least one to fit codebooks.")
        self._choose_sizes(n)
        from llama_index_genret.identifiers.clustering import kmeans_tree, residual_quantiser

        fitted = kmeans_tree if self.method == "kmeans" else residual_quantiser
        self._codebooks = fitted(features, self.codes_per_level(), seed=seed)
        return self.extend(images, ())

    def _choose_sizes(self, n_images: int) -> None:
        wanted = CODES_PER_IMAGE * n_images
        self.levels = self.levels or max(2, int(np.ceil(np.log(n_images) / np.log(32) - 1e-9)))
        self.sizes = self.sizes or min(MOST_CODES, max(2, int(np.ceil(wanted ** (1 / self.levels) - 1e-9))))
        given = self.levels
        while prod(self.codes_per_level()) < wanted and self.levels < MOST_LEVELS:
            self.levels += 1
            self.sizes = self.sizes if isinstance(self.sizes, int) else [*self.sizes, self.sizes[-1]]
        if self.levels > given:
            log.warning("%d levels of codes are too few for %d images: %d are made.", given, n_images, self.levels)

    def extend(self, images: ImageFacts, taken: Collection[Identifier]) -> list[Identifier]:
        """Assign codes by the frozen codebooks, and the next nearest free ones if they are taken. See `Scheme.extend`.

        Raises:
            IdentifierError: there are no features, or fewer free codes than images.
        """
        if self._codebooks is None:
            raise IdentifierError("the scheme has no codebooks yet: fit it, or restore them.")
        sizes = self.codes_per_level()
        used = (_codes_of(identifier[: len(sizes)]) for identifier in taken)
        assigned = FreeCodes(self._codebooks, sizes, used).assign(_features(images))
        return [tuple(f"<g{level}_{code}>" for level, code in enumerate(codes)) for codes in assigned]

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return (n, levels) codes of (n, d) features by the frozen codebooks, whether they are free or not.

        Raises:
            IdentifierError: the scheme has no codebooks yet.
        """
        if self._codebooks is None:
            raise IdentifierError("the scheme has no codebooks yet: fit it, or restore them.")
        return self._codebooks.encode(features)[0]

    def new_symbols(self) -> list[str]:
        """Return all codes of all levels, then the suffix symbols. An image added later may need an unused one."""
        codes = [f"<g{level}_{code}>" for level, size in enumerate(self.codes_per_level()) for code in range(size)]
        return codes + [f"<s_{number}>" for number in range(self.suffixes)]

    def codes_per_level(self) -> tuple[int, ...]:
        """Return the size of each level, or () until sizes and levels are given or derived."""
        if self.sizes is None or self.levels is None:
            return ()
        return (self.sizes,) * self.levels if isinstance(self.sizes, int) else tuple(self.sizes)

    def options(self) -> dict[str, Any]:
        """Return method, levels, sizes and source, as given or derived, and suffixes if there are any."""
        sizes = self.sizes if self.sizes is None or isinstance(self.sizes, int) else list(self.sizes)
        options = {"method": self.method, "levels": self.levels, "sizes": sizes, "source": self.source}
        return {**options, "suffixes": self.suffixes} if self.suffixes else options

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the codebooks. See `TreeCodebooks.arrays` and `ResidualCodebooks.arrays`."""
        return self._codebooks.arrays() if self._codebooks else {}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Restore the codebooks that `arrays` returned."""
        kind = TreeCodebooks if self.method == "kmeans" else ResidualCodebooks
        self._codebooks = kind.from_arrays(arrays, self.levels or 0)


def _features(images: ImageFacts) -> NDArray[np.float32]:
    if images.features is None:
        raise IdentifierError(f"structured identifiers need ({images.n_images}, d) image features, not None.")
    return images.features


def _codes_of(symbols: Identifier) -> Codes:
    """Return the numbers of symbols like `<g0_17>`."""
    return tuple(int(symbol[:-1].rpartition("_")[2]) for symbol in symbols)
