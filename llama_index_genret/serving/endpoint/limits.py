"""The limits of the recall routes, and the admission of queries within them.

Without a limit every waiting query takes memory, and all of them wait longer than their clients do. Connections and the
other routes of the server are limited by a proxy before it.

Depends on numbers and their names; independent of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from llama_index_genret.errors import GenretError, ServerError

LIMITS_VARIABLE = "GENRET_LIMITS"
"""Environment of the server: `name=number` of some of the `Limits`, with spaces between."""


@dataclass(frozen=True)
class Limits:
    """The most that the recall routes take of their clients.

    queries: number of queries that are answered at once; more receive 503 with `Retry-After`.
    body_mib: size of the body of a request in MiB; a larger one receives 413.
    recall_s: seconds until a recall is answered; a longer one ends with 504.
    """

    queries: int = 1024
    body_mib: int = 64
    recall_s: int = 600

    @classmethod
    def from_text(cls, text: str) -> Limits:
        """The defaults, but for those that `text` names.

        Raises:
            ServerError: a name that is none, or no positive whole number.
        """
        known = {field.name for field in fields(cls)}
        given = dict(word.partition("=")[::2] for word in text.split())
        wrong = {name: value for name, value in given.items() if name not in known or not _is_positive(value)}
        if wrong:
            raise ServerError(
                f"{LIMITS_VARIABLE} has {wrong}: give positive whole numbers, {'queries=1024 body_mib=64'!r}, "
                f"of {sorted(known)}."
            )
        return cls(**{name: int(value) for name, value in given.items()})


def _is_positive(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


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
