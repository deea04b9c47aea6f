"""`numeric` and `string`: the running number of the image. GRACE's baselines (arXiv:2402.10805).

Know nothing of the images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from itertools import count
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import IdentifierError
from llama_index_genret.identifiers.base import FirstFree, Identifier, ImageFacts, Need, register_scheme

MOST_DIGITS = 18
"""Of a number of 64 bits."""


class CountingScheme(ABC):
    """What the schemes share that count images. A number is never given twice, even after its image was removed."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self) -> None:
        self._next = 0

    @abstractmethod
    def identifier_of(self, number: int) -> Identifier:
        """The number as an identifier."""

    def fit(self, images: ImageFacts, *, seed: int) -> list[Identifier]:
        """See `Scheme.fit`; only the number of images is used."""
        return self.extend(images, ())

    def extend(self, images: ImageFacts, taken: Collection[Identifier]) -> list[Identifier]:
        """See `Scheme.extend`: the next numbers that are free."""

        def candidates(_: None) -> Iterator[Identifier]:
            for number in count(self._next):
                self._next = number + 1
                yield self.identifier_of(number)

        free = FirstFree(taken, candidates)
        return [free.name(None) for _ in range(images.n_images)]

    def new_symbols(self) -> list[str]:
        """None: digits are in every tokenizer."""
        return []

    def codes_per_level(self) -> tuple[int, ...]:
        """Not fixed: numbers grow longer."""
        return ()

    def options(self) -> dict[str, Any]:
        """None."""
        return {}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`next_number`: (1,) int64."""
        return {"next_number": np.array([self._next], np.int64)}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `arrays` gave."""
        self._next = int(arrays["next_number"][0])


@register_scheme("numeric")
class NumericScheme(CountingScheme):
    """Digits of the running number, one symbol each: `("0", "4", "2")`, on an unmodified tokenizer.

    digits: numbers are padded with zeros to so many; as the first images need if not given. Later ones may be longer.
    """

    name: ClassVar[str] = "numeric"
    writes: ClassVar[Literal["symbols", "text"]] = "symbols"
    new_images: ClassVar[str] = "the next number; the model must be trained on it before it can recall it"

    def __init__(self, digits: int | None = None) -> None:
        super().__init__()
        if digits is not None and not (isinstance(digits, int) and 1 <= digits <= MOST_DIGITS):
            raise IdentifierError(f"digits={digits} must be an integer from 1 to {MOST_DIGITS}.")
        self.digits = digits

    def fit(self, images: ImageFacts, *, seed: int) -> list[Identifier]:
        """See `Scheme.fit`; only the number of images is used."""
        self.digits = self.digits or len(str(max(0, images.n_images - 1)))
        return super().fit(images, seed=seed)

    def identifier_of(self, number: int) -> Identifier:
        """See `CountingScheme.identifier_of`."""
        return tuple(str(number).zfill(self.digits or 1))

    def options(self) -> dict[str, Any]:
        """Digits, as chosen or derived."""
        return {"digits": self.digits}


@register_scheme("string")
class StringScheme(CountingScheme):
    """The running number as a text, `("42",)`, which the tokenizer spells with the pieces of digits that it has."""

    name: ClassVar[str] = "string"
    writes: ClassVar[Literal["symbols", "text"]] = "text"
    new_images: ClassVar[str] = "the next number; the model must be trained on it before it can recall it"

    def identifier_of(self, number: int) -> Identifier:
        """See `CountingScheme.identifier_of`."""
        return (str(number),)
