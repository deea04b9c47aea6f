"""Clients that misuse a connection: they cut it, fall silent, read or write a byte a second, or send too much.

Each client returns what the server, or the proxy before it, did wrong, or an empty text. The server must end each
connection within `limit_s`, and answer a client that can still read. Depends on sockets and HTTP; independent of
indexes and models.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

ESTABLISHED = 1
"""The value of `TCP_INFO` for an open socket."""

CHUNK = 2**20
MUCH = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW_BYTES = 4
PIPELINED = 2000
"""Number of requests that a slow reader sends at once. Their answers do not fit into the system's buffers."""


@dataclass(frozen=True)
class Target:
    """The server: its address, an index that it serves, its time limit for a faulty client, and its largest body."""

    host: str
    port: int
    index: str
    limit_s: float
    body_bytes: int


class Line:
    """A connection that is used byte by byte."""

    def __init__(self, target: Target) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self._target, self._loop = target, asyncio.get_running_loop()
        self.sent = 0

    async def __aenter__(self) -> Line:
        await asyncio.wait_for(self._loop.sock_connect(self.socket, (self._target.host, self._target.port)), 30)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.socket.close()

    async def write(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.socket, data)

    async def read(self, size: int) -> bytes:
        return await self._loop.sock_recv(self.socket, size)

    async def nibble(self) -> None:
        """Read a byte and send another request. The system reports a cut only to a socket that writes."""
        with suppress(BlockingIOError):
            self.sent += self.socket.send((MUCH * PIPELINED)[self.sent % len(MUCH) :])
        with suppress(BlockingIOError):
            self.socket.recv(1)

    def reset(self) -> None:
        """Reset the connection, so that the server sees an error and no end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    @property
    def is_open(self) -> bool:
        """Return True if the server has neither closed nor reset it."""
        return self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED

    async def ends(self, do: Callable[[], Awaitable[object]], every_s: float = 1.0) -> str:
        """Repeat an action every second until the server ends the connection, which it must do within the limit."""
        start = time.monotonic()
        while self.is_open:
            if time.monotonic() - start > self._target.limit_s:
                return f"is kept for more than {self._target.limit_s:.0f} s"
            with suppress(ConnectionError):
                await do()
            await asyncio.sleep(every_s)
        return ""

    async def answered(self, statuses: tuple[int, ...]) -> str:
        """Read the head of an answer, which must have one of the statuses. The answer may also be cut off."""
        head = b""
        try:
            while b"\r\n" not in head and (got := await asyncio.wait_for(self.read(4096), self._target.limit_s)):
                head += got
        except ConnectionError:
            pass
        except asyncio.TimeoutError:
            return f"is not answered within {self._target.limit_s:.0f} s"
        found = head.split(b" ")[1:2]
        return "" if not head or int(found[0]) in statuses else f"is answered with {head[:80]!r}, not {statuses}"


def head(route: str, length: int | None, more: str = "") -> bytes:
    """Return the head of a POST request. Without a length its body is chunked."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{size}\r\n{more}\r\n".encode()


def recall_body(target: Target) -> bytes:
    return json.dumps({"query": "red dog", "index": target.index, "k": 5}).encode()


async def reset(target: Target, draw: random.Random) -> str:
    """Cut the connection anywhere: in the head, in the body, during the search, during the answer."""
    async with Line(target) as line:
        body = recall_body(target)
        request = head("/v1/recall", len(body)) + body
        cut = draw.choice([draw.randrange(len(request)), len(request)])
        await line.write(request[:cut])
        await asyncio.sleep(draw.uniform(0, 0.3))
        line.reset()
    return ""


async def silent(target: Target, draw: random.Random) -> str:
    """Send nothing, or stop in the middle. To the server this is a cut network."""
    async with Line(target) as line:
        request = head("/v1/recall", 500)
        await line.write(draw.choice([b"", request[:30], request, request + b'{"query": "red']))
        return await line.ends(lambda: asyncio.sleep(0))


async def slow_head(target: Target, draw: random.Random) -> str:
    """Send a header that never ends."""
    async with Line(target) as line:
        await line.write(head("/v1/recall", 500)[:-2])
        return await line.ends(lambda: line.write(b"x" if draw.random() < 0.9 else b": y\r\nx"))


async def slow_body(target: Target, draw: random.Random) -> str:
    """Send the end of a body byte by byte. The server must answer it like any other."""
    async with Line(target) as line:
        body, chunked = recall_body(target), draw.random() < 0.5
        *pieces, last = [body[:-SLOW_BYTES], *(body[-n:][:1] for n in range(SLOW_BYTES, 0, -1))]
        await line.write(head("/v1/recall", None if chunked else len(body)))
        for piece in pieces:
            await line.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await asyncio.sleep(1.0)
        await line.write(b"1\r\n%b\r\n0\r\n\r\n" % last if chunked else last)
        return await line.answered((200, 503))


async def slow_reader(target: Target, draw: random.Random) -> str:
    """Request much and read little."""
    async with Line(target) as line:
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return await line.ends(line.nibble)


async def oversized(target: Target, draw: random.Random) -> str:
    """Send more than the server accepts, announced or not, to any route."""
    async with Line(target) as line:
        route, chunked = draw.choice(["/v1/recall", "/v1/chat/completions", "/v1/completions"]), draw.random() < 0.5
        await line.write(head(route, None if chunked else target.body_bytes + CHUNK))
        sending = asyncio.create_task(_flood(line, target.body_bytes + CHUNK, chunked))
        try:
            return await line.answered((413, 503))
        finally:
            sending.cancel()
            await asyncio.wait({sending})


async def _flood(line: Line, length: int, chunked: bool) -> None:
    with suppress(ConnectionError):
        for _ in range(0, length, CHUNK):
            await line.write(b"%x\r\n" % CHUNK + b" " * CHUNK + b"\r\n" if chunked else b" " * CHUNK)


FAULTS: Mapping[str, Callable[[Target, random.Random], Awaitable[str]]] = {
    "reset": reset,
    "silent": silent,
    "slow head": slow_head,
    "slow body": slow_body,
    "slow reader": slow_reader,
    "oversized": oversized,
}
