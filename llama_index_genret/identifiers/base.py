"""Defines the contract of a scheme and the registry of schemes.

Depends on features, captions and symbols; independent of tokenizers, tries and models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import IdentifierError

Identifier = tuple[str, ...]
"""The symbols of one image, in the order in which the model generates them."""

Need = Literal["features", "captions", "vectors"]
"""Inputs of a scheme: features of the vision tower, captions, or vectors of the index's encoder."""


@dataclass(frozen=True, eq=False)
class ImageFacts:
    """The inputs from which a scheme assigns identifiers to some images, in their order.

    n_images: number of images.
    features: (n_images, d) float32, one row per image: features of the vision tower or vectors of the encoder, as the
        scheme needs. Default None: not computed.
    captions: one tuple of captions per image, possibly empty. Default (): no image has a caption.
    Raises:
        IdentifierError: there is not one row of features or one tuple of captions per image, or a feature is not
            finite.
    """

    n_images: int
    features: NDArray[np.float32] | None = None
    captions: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.captions and len(self.captions) != self.n_images:
            raise IdentifierError(
                f"{self.n_images} images have {len(self.captions)} tuples of captions: pass one tuple for each image."
            )
        if self.features is None:
            return
        if self.features.ndim != 2 or len(self.features) != self.n_images:
            raise IdentifierError(f"image features must be ({self.n_images}, d), not {self.features.shape}.")
        finite = np.isfinite(self.features).all(axis=1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise IdentifierError(f"the features of image {row} are not finite: check its file and the encoder.")

    def captions_of(self, row: int) -> tuple[str, ...]:
        """Return the captions of one image, () if no image has a caption."""
        return self.captions[row] if self.captions else ()


class Scheme(Protocol):
    """Makes unique identifiers. One may be a prefix of another: the code that builds a trie closes them.

    name: key in the registry and in the manifest of an index.
    needs: inputs that `fit` and `extend` read from `ImageFacts`, apart from `n_images`.
    writes: "symbols": each symbol is one token. "text": one string, which the tokenizer splits into tokens.
    new_images: describes for users the identifier of an image that is added later.
    """

    name: ClassVar[str]
    writes: ClassVar[Literal["symbols", "text"]]
    new_images: ClassVar[str]

    @property
    def needs(self) -> frozenset[Need]:
        """Return the inputs that the scheme reads."""

    def fit(self, images: ImageFacts, *, seed: int) -> list[Identifier]:
        """Assign identifiers to the images of a new index. The same images and seed give the same identifiers."""

    def extend(self, images: ImageFacts, taken: Collection[Identifier]) -> list[Identifier]:
        """Assign identifiers to images that are added after `fit` or `restore`. `new_symbols` and `arrays` may grow.

        Args:
            taken: the identifiers in use, as this scheme made them. They stay unchanged and are not assigned again.
        """

    def new_symbols(self) -> list[str]:
        """Return the symbols to add to the tokenizer, in a fixed order: `extend` appends. Empty if none is needed."""

    def codes_per_level(self) -> tuple[int, ...]:
        """Return the number of symbols of each level. Empty if the scheme fixes no levels.

        In an index of format 4 or older, an identifier with more symbols than levels has a suffix.
        """

    def options(self) -> dict[str, Any]:
        """Return the options for the manifest. `get_scheme(name, **options)` makes the scheme again."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state to store beside the manifest: frozen codebooks, the next number."""

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Restore the state that `arrays` returned."""


_SCHEMES: dict[str, Callable[..., Scheme]] = {}


def register_scheme(name: str) -> Callable[[Callable[..., Scheme]], Callable[..., Scheme]]:
    """Register the decorated scheme under `name`.

    Raises:
        IdentifierError: the name is registered already.
    """

    def register(factory: Callable[..., Scheme]) -> Callable[..., Scheme]:
        if name in _SCHEMES:
            raise IdentifierError(f"the scheme {name!r} is registered already: choose another name.")
        _SCHEMES[name] = factory
        return factory

    return register


def get_scheme(name: str, **options: Any) -> Scheme:
    """Make the scheme that is registered under `name`, with the given options.

    Raises:
        IdentifierError: the name is unknown, or the scheme rejects the options.
    """
    from llama_index_genret.identifiers import atomic, numeric, semantic, structured  # noqa: F401  imports register the schemes

    if name not in _SCHEMES:
        raise IdentifierError(f"unknown scheme {name!r}; choose from: {sorted(_SCHEMES)}.")
    try:
        return _SCHEMES[name](**options)
    except TypeError as error:
        raise IdentifierError(f"the scheme {name!r} rejects the options {options}: {error}.") from error


Key = TypeVar("Key", bound=Hashable)


class FirstFree(Generic[Key]):
    """Assigns each image its first free candidate, in time linear in the number of assigned identifiers.

        for image: identifier = next(c for c in candidates(image) if c not in taken); taken.add(identifier)

    Images of one key share one iterator over their candidates, as an identifier that is taken stays taken.
    """

    def __init__(self, taken: Iterable[Identifier], candidates: Callable[[Key], Iterator[Identifier]]) -> None:
        self._taken = set(taken)
        self._candidates = candidates
        self._open: dict[Key, Iterator[Identifier]] = {}

    def assign(self, key: Key) -> Identifier:
        """Return the next free identifier for `key`. The candidates must be infinite."""
        if key not in self._open:
            self._open[key] = self._candidates(key)
        identifier = next(candidate for candidate in self._open[key] if candidate not in self._taken)
        self._taken.add(identifier)
        return identifier
