"""The `numeric` and `string` schemes number the images consecutively.

Depends on the number of images; independent of their content.

Source: GRACE's baselines (arXiv:2402.10805).
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
"""Largest number of digits that always fits into 64 bits."""


class CountingScheme(ABC):
    """Base of the schemes that number images. A number is never assigned twice, even if its image was removed."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self) -> None:
        self._next = 0

    @abstractmethod
    def identifier_of(self, number: int) -> Identifier:
        """Return the identifier of a number."""

    def fit(self, images: ImageFacts, *, seed: int) -> list[Identifier]:
        """Assign the first numbers. Only the number of images is used. See `Scheme.fit`."""
        return self.extend(images, ())

    def extend(self, images: ImageFacts, taken: Collection[Identifier]) -> list[Identifier]:
        """Assign the next free numbers. See `Scheme.extend`."""

        def candidates(_: None) -> Iterator[Identifier]:
            for number in count(self._next):
                self._next = number + 1
                yield self.identifier_of(number)

        free = FirstFree(taken, candidates)
        return [free.assign(None) for _ in range(images.n_images)]

    def new_symbols(self) -> list[str]:
        """Return no symbols, as every tokenizer has digits."""
        return []

    def codes_per_level(self) -> tuple[int, ...]:
        """Return (), as numbers have no fixed length."""
        return ()

    def options(self) -> dict[str, Any]:
        """Return no options."""
        return {}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return `next_number`: (1,) int64."""
        return {"next_number": np.array([self._next], np.int64)}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Restore the next number."""
        self._next = int(arrays["next_number"][0])


@register_scheme("numeric")
class NumericScheme(CountingScheme):
    """Makes identifiers like `("0", "4", "2")`: one symbol per digit. The tokenizer stays unmodified.

    digits: numbers are padded with zeros to this many digits, 1 to 18. Default None: as many as the first images
        need. Later numbers may be longer.
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
        """Derive `digits` if it is None, then assign the first numbers. See `Scheme.fit`."""
        self.digits = self.digits or len(str(max(0, images.n_images - 1)))
        return super().fit(images, seed=seed)

    def identifier_of(self, number: int) -> Identifier:
        """See `CountingScheme.identifier_of`."""
        return tuple(str(number).zfill(self.digits or 1))

    def options(self) -> dict[str, Any]:
        """Return `digits`, as given or derived."""
        return {"digits": self.digits}


@register_scheme("string")
class StringScheme(CountingScheme):
    """Makes identifiers like `("42",)`: the number as text, which the tokenizer splits into its own tokens."""

    name: ClassVar[str] = "string"
    writes: ClassVar[Literal["symbols", "text"]] = "text"
    new_images: ClassVar[str] = "the next number; the model must be trained on it before it can recall it"

    def identifier_of(self, number: int) -> Identifier:
        """See `CountingScheme.identifier_of`."""
        return (str(number),)
