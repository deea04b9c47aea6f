"""Clients that misuse a connection: cut it, fall silent, write or read a byte a second, send what is too large.

Each returns what is wrong with what the server, or the proxy before it, did; empty if it did right: it ends each of
them within `limit_s`, and answers who can still read. Knows sockets and HTTP; nothing of indexes or models.
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
"""Of a socket's states, in `TCP_INFO`."""

CHUNK = 2**20
MUCH = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW_BYTES = 4
PIPELINED = 2000
"""Requests that a slow reader sends at once: their answers do not fit into the system's buffers."""


@dataclass(frozen=True)
class Target:
    """The server: where it listens, an index that it serves, how long it may keep a client that misbehaves, and the
    largest body that it takes."""

    host: str
    port: int
    index: str
    limit_s: float
    body_bytes: int


class Line:
    """One connection, used byte by byte."""

    def __init__(self, target: Target) -> None:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self._target, self._loop = target, asyncio.get_running_loop()
        self.asked = 0

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
        """Read a byte and ask once more: the system tells of a cut only who writes."""
        with suppress(BlockingIOError):
            self.asked += self.socket.send((MUCH * PIPELINED)[self.asked % len(MUCH) :])
        with suppress(BlockingIOError):
            self.socket.recv(1)

    def reset(self) -> None:
        """Cut it, so that the server sees an error and no end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    @property
    def is_open(self) -> bool:
        """Whether the server has neither closed nor cut it."""
        return self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED

    async def ends(self, do: Callable[[], Awaitable[object]], every_s: float = 1.0) -> str:
        """Do something every second until the server ends the connection, which it must within the limit."""
        start = time.monotonic()
        while self.is_open:
            if time.monotonic() - start > self._target.limit_s:
                return f"is kept for more than {self._target.limit_s:.0f} s"
            with suppress(ConnectionError):
                await do()
            await asyncio.sleep(every_s)
        return ""

    async def answered(self, statuses: tuple[int, ...]) -> str:
        """Read the head of an answer, which must have one of the statuses; an answer may also be cut off."""
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
    """Of a POST request; without a length its body comes in chunks."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{size}\r\n{more}\r\n".encode()


def recall_body(target: Target) -> bytes:
    return json.dumps({"query": "red dog", "index": target.index, "k": 5}).encode()


async def reset(target: Target, draw: random.Random) -> str:
    """Cut anywhere: in the head, in the body, while the search runs, while the answer comes."""
    async with Line(target) as line:
        body = recall_body(target)
        request = head("/v1/recall", len(body)) + body
        cut = draw.choice([draw.randrange(len(request)), len(request)])
        await line.write(request[:cut])
        await asyncio.sleep(draw.uniform(0, 0.3))
        line.reset()
    return ""


async def silent(target: Target, draw: random.Random) -> str:
    """Says nothing, or stops in the middle: what a cut network looks like from the server."""
    async with Line(target) as line:
        request = head("/v1/recall", 500)
        await line.write(draw.choice([b"", request[:30], request, request + b'{"query": "red']))
        return await line.ends(lambda: asyncio.sleep(0))


async def slow_head(target: Target, draw: random.Random) -> str:
    """A header that never ends."""
    async with Line(target) as line:
        await line.write(head("/v1/recall", 500)[:-2])
        return await line.ends(lambda: line.write(b"x" if draw.random() < 0.9 else b": y\r\nx"))


async def slow_body(target: Target, draw: random.Random) -> str:
    """Sends the end of its body by the byte, and must be answered as any other."""
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
    """Asks for much and reads little."""
    async with Line(target) as line:
        line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return await line.ends(line.nibble)


async def oversized(target: Target, draw: random.Random) -> str:
    """More than the server takes: announced or not, to any route."""
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
