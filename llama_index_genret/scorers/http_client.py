"""Send requests to a vLLM server, with a deadline, a bounded number of tries, and errors that name the fix.

Our requests change nothing on a server, so they can be retried. The client retries if the connection failed before a
response arrived, or if the server responds that it is busy or unavailable. It never repeats a request after any other
response. It does not follow redirects, because the key is for one server.

Depends on HTTP; independent of prompts and tokens.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from threading import Thread
from typing import Any, NoReturn, Protocol
from urllib.parse import unquote

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    retry_if_not_exception_type,
    retry_if_result,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from llama_index_genret.errors import ServerError, ServerUnreachable
from llama_index_genret.scorers.circuit_breaker import Circuit

TRIES = 3
"""Maximum number of times a request is sent."""

BUSY = frozenset({429, 502, 503, 504})
"""Status codes after which a request is retried."""

UNAVAILABLE = BUSY - {429}
"""Status codes that `Circuit` counts as failures."""

SHORTEST_SECRET = 8
"""Minimum length of the keys and headers that are redacted; a message may contain shorter ones as ordinary words."""

_SECRETS = "genret_secrets"


class Clock(Protocol):
    """A source of time and of pauses. Tests replace it to avoid waiting."""

    def now(self) -> float:
        """Return seconds since a fixed moment."""

    def sleep(self, seconds: float) -> None:
        """Wait in this thread."""

    async def asleep(self, seconds: float) -> None:
        """Wait in the running event loop."""


class SystemClock:
    """The clock of the system."""

    def now(self) -> float:
        """Return `time.monotonic`."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Call `time.sleep`."""
        time.sleep(seconds)

    async def asleep(self, seconds: float) -> None:
        """Call `asyncio.sleep`."""
        await asyncio.sleep(seconds)


