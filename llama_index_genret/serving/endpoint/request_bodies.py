"""Bodies of requests: how large they may be, alone and together, and how long they may take.

An ASGI server hands a body on as it comes; who reads it whole must know when to stop. Knows ASGI; nothing of recall.
Loads in the server only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from llama_index_genret.serving.endpoint.limits import Limits
from llama_index_genret.serving.endpoint.schema import RecallErrorDetail, RecallErrorResponse

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MIB = 2**20
RETRY_AFTER_S = 1


class Bodies:
    """All bodies that a server holds."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    async def serve(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """Let `app` answer a request whose body keeps to the limits; else answer 413, 408 or 503."""
        body = _Body(self, dict(scope["headers"]), receive)
        try:
            await app(scope, body.receive, body.closing(send))
        finally:
            self._held -= body.size

    def take(self, size: int) -> None:
        """Hold so many bytes more.

        Raises:
            HTTPException: there are too many.
        """
        self._held += size
        if self._held > self._limits.bodies_mib * MIB:
            raise HTTPException(503, f"the bodies of all requests exceed {self._limits.bodies_mib} MiB: try again.")

    @property
    def limits(self) -> Limits:
        """What bodies must keep to."""
        return self._limits


class _Body:
    """Of one request. What is too large is read to its end, and dropped, so that the client hears of it."""

    def __init__(self, bodies: Bodies, headers: Mapping[bytes, bytes], receive: Receive) -> None:
        self._bodies, self._receive = bodies, receive
        self._announced = int(headers.get(b"content-length", b"0"))
        self._waits_for_leave = b"expect" in headers
        self._end = time.monotonic() + bodies.limits.body_s
        self._is_read = self._is_refused = False
        self.size = 0

    async def receive(self) -> Message:
        """As ASGI's. Raises HTTPException where the body does not keep to the limits."""
        if self._is_read:
            return await self._receive()
        try:
            self._check(self._announced)
            message = await self._next()
            self._take(len(message.get("body", b"")))
        except HTTPException:
            self._is_refused = True
            if self.size or not self._waits_for_leave:
                await self._drop()
            raise
        return message

    async def _next(self) -> Message:
        left = self._end - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.0))
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the body was not there within {self._bodies.limits.body_s} s.") from None
        self._is_read = not message.get("more_body", False)
        return message

    def _take(self, size: int) -> None:
        self.size += size
        self._bodies.take(size)
        self._check(self.size)

    def _check(self, size: int) -> None:
        if size > self._bodies.limits.body_mib * MIB:
            raise HTTPException(413, f"the body is larger than {self._bodies.limits.body_mib} MiB.")

    async def _drop(self) -> None:
        while not self._is_read and time.monotonic() < self._end:
            try:
                await self._next()
            except HTTPException:
                return

    def closing(self, send: Send) -> Send:
        """`send`, but that the connection ends after a refusal: what comes after is no request."""

        async def sent(message: Message) -> None:
            if self._is_refused and message["type"] == "http.response.start":
                retry = [(b"retry-after", str(RETRY_AFTER_S).encode())] if message["status"] == 503 else []
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close"), *retry]}
            await send(message)

        return sent


def refusal(status: int, kind: str, words: str) -> JSONResponse:
    """In the shape of the OpenAI API's errors. One of 503 says when to come again."""
    body = RecallErrorResponse(error=RecallErrorDetail(message=words, type=kind, code=status)).model_dump()
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return JSONResponse(body, status_code=status, headers=headers)
