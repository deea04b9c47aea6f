"""What a scheme promises, and the registry of schemes.

Knows image features and symbols; nothing of tokenizers, tries or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import IdentifierError

Identifier = tuple[str, ...]
"""The symbols of one image's name, in the order in which the model generates them."""


class Scheme(Protocol):
    """Makes identifiers: unique, and none the beginning of another.

    name: its key in the registry and in an index's manifest.
    needs_features: whether `fit` reads image features.
    new_images: what an image added later gets, for people to read.
    """

    name: ClassVar[str]
    needs_features: ClassVar[bool]
    new_images: ClassVar[str]

    def fit(self, n_images: int, features: NDArray[np.float32] | None, *, seed: int) -> list[Identifier]:
        """Name `n_images` images; features are (n_images, d) where the scheme needs them."""

    def new_symbols(self) -> list[str]:
        """Symbols to add to the tokenizer; empty if it has them all."""

    def options(self) -> dict[str, Any]:
        """What a manifest keeps, enough for `get_scheme(name, **options)`."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Frozen codebooks, if any, to be stored beside the manifest."""

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `arrays` gave."""


_SCHEMES: dict[str, Callable[..., Scheme]] = {}


def register_scheme(name: str) -> Callable[[Callable[..., Scheme]], Callable[..., Scheme]]:
    """Class decorator: make a scheme known under `name`.

    Raises:
        IdentifierError: the name is taken.
    """

    def register(factory: Callable[..., Scheme]) -> Callable[..., Scheme]:
        if name in _SCHEMES:
            raise IdentifierError(f"the scheme {name!r} is registered already: choose another name.")
        _SCHEMES[name] = factory
        return factory

    return register


def get_scheme(name: str, **options: Any) -> Scheme:
    """A scheme by its name, with its options.

    Raises:
        IdentifierError: nobody registered the name.
    """
    from llama_index_genret.identifiers import numeric, structured  # noqa: F401  they register themselves

    if name not in _SCHEMES:
        raise IdentifierError(f"there is no scheme {name!r}: choose one of {sorted(_SCHEMES)}.")
    return _SCHEMES[name](**options)


def suffix_collisions(codes: Sequence[Identifier], suffix: Callable[[int, int], Identifier]) -> list[Identifier]:
    """Make identifiers unique: images that share codes all get a suffix, counted from 0; the others none.

    Args:
        codes: (n,) of one length, so that none begins another.
        suffix: (count within the group, group size) -> symbols, of one length within a group.
    """
    groups: dict[Identifier, list[int]] = {}
    for row, code in enumerate(codes):
        groups.setdefault(code, []).append(row)
    identifiers = list(codes)
    for code, rows in groups.items():
        if len(rows) > 1:
            for count, row in enumerate(rows):
                identifiers[row] = code + suffix(count, len(rows))
    return identifiers
