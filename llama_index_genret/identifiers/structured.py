"""The `structured` scheme, the default, makes identifiers of the codes of an embedding, one alphabet per level.

Depends on features; independent of captions and models. The codebooks are frozen, so that a new image gets its codes
without training.

Source: structured identifiers of GRACE (arXiv:2402.10805, recursive k-means), after DSI (arXiv:2202.06991);
residual quantisation after TIGER (arXiv:2305.05065).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, count, product
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import IdentifierError
from llama_index_genret.identifiers.base import (
    FirstFree,
    Identifier,
    ImageFacts,
    Need,
    register_scheme,
    suffix_collisions,
)
from llama_index_genret.identifiers.codebooks import Codebooks, ResidualCodebooks, TreeCodebooks

SUFFIX_SYMBOLS = 32
"""Size of the alphabet of suffix symbols, which distinguish images with equal codes.

Larger groups of such images need more than one suffix symbol each.
"""

MOST_LEVELS, MOST_CODES = 32, 2**16
"""Limits of the number of levels and of codes per level.

Two codes at each of 32 levels give four billion identifiers. Each code is one embedding row of the model.
"""

SUFFIXES = tuple(f"<s_{number}>" for number in range(SUFFIX_SYMBOLS))


@register_scheme("structured")
class StructuredScheme:
    """Makes identifiers like `<g0_17><g1_5>`. A suffix like `<s_1>` follows only if images share their codes.

    method: "kmeans", the default: a tree of clusters. "rq": residual quantisation, one codebook per level for all
        nodes. It is far smaller, but images of one dense cluster share codes more often; `genret inspect` counts them.
    levels: codes per identifier. Default None: by the number of images (2 up to 1,024, 3 up to 32,768).
    sizes: codes per level: one number for all levels, or one for each. Default None: about one image per leaf.
    source: "features" of the model's vision tower, the default, which cluster images by appearance. "vectors" of the
        index's encoder, which cluster them by meaning and suit text queries.
    """

    name: ClassVar[str] = "structured"
    writes: ClassVar[Literal["symbols", "text"]] = "symbols"
    new_images: ClassVar[str] = "codes from the frozen codebooks, without training; a suffix where they are taken"

    def __init__(
        self,
        method: str = "kmeans",
        levels: int | None = None,
        sizes: int | Sequence[int] | None = None,
        source: Literal["vectors", "features"] = "features",
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
        self.levels = self.levels or max(2, int(np.ceil(np.log(n) / np.log(32) - 1e-9)))
        self.sizes = self.sizes or max(2, int(np.ceil(1.25 * n ** (1 / self.levels))))
        from llama_index_genret.identifiers.clustering import kmeans_tree, residual_quantiser

        sizes = self.codes_per_level()
        if self.method == "kmeans":
            self._codebooks = kmeans_tree(features, sizes, seed=seed, shared=self.source == "vectors")
        else:
            self._codebooks = residual_quantiser(features, sizes, seed=seed)
        return suffix_collisions(self._codes(features), _suffix)

    def extend(self, images: ImageFacts, taken: Collection[Identifier]) -> list[Identifier]:
        """Assign codes by the frozen codebooks, and a suffix if the codes are taken. See `Scheme.extend`."""
        free = FirstFree(taken, _with_suffixes)
        return [free.assign(code) for code in self._codes(_features(images))]

    def encode(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return (n, levels) codes of (n, d) features by the frozen codebooks.

        Raises:
            IdentifierError: the scheme has no codebooks yet.
        """
        if self._codebooks is None:
            raise IdentifierError("the scheme has no codebooks yet: fit it, or restore them.")
        return self._codebooks.encode(features)

    def _codes(self, features: NDArray[np.float32]) -> list[Identifier]:
        rows = self.encode(features).tolist() if len(features) else []
        return [tuple(f"<g{level}_{code}>" for level, code in enumerate(row)) for row in rows]

    def new_symbols(self) -> list[str]:
        """Return all codes of all levels, then the suffix symbols. An image added later may need an unused one."""
        codes = [f"<g{level}_{code}>" for level, size in enumerate(self.codes_per_level()) for code in range(size)]
        return codes + list(SUFFIXES)

    def codes_per_level(self) -> tuple[int, ...]:
        """Return the size of each level, or () until sizes and levels are given or derived."""
        if self.sizes is None or self.levels is None:
            return ()
        return (self.sizes,) * self.levels if isinstance(self.sizes, int) else tuple(self.sizes)

    def options(self) -> dict[str, Any]:
        """Return method, levels, sizes and source, as given or derived."""
        sizes = self.sizes if self.sizes is None or isinstance(self.sizes, int) else list(self.sizes)
        return {"method": self.method, "levels": self.levels, "sizes": sizes, "source": self.source}

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


def _suffix(number: int, group_size: int) -> Identifier:
    """Return `number` in base SUFFIX_SYMBOLS, with as many digits as the group needs."""
    digits = []
    while group_size > 1:
        digits.append(SUFFIXES[number % SUFFIX_SYMBOLS])
        number, group_size = number // SUFFIX_SYMBOLS, -(-group_size // SUFFIX_SYMBOLS)
    return tuple(reversed(digits))


def _with_suffixes(code: Identifier) -> Iterator[Identifier]:
    """Yield the code alone, then with every suffix symbol, then with every pair of them, ..."""
    return chain([code], (code + suffix for length in count(1) for suffix in product(SUFFIXES, repeat=length)))
