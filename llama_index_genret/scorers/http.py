"""Requests to a vLLM server: a deadline, a bounded number of tries, and errors that say what to do.

A request of ours changes nothing on a server, so it may be sent again: where the connection failed before an answer was
there, and where the server said that it cannot answer now. An answer that has arrived is never asked for again.

Knows HTTP; nothing of prompts or tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from tenacity import (
    AsyncRetrying,
    Retrying,
    retry_if_exception_type,
    retry_if_not_exception_type,
    retry_if_result,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from llama_index_genret.errors import ServerError, ServerUnreachable

TRIES = 3
"""How often a request is sent at most."""

BUSY = frozenset({429, 502, 503, 504})
"""Status codes of a server that may answer later."""


@dataclass(frozen=True)
class Server:
    """Where a server is, and how it is asked.

    api_base: address up to `/v1`. timeout_s: of one request, connecting and further tries included. headers: sent with
    each request, beside the key.
    """

    api_base: str
    api_key: str = field(default="EMPTY", repr=False)
    timeout_s: float = 60.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection that is kept while inside."""
        with httpx.Client(**self._options()) as client:
            yield Connection(self, client)

    @asynccontextmanager
    async def async_connection(self) -> AsyncIterator[AsyncConnection]:
        """The same for the running event loop."""
        async with httpx.AsyncClient(**self._options()) as client:
            yield AsyncConnection(self, client)

    def url(self, path: str) -> str:
        """Of a path below `api_base`."""
        return f"{self.api_base.rstrip('/')}{path}"

    def policy(self) -> dict[str, Any]:
        """When a request is sent again, as tenacity takes it."""
        broken = retry_if_exception_type(httpx.TransportError) & retry_if_not_exception_type(httpx.TimeoutException)
        return {
            "retry": broken | retry_if_result(lambda answer: answer.status_code in BUSY),
            "stop": stop_after_attempt(TRIES) | stop_before_delay(self.timeout_s),
            "wait": wait_random_exponential(multiplier=0.2, max=2.0),
            "retry_error_callback": lambda state: state.outcome and state.outcome.result(),
        }

    def _options(self) -> dict[str, Any]:
        secure = self.api_base.startswith("https")
        return {
            "headers": {"Authorization": f"Bearer {self.api_key}", **self.headers},
            "verify": httpx.create_ssl_context() if secure else False,
        }


class Connection:
    """A client of one server."""

    def __init__(self, server: Server, client: httpx.Client) -> None:
        self._server, self._client = server, client

    def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """Send `body` as JSON.

        Raises:
            ServerUnreachable: nothing answered, in time or at all.
        """
        url, end = self._server.url(path), time.monotonic() + self._server.timeout_s

        def once() -> httpx.Response:
            return self._client.request(method, url, json=body, timeout=max(1e-3, end - time.monotonic()))

        with server_errors(url):
            return Retrying(**self._server.policy())(once)


class AsyncConnection:
    """The same for an event loop."""

    def __init__(self, server: Server, client: httpx.AsyncClient) -> None:
        self._server, self._client = server, client

    async def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """As `Connection.request`."""
        url, end = self._server.url(path), time.monotonic() + self._server.timeout_s

        async def once() -> httpx.Response:
            left = max(1e-3, end - time.monotonic())
            return await asyncio.wait_for(self._client.request(method, url, json=body, timeout=left), left)

        with server_errors(url):
            answer: httpx.Response = await AsyncRetrying(**self._server.policy())(once)
            return answer


@contextmanager
def server_errors(url: str) -> Iterator[None]:
    """Turn httpx's errors into ours, which tell what to do."""
    try:
        yield
    except httpx.ConnectError as error:
        raise ServerUnreachable(
            f"no server answers at {url}: {error}. Start one with `genret serve INDEX`, or correct the address."
        ) from error
    except (httpx.TimeoutException, asyncio.TimeoutError) as error:
        raise ServerUnreachable(
            f"{url} did not answer in time: {error!r}. Raise timeout_s, or look at the server."
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerUnreachable(f"the connection to {url} failed: {error!r}.") from error


def json_object(answer: httpx.Response) -> dict[str, Any]:
    """The object in a server's answer.

    Raises:
        ServerError: it is an error, or no JSON object.
    """
    if answer.status_code in BUSY:
        raise ServerError(
            f"{answer.url} answered {answer.status_code}, and so did further tries: {answer.text[:500]}. "
            "The server is overloaded, or its engine has died: look at its log."
        )
    if answer.status_code != 200:
        raise ServerError(f"{answer.url} answered {answer.status_code}: {answer.text[:500]}")
    try:
        body = answer.json()
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{answer.url} answered no JSON: {answer.text[:200]!r}. Is it a vLLM server?") from error
    if not isinstance(body, dict):
        raise ServerError(f"{answer.url} answered {type(body).__name__}, not an object. Is it a vLLM server?")
    return body
