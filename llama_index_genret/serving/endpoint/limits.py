"""The limits of the recall routes, and the admission of queries within them.

Without a limit, waiting queries exhaust memory and time out at their clients. A reverse proxy in front of the server
limits connections and the other routes.

Depends on numbers and their names; independent of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from llama_index_genret.errors import GenretError, ServerError

LIMITS_VARIABLE = "GENRET_LIMITS"
"""Environment variable of the server: `name=number` pairs of `Limits` fields, separated by spaces."""


@dataclass(frozen=True)
class Limits:
    """Limits of the recall routes.

    queries: maximum number of concurrent queries; more receive 503 with `Retry-After`.
    body_mib: maximum size of a request body in MiB; a larger one receives 413.
    recall_s: maximum duration of a recall in seconds; a longer one receives 504.
    """

    queries: int = 1024
    body_mib: int = 64
    recall_s: int = 600

    @classmethod
    def from_text(cls, text: str) -> Limits:
        """Return the default limits with those in `text` replaced.

        Raises:
            ServerError: a name is unknown, or a value is not a positive whole number.
        """
        known = {field.name for field in fields(cls)}
        given = dict(word.partition("=")[::2] for word in text.split())
        wrong = {name: value for name, value in given.items() if name not in known or not _is_positive(value)}
        if wrong:
            raise ServerError(
                f"invalid {LIMITS_VARIABLE}: {wrong}. Set positive whole numbers such as {'queries=1024 body_mib=64'!r}"
                f"; choose from: {', '.join(sorted(known))}."
            )
        return cls(**{name: int(value) for name, value in given.items()})


def _is_positive(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


class TooBusy(GenretError):
    """The server already has its maximum number of concurrent queries."""


class TooSlow(GenretError):
    """A recall took longer than the server allows."""


class Admission:
    """A counter that limits the number of concurrent queries."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._queries = 0

    @contextmanager
    def of(self, queries: int) -> Iterator[None]:
        """Count `queries` more concurrent queries inside the block. A request is always admitted if none is active.

        Raises:
            TooBusy: the limit would be exceeded.
        """
        if self._queries and self._queries + queries > self.limits.queries:
            raise TooBusy(
                f"{self._queries} queries are running, and this server accepts at most {self.limits.queries} at once: "
                "retry later, or send fewer at a time."
            )
        self._queries += queries
        try:
            yield
        finally:
            self._queries -= queries
