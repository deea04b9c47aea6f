"""The `atomic` scheme gives each image one new symbol.

Depends on the number of images; independent of their content. The vocabulary grows with the corpus: every image costs
one row of the embedding matrix.

Source: GRACE's atomic identifiers (arXiv:2402.10805), after DSI (arXiv:2202.06991).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from llama_index_genret.identifiers.base import Identifier, register_scheme
from llama_index_genret.identifiers.numeric import CountingScheme


@register_scheme("atomic")
class AtomicScheme(CountingScheme):
    """Makes identifiers like `<i_42>`. An image that is added later gets a new symbol and embedding row.

    The row is estimated from the image until it is trained.
    """

    name: ClassVar[str] = "atomic"
    writes: ClassVar[Literal["symbols", "text"]] = "symbols"
    new_images: ClassVar[str] = "a new symbol; its embedding row is estimated from the image until it is trained"

    def identifier_of(self, number: int) -> Identifier:
        """See `CountingScheme.identifier_of`."""
        return (f"<i_{number}>",)

    def new_symbols(self) -> list[str]:
        """Return the symbols of all images ever added, `<i_0>` first. `extend` appends."""
        return [f"<i_{number}>" for number in range(self._next)]

    def codes_per_level(self) -> tuple[int, ...]:
        """Return the size of the only level: one symbol for every image ever added."""
        return (self._next,)
