"""What a scheme promises, and the registry of schemes.

Knows what is known of images, and symbols; nothing of tokenizers, tries or models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import IdentifierError

Identifier = tuple[str, ...]
"""The symbols of one image's name, in the order in which the model generates them."""

Need = Literal["features", "captions", "caption features"]
"""The last: vectors of the captions, by the text encoder that the scheme's option `encoder` names."""


@dataclass(frozen=True, eq=False)
class ImageFacts:
    """What is known of some images, in their order, when they are named.

    features: (n_images, d) float32, one row an image, of its looks or of its captions as the scheme needs; None where
        nobody computed them.
    captions: the captions of every image, possibly none; an empty tuple where nobody has any.
    Raises:
        IdentifierError: features or captions are not one an image, or a feature is not finite.
    """

    n_images: int
    features: NDArray[np.float32] | None = None
    captions: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.captions and len(self.captions) != self.n_images:
            raise IdentifierError(
                f"{self.n_images} images have {len(self.captions)} tuples of captions: give one each."
            )
        if self.features is None:
            return
        if self.features.ndim != 2 or len(self.features) != self.n_images:
            raise IdentifierError(f"image features are ({self.n_images}, d), not {self.features.shape}.")
        finite = np.isfinite(self.features).all(axis=1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise IdentifierError(f"the features of image {row} are not finite: its file or the encoder is damaged.")

    def captions_of(self, row: int) -> tuple[str, ...]:
        """The captions of one image, none where nobody has any."""
        return self.captions[row] if self.captions else ()


class Scheme(Protocol):
    """Makes identifiers, no two equal. One may be the beginning of another: whoever builds a trie closes them.

    name: its key in the registry and in an index's manifest.
    needs: what `fit` and `extend` read of `ImageFacts` beside the number.
    writes: "symbols", each of them one token; or "text", one string that the tokenizer spells as it likes.
    new_images: what an image added later gets, for people to read.
    """

    name: ClassVar[str]
    writes: ClassVar[Literal["symbols", "text"]]
    new_images: ClassVar[str]

    @property
    def needs(self) -> frozenset[Need]:
        """See above."""

    def fit(self, images: ImageFacts, *, seed: int) -> list[Identifier]:
        """Name the images of a new index. The same images and seed give the same identifiers."""

    def extend(self, images: ImageFacts, taken: Collection[Identifier]) -> list[Identifier]:
        """Name images that come later, after `fit` or `restore`; `new_symbols` and `arrays` may grow.

        Args:
            taken: the identifiers in use, as this scheme made them. None of them changes, none is given again.
        """

    def new_symbols(self) -> list[str]:
        """Symbols that the tokenizer must get, in a fixed order: `extend` appends. Empty if it has them all."""

    def codes_per_level(self) -> tuple[int, ...]:
        """How many symbols each level can choose from; what is longer has a suffix. Empty where that is not fixed."""

    def options(self) -> dict[str, Any]:
        """What a manifest keeps, enough for `get_scheme(name, **options)`."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What else is to be stored beside the manifest: frozen codebooks, the next number."""

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
        IdentifierError: nobody registered the name, or the scheme does not take the options.
    """
    from llama_index_genret.identifiers import atomic, numeric, semantic, structured  # noqa: F401  they register

    if name not in _SCHEMES:
        raise IdentifierError(f"there is no scheme {name!r}: choose one of {sorted(_SCHEMES)}.")
    try:
        return _SCHEMES[name](**options)
    except TypeError as error:
        raise IdentifierError(f"the scheme {name!r} does not take the options {options}: {error}.") from error


Key = TypeVar("Key", bound=Hashable)


class FirstFree(Generic[Key]):
    """Gives each image the first of its candidates that is free, in time linear in the names given.

        for image: name = next(c for c in candidates(image) if c not in taken); taken.add(name)

    Images of one key share one iterator over their candidates: what was taken once stays taken.
    """

    def __init__(self, taken: Iterable[Identifier], candidates: Callable[[Key], Iterator[Identifier]]) -> None:
        self._taken = set(taken)
        self._candidates = candidates
        self._open: dict[Key, Iterator[Identifier]] = {}

    def name(self, key: Key) -> Identifier:
        """The next free name of `key`; `candidates` must not end."""
        if key not in self._open:
            self._open[key] = self._candidates(key)
        name = next(candidate for candidate in self._open[key] if candidate not in self._taken)
        self._taken.add(name)
        return name


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
