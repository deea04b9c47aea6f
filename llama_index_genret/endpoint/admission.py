"""How many queries a server answers at once, and what it says to the others.

Without an end to it, every query that waits takes memory, and all wait longer than their clients do.

Knows numbers; nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llama_index_genret.endpoint.limits import Limits
from llama_index_genret.errors import GenretError


class TooBusy(GenretError):
    """The server has too much to do already."""


class TooSlow(GenretError):
    """A recall took longer than the server lets one take."""


class Admission:
    """Counts the queries that are being answered."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._queries = 0

    @contextmanager
    def of(self, queries: int) -> Iterator[None]:
        """Answer so many inside. A request that is alone is always let in.

        Raises:
            TooBusy: there are too many.
        """
        if self._queries and self._queries + queries > self.limits.queries:
            raise TooBusy(
                f"{self._queries} queries are being answered, and this server takes {self.limits.queries} at once: "
                "try again, or send fewer at a time."
            )
        self._queries += queries
        try:
            yield
        finally:
            self._queries -= queries
