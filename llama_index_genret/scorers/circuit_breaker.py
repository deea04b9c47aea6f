"""Whether a server that failed again and again is asked at all: a circuit breaker.

    closed      every request goes out; FAILED_REQUESTS that fail in a row open it
    open        none goes out, for OPEN_S seconds: each fails at once, and says why
    half open   one goes out as a probe, the others fail at once; an answer closes the circuit, a failure opens it anew

A request has failed where no answer came, in time or at all, after its last try, or where a proxy or the server says
that it is not there (502, 503, 504). A refusal is an answer. A request that its caller gives up tells nothing.

Safe to share between threads and event loops: the lock is never held while anything is waited for. Knows no HTTP.

Source: Nygard, Release It! (2007), chapter 5.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llama_index_genret.errors import ServerUnreachable

FAILED_REQUESTS = 5
OPEN_S = 5.0


@dataclass
class CircuitRequest:
    """One that goes out. failure: why, where the server is not there although it answered; "" where it is."""

    failure: str = ""


class Circuit:
    """Of one server.

    Args:
        failed_requests, open_s: see above. clock: seconds.
    """

    def __init__(
        self,
        *,
        failed_requests: int = FAILED_REQUESTS,
        open_s: float = OPEN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._open_s, self._clock = failed_requests, open_s, clock
        self._lock = threading.Lock()
        self._failed, self._why = 0, ""
        self._closed, self._asks_at, self._probing = True, 0.0, False

    @contextmanager
    def request(self, where: str) -> Iterator[CircuitRequest]:
        """Around one request, all its tries included, to the address `where`.

        Raises:
            ServerUnreachable: the circuit is open.
        """
        is_probe = self._admitted(where)
        request = CircuitRequest()
        answered = False
        try:
            yield request
            answered = True
        except ServerUnreachable as error:
            request.failure = str(error)
            raise
        finally:
            self._settle(request.failure, is_probe=is_probe, answered=answered)

    def _admitted(self, where: str) -> bool:
        """Whether the request is a probe."""
        with self._lock:
            if self._closed:
                return False
            left = self._asks_at - self._clock()
            if left > 0 or self._probing:
                raise ServerUnreachable(
                    f"{where} is not asked: {self._failed} requests failed one after another. It is tried again "
                    f"{f'in {left:.1f} s' if left > 0 else 'just now'}. The last failure: {self._why}"
                )
            self._probing = True
            return True

    def _settle(self, failure: str, *, is_probe: bool, answered: bool) -> None:
        with self._lock:
            if is_probe:
                self._probing = False
            if failure:
                self._failed, self._why = self._failed + 1, failure
                if is_probe or (self._closed and self._failed >= self._limit):
                    self._closed, self._asks_at = False, self._clock() + self._open_s
            elif answered:
                self._failed, self._closed = 0, True
