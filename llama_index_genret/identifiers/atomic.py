"""`atomic`: one new symbol an image. GRACE's atomic identifiers (arXiv:2402.10805), after DSI (arXiv:2202.06991).

Knows nothing of the images. The vocabulary grows with the corpus: every image costs a row of the embeddings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from numpy.typing import NDArray

from llama_index_genret.identifiers.base import Identifier, ImageFacts, Need, register_scheme
from llama_index_genret.identifiers.numbers import RunningNumber


@register_scheme("atomic")
class AtomicScheme:
    """`<i_42>`. An image added later brings a symbol, and so a row, which must be trained."""

    name: ClassVar[str] = "atomic"
    needs: ClassVar[frozenset[Need]] = frozenset()
    writes: ClassVar[Literal["symbols", "text"]] = "symbols"
    new_images: ClassVar[str] = "a new symbol; its embedding row must be appended and trained before it is recalled"

    def __init__(self) -> None:
        self._number = RunningNumber()

    def fit(self, images: ImageFacts, *, seed: int) -> list[Identifier]:
        """See `Scheme.fit`; only the number of images is used."""
        return self.extend(images, ())

    def extend(self, images: ImageFacts, taken: Collection[Identifier]) -> list[Identifier]:
        """See `Scheme.extend`. `new_symbols` grows by the new ones, at its end."""
        return self._number.take(images.n_images, taken, lambda number: (f"<i_{number}>",))

    def new_symbols(self) -> list[str]:
        """The symbols of all images ever named, `<i_0>` first."""
        return [f"<i_{number}>" for number in range(self._number.next)]

    def codes_per_level(self) -> tuple[int, ...]:
        """One level, with a symbol for every image ever named."""
        return (self._number.next,)

    def options(self) -> dict[str, Any]:
        """None."""
        return {}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """`next_number`: (1,) int64."""
        return self._number.arrays()

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take back what `arrays` gave."""
        self._number.restore(arrays)