@dataclass(frozen=True)
class Server:
    """The address and the credentials of a server. It cannot be pickled, because it may hold a key.

    api_base: address up to `/v1`.
    api_key: bearer token, default "EMPTY".
    timeout_s: seconds for one request, connecting and retries included, default 60.
    headers: sent with each request in addition to the key, default none.
    circuit: circuit breaker that all requests to the server share, default a new one.
    clock: measures the deadline and passes the pauses between tries, default the system's. A single try is limited in
        real time.
    """

    api_base: str
    api_key: str = "EMPTY"
    timeout_s: float = 60.0
    headers: Mapping[str, str] = field(default_factory=dict)
    circuit: Circuit = field(default_factory=Circuit, compare=False)
    clock: Clock = field(default_factory=SystemClock, compare=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_address(self.api_base)!r}, timeout_s={self.timeout_s})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} may hold a key and cannot be pickled: create it in the process that needs it.")

    def __deepcopy__(self, memo: Any) -> Server:
        return self

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Open a connection that stays open inside the `with` block."""
        with httpx.Client(**self._options()) as client:
            yield Connection(self, client)

    @asynccontextmanager
    async def async_connection(self) -> AsyncIterator[AsyncConnection]:
        """Open a connection inside the running event loop."""
        async with httpx.AsyncClient(**self._options()) as client:
            yield AsyncConnection(self, client)

    def url(self, path: str) -> str:
        """Return the URL of a path below `api_base`, without the login, which httpx would log."""
        return f"{_without_login(self.api_base).rstrip('/')}{path}"

    def policy(self) -> dict[str, Any]:
        """Return the retry policy as arguments of tenacity."""
        broken = retry_if_exception_type(httpx.TransportError) & retry_if_not_exception_type(httpx.TimeoutException)
        return {
            "retry": broken | retry_if_result(lambda response: response.status_code in BUSY),
            "stop": stop_after_attempt(TRIES) | stop_before_delay(self.timeout_s),
            "wait": _pause,
            "retry_error_callback": lambda state: state.outcome and state.outcome.result(),
        }

    @contextmanager
    def guarded(self, path: str) -> Iterator[Callable[[httpx.Response], httpx.Response]]:
        """Wrap one request with the circuit breaker and our errors, without secrets in messages.

        Yields:
            A function that the caller must call with the response, and that returns it.
        """
        url = shown_address(self.url(path))
        with self.circuit.request(url) as request, server_errors(url, self.secrets):

            def accept(response: httpx.Response) -> httpx.Response:
                if response.status_code in UNAVAILABLE:
                    request.failure = f"it answered {response.status_code}."
                response.extensions[_SECRETS] = self.secrets
                return response

            yield accept

    @property
    def secrets(self) -> tuple[str, ...]:
        """Return the texts that no message may contain, longest first."""
        login = _login(self.api_base)
        held = {self.api_key, *self.headers.values(), login, login.partition(":")[2]}
        return tuple(sorted((one for one in held if len(one) >= SHORTEST_SECRET), key=len, reverse=True))

    def _options(self) -> dict[str, Any]:
        secure = self.api_base.startswith("https")
        user, _, password = map(unquote, _login(self.api_base).partition(":"))
        return {
            "headers": {"Authorization": f"Bearer {self.api_key}", **self.headers},
            "auth": httpx.BasicAuth(user, password) if user or password else None,
            "verify": httpx.create_ssl_context() if secure else False,
        }


class Connection:
    """A client of one server. Threads may share it."""

    def __init__(self, server: Server, client: httpx.Client) -> None:
        self._server, self._client = server, client

    def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """Send `body` as JSON.

        Raises:
            ServerUnreachable: the server did not respond, in time or at all.
        """
        url, clock = self._server.url(path), self._server.clock
        end = clock.now() + self._server.timeout_s

        def once() -> httpx.Response:
            left = max(1e-3, end - clock.now())
            return _within(left, lambda: self._client.request(method, url, json=body, timeout=left))

        with self._server.guarded(path) as accept:
            return accept(Retrying(sleep=clock.sleep, **self._server.policy())(once))


class AsyncConnection:
    """A `Connection` for an event loop."""

    def __init__(self, server: Server, client: httpx.AsyncClient) -> None:
        self._server, self._client = server, client

    async def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """See `Connection.request`."""
        url, clock = self._server.url(path), self._server.clock
        end = clock.now() + self._server.timeout_s

        async def once() -> httpx.Response:
            left = max(1e-3, end - clock.now())
            return await asyncio.wait_for(self._client.request(method, url, json=body, timeout=left), left)

        with self._server.guarded(path) as accept:
            return accept(await AsyncRetrying(sleep=clock.asleep, **self._server.policy())(once))


@contextmanager
def server_errors(url: str, secrets: tuple[str, ...] = ()) -> Iterator[None]:
    """Turn the errors of httpx into ours, which name the fix."""
    try:
        yield
    except httpx.ConnectError as error:
        raise ServerUnreachable(
            f"no server answers at {url}: {_redact(str(error), secrets)}. Start one with `genret serve INDEX`, or "
            "correct the address."
        ) from error
    except (httpx.TimeoutException, asyncio.TimeoutError, FutureTimeout) as error:
        raise ServerUnreachable(
            f"{url} did not respond in time: {error!r}. Raise timeout_s, or check the server's log."
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerUnreachable(f"the connection to {url} failed: {_redact(repr(error), secrets)}.") from error


def json_object(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object in the body of a response.

    Raises:
        ServerError: the status is not 200, or the body is no JSON object.
    """
    where, text = response_address(response), partial_text(response)
    if response.status_code in BUSY:
        raise ServerError(
            f"{where} answered {response.status_code} to the last try: {text}. "
            "The server is overloaded, or its engine has died: check its log."
        )
    if response.status_code != 200:
        raise ServerError(f"{where} answered {response.status_code}: {text}")
    try:
        body = json.loads(response.content, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{where} returned no JSON: {text[:200]!r}. Check that it is a vLLM server.") from error
    if not isinstance(body, dict):
        raise ServerError(
            f"{where} returned JSON of type {type(body).__name__}, not an object. Check that it is a vLLM server."
        )
    return body


def json_objects(response: httpx.Response, key: str) -> list[dict[str, Any]]:
    """Return the list of objects under a key of the JSON object in a response.

    Raises:
        ServerError: `json_object` raises it, or the key has no such list.
    """
    objects = json_object(response).get(key)
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise ServerError(f"{response_address(response)} returned no list of {key}. Check that it is a vLLM server.")
    return objects


def response_address(response: httpx.Response) -> str:
    """Return the address that responded, without secrets, for a message."""
    return shown_address(str(response.url))


def partial_text(response: httpx.Response) -> str:
    """Return the beginning of the body for a message, redacted: a server or proxy may repeat the key."""
    return _redact(response.text[:2000], response.extensions.get(_SECRETS, ()))[:500]


def shown_address(url: str) -> str:
    """Return an address without user, password and query string."""
    return _without_login(url).partition("?")[0]


_LOGIN = re.compile(r"^([a-z]+://)?([^/@]*)@", re.IGNORECASE)


def _login(url: str) -> str:
    match = _LOGIN.match(url)
    return match[2] if match else ""


def _without_login(url: str) -> str:
    return _LOGIN.sub(lambda match: match[1] or "", url)


def _redact(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _pause(state: RetryCallState) -> float:
    """Return the seconds before the next try: random with exponential growth, but at least the `Retry-After`."""
    outcome = state.outcome
    header = "" if outcome is None or outcome.failed else outcome.result().headers.get("Retry-After", "")
    return max(_JITTER(state), _retry_after_s(header))


_JITTER = wait_random_exponential(multiplier=0.2, max=2.0)


def _retry_after_s(header: str) -> float:
    """Return the seconds of a `Retry-After` header (RFC 9110: seconds or a date), or 0 for any other text."""
    if re.fullmatch(r"[0-9]{1,9}", header.strip()):
        return float(header)
    try:
        return parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, TypeError):
        return 0.0


def _within(seconds: float, call: Callable[[], httpx.Response]) -> httpx.Response:
    """Return the result of `call`, or raise TimeoutError when the time is over.

    httpx limits the time of each read, not of all reads together. A server that sends one byte now and then, or a slow
    name server, could therefore block for ever. After a timeout the thread of the call ends with its connection.
    """
    done: Future[httpx.Response] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # raised in the waiting thread
            done.set_exception(error)

    Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    return done.result(seconds)
