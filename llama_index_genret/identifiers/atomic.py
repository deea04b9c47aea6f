"""`atomic`: one new symbol an image. GRACE's atomic identifiers (arXiv:2402.10805), after DSI (arXiv:2202.06991).

Knows nothing of the images. The vocabulary grows with the corpus: every image costs a row of the embeddings.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from llama_index_genret.identifiers.base import Identifier, register_scheme
from llama_index_genret.identifiers.numeric import CountingScheme


@register_scheme("atomic")
class AtomicScheme(CountingScheme):
    """`<i_42>`. An image added later brings a symbol, and so a row, guessed from the picture until trained."""

    name: ClassVar[str] = "atomic"
    writes: ClassVar[Literal["symbols", "text"]] = "symbols"
    new_images: ClassVar[str] = "a new symbol, whose row is guessed from the picture until it is trained"

    def identifier_of(self, number: int) -> Identifier:
        """See `CountingScheme.identifier_of`."""
        return (f"<i_{number}>",)

    def new_symbols(self) -> list[str]:
        """The symbols of all images ever named, `<i_0>` first; `extend` appends."""
        return [f"<i_{number}>" for number in range(self._next)]

    def codes_per_level(self) -> tuple[int, ...]:
        """One level, with a symbol for every image ever named."""
        return (self._next,)
