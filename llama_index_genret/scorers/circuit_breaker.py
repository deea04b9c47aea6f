"""Stop sending requests to a server that keeps failing: a circuit breaker.

    closed      every request is sent; FAILED_REQUESTS failures in a row open the circuit
    open        no request is sent for OPEN_S seconds: each fails at once with the reason
    half open   one request is sent as a probe, the others fail at once; a response closes the circuit, a failure
                opens it again

A request has failed if no response came, in time or at all, after its last try. It has also failed if a proxy or the
server responds that the server is unavailable (502, 503, 504). An error response such as 400 is not a failure. A
request that its caller cancels counts neither as a failure nor as a success.

Threads and event loops may share a circuit: it never holds its lock while waiting. Independent of HTTP.

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
    """A request that is sent.

    failure: the reason why the server counts as unavailable although it responded; "" if it is available.
    """

    failure: str = ""


class Circuit:
    """The circuit breaker of one server.

    Args:
        failed_requests: number of failures in a row that open the circuit, default FAILED_REQUESTS.
        open_s: seconds for which the circuit stays open, default OPEN_S.
        clock: returns the current time in seconds, default `time.monotonic`.
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
        self._closed, self._probe_at, self._probing = True, 0.0, False

    @contextmanager
    def request(self, where: str) -> Iterator[CircuitRequest]:
        """Wrap one request to the address `where`, all its tries included.

        Raises:
            ServerUnreachable: the circuit is open.
        """
        is_probe = self._admit(where)
        request = CircuitRequest()
        succeeded = False
        try:
            yield request
            succeeded = True
        except ServerUnreachable as error:
            request.failure = str(error)
            raise
        finally:
            self._settle(request.failure, is_probe=is_probe, succeeded=succeeded)

    def _admit(self, where: str) -> bool:
        """Return True if the request is a probe, False if the circuit is closed.

        Raises:
            ServerUnreachable: the circuit is open.
        """
        with self._lock:
            if self._closed:
                return False
            left = self._probe_at - self._clock()
            if left > 0 or self._probing:
                raise ServerUnreachable(
                    f"no request was sent to {where}: the last {self._failed} requests failed. The next one is "
                    f"{f'allowed in {left:.1f} s' if left > 0 else 'in progress'}. Last failure: {self._why}"
                )
            self._probing = True
            return True

    def _settle(self, failure: str, *, is_probe: bool, succeeded: bool) -> None:
        with self._lock:
            if is_probe:
                self._probing = False
            if failure:
                self._failed, self._why = self._failed + 1, failure
                if is_probe or (self._closed and self._failed >= self._limit):
                    self._closed, self._probe_at = False, self._clock() + self._open_s
            elif succeeded:
                self._failed, self._closed = 0, True
