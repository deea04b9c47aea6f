"""`numeric` and `string`: the running number of the image. GRACE's baselines (arXiv:2402.10805).

Know nothing of the images. A number is never given twice, even after its image was removed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import count
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.identifiers.base import FirstFree, Identifier, ImageFacts, Need, register_scheme


class RunningNumber:
    """The state of a scheme that counts: the next number."""

    def __init__(self) -> None:
        self.next = 0

    def take(self, n: int, taken: Collection[Identifier], written: Callable[[int], Identifier]) -> list[Identifier]:
        """The next `n` numbers that are free, as `written`."""

        def candidates(_: None) -> Iterator[Identifier]:
            for number in count(self.next):
                self.next = number + 1
                yield written(number)

        free = FirstFree(taken, candidates)
        return [free.name(None) for _ in range(n)]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`next_number`: (1,) int64."""
        return {"next_number": np.array([self.next], np.int64)}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `arrays` gave."""
        self.next = int(arrays["next_number"][0])


@register_scheme("numeric")
class NumericScheme:
    """Digits of the running number, one symbol each: `("0", "4", "2")`, on an unmodified tokenizer.

    digits: numbers are padded with zeros to so many; as the first images need if not given. Later ones may be longer.
    """

    name: ClassVar[str] = "numeric"
    needs: ClassVar[frozenset[Need]] = frozenset()
    writes: ClassVar[Literal["symbols", "text"]] = "symbols"
    new_images: ClassVar[str] = "the next number; the model must be trained on it before it can recall it"

    def __init__(self, digits: int | None = None) -> None:
        self.digits = digits
        self._number = RunningNumber()

    def fit(self, images: ImageFacts, *, seed: int) -> list[Identifier]:
        """See `Scheme.fit`; only the number of images is used."""
        self.digits = self.digits or len(str(max(0, images.n_images - 1)))
        return self.extend(images, ())

    def extend(self, images: ImageFacts, taken: Collection[Identifier]) -> list[Identifier]:
        """See `Scheme.extend`."""
        width = self.digits or 1
        return self._number.take(images.n_images, taken, lambda number: tuple(str(number).zfill(width)))

    def new_symbols(self) -> list[str]:
        """None: digits are in every tokenizer."""
        return []

    def codes_per_level(self) -> tuple[int, ...]:
        """Not fixed: numbers grow longer."""
        return ()

    def options(self) -> dict[str, Any]:
        """Digits, as chosen or derived."""
        return {"digits": self.digits}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`next_number`: (1,) int64."""
        return self._number.arrays()

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `arrays` gave."""
        self._number.restore(arrays)


@register_scheme("string")
class StringScheme:
    """The running number as a text, `("42",)`, which the tokenizer spells with the pieces of digits that it has."""

    name: ClassVar[str] = "string"
    needs: ClassVar[frozenset[Need]] = frozenset()
    writes: ClassVar[Literal["symbols", "text"]] = "text"
    new_images: ClassVar[str] = "the next number; the model must be trained on it before it can recall it"

    def __init__(self) -> None:
        self._number = RunningNumber()

    def fit(self, images: ImageFacts, *, seed: int) -> list[Identifier]:
        """See `Scheme.fit`; only the number of images is used."""
        return self.extend(images, ())

    def extend(self, images: ImageFacts, taken: Collection[Identifier]) -> list[Identifier]:
        """See `Scheme.extend`."""
        return self._number.take(images.n_images, taken, lambda number: (str(number),))

    def new_symbols(self) -> list[str]:
        """None: it is text."""
        return []

    def codes_per_level(self) -> tuple[int, ...]:
        """Not fixed: the tokenizer spells."""
        return ()

    def options(self) -> dict[str, Any]:
        """None."""
        return {}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`next_number`: (1,) int64."""
        return self._number.arrays()

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `arrays` gave."""
        self._number.restore(arrays)
