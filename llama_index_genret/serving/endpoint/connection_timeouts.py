"""Connections that cost a server something and bring nothing: ended after a while.

uvicorn waits without end for a request's head, for a client that reads nothing, and for both when it stops. Its
protocol class is what it lets one choose; the rest is set at the socket, and watched by the system.

Knows uvicorn and sockets; nothing of requests. Loads in the server only.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from llama_index_genret.serving.endpoint.limits import Limits

PROBES = 3
"""Unanswered ones after which the other end is gone."""

AFTER_S = 2
"""For what goes on when its connection was cut, when the server stops."""


def guard(server: Any, limits: Limits) -> None:
    """Let `server`, a `uvicorn.Server` that takes no connections yet, keep to the limits."""
    server.config.http_protocol_class = guarded(server.config.http_protocol_class, limits)
    server.config.timeout_graceful_shutdown = limits.stop_s + AFTER_S


def guarded(protocol: type[Any], limits: Limits) -> type[Any]:
    """A protocol class of uvicorn's that ends a connection on which no request begins within `head_s`.

    Looked at every `head_s`: it ends between one and two times that after the last request's answer.
    """

    class Guarded(protocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if (opened := transport.get_extra_info("socket")) is not None:
                watch(opened, limits.stalled_s)
            self._later = self.loop.call_later(limits.head_s, self._look, None)

        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            self._later.cancel()

        def shutdown(self) -> None:
            super().shutdown()
            self.loop.call_later(limits.stop_s, self.transport.abort)

        def _look(self, waited_since: Any) -> None:
            if self.transport.get_protocol() is not self or self.transport.is_closing():  # a WebSocket now, or done
                return
            answered = self.cycle is None or self.cycle.response_complete
            is_waiting = answered and self.timeout_keep_alive_task is None  # else uvicorn waits for the first byte
            if is_waiting and self.cycle is waited_since:
                self.transport.abort()
                return
            self._later = self.loop.call_later(limits.head_s, self._look, self.cycle if is_waiting else limits)

    return Guarded


def watch(opened: Any, stalled_s: int) -> None:
    """Let the system cut a TCP connection whose other end is gone, or takes nothing of what is sent, for so long."""
    if opened.family not in (socket.AF_INET, socket.AF_INET6):
        return
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every_s = max(1, stalled_s // (PROBES + 1))
    for name, value in (
        ("TCP_KEEPIDLE", every_s),
        ("TCP_KEEPINTVL", every_s),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", 1000 * stalled_s),
    ):
        if hasattr(socket, name):  # all of them on Linux
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
