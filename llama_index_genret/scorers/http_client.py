"""Requests to a vLLM server: a deadline, a bounded number of tries, and errors that say what to do.

A request of ours changes nothing on a server, so it may be sent again: where the connection failed before an answer was
there, and where the server said that it cannot answer now. An answer that has arrived is never asked for again, and a
redirection is not followed: the key is for one server.

Knows HTTP; nothing of prompts or tokens.
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
"""How often a request is sent at most."""

BUSY = frozenset({429, 502, 503, 504})
"""Status codes of a server that may answer later."""

NOT_THERE = BUSY - {429}
"""Those of one that does not answer at all, see `Circuit`."""

SHORTEST_SECRET = 8
"""Shorter keys and headers are words that a message may hold."""

_SECRETS = "genret_secrets"


class Clock(Protocol):
    """Measures and passes time, so that tests need not wait for it."""

    def now(self) -> float:
        """Return seconds since a fixed moment."""

    def sleep(self, seconds: float) -> None:
        """Wait in this thread."""

    async def asleep(self, seconds: float) -> None:
        """Wait in the running event loop."""


class SystemClock:
    """Real time."""

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
    """Where a server is, and how it is asked. Not pickled where it has a key.

    api_base: address up to `/v1`. timeout_s: of one request, connecting and further tries included. headers: sent with
    each request, beside the key. circuit: shared by all requests to it. clock: measures the
    deadline and passes the pauses between tries; a single try is limited in real time.
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
        raise TypeError(f"{self!r} may hold a key and is not pickled: make it anew where it is needed.")

    def __deepcopy__(self, memo: Any) -> Server:
        return self

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
        """Of a path below `api_base`, without its login: httpx would log it."""
        return f"{_without_login(self.api_base).rstrip('/')}{path}"

    def policy(self) -> dict[str, Any]:
        """When a request is sent again, as tenacity takes it."""
        broken = retry_if_exception_type(httpx.TransportError) & retry_if_not_exception_type(httpx.TimeoutException)
        return {
            "retry": broken | retry_if_result(lambda answer: answer.status_code in BUSY),
            "stop": stop_after_attempt(TRIES) | stop_before_delay(self.timeout_s),
            "wait": _pause,
            "retry_error_callback": lambda state: state.outcome and state.outcome.result(),
        }

    @contextmanager
    def asked(self, path: str) -> Iterator[Callable[[httpx.Response], httpx.Response]]:
        """Around one request: the circuit, our errors, and no secret in a message. Yields what takes the answer."""
        url = shown_address(self.url(path))
        with self.circuit.request(url) as request, server_errors(url, self.secrets):

            def answered(answer: httpx.Response) -> httpx.Response:
                if answer.status_code in NOT_THERE:
                    request.failure = f"it answered {answer.status_code}."
                answer.extensions[_SECRETS] = self.secrets
                return answer

            yield answered

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may hold, longest first."""
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
            ServerUnreachable: nothing answered, in time or at all.
        """
        url, clock = self._server.url(path), self._server.clock
        end = clock.now() + self._server.timeout_s

        def once() -> httpx.Response:
            left = max(1e-3, end - clock.now())
            return _within(left, lambda: self._client.request(method, url, json=body, timeout=left))

        with self._server.asked(path) as answered:
            return answered(Retrying(sleep=clock.sleep, **self._server.policy())(once))


class AsyncConnection:
    """The same for an event loop."""

    def __init__(self, server: Server, client: httpx.AsyncClient) -> None:
        self._server, self._client = server, client

    async def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """As `Connection.request`."""
        url, clock = self._server.url(path), self._server.clock
        end = clock.now() + self._server.timeout_s

        async def once() -> httpx.Response:
            left = max(1e-3, end - clock.now())
            return await asyncio.wait_for(self._client.request(method, url, json=body, timeout=left), left)

        with self._server.asked(path) as answered:
            return answered(await AsyncRetrying(sleep=clock.asleep, **self._server.policy())(once))


@contextmanager
def server_errors(url: str, secrets: tuple[str, ...] = ()) -> Iterator[None]:
    """Turn httpx's errors into ours, which tell what to do."""
    try:
        yield
    except httpx.ConnectError as error:
        raise ServerUnreachable(
            f"no server answers at {url}: {_hidden(str(error), secrets)}. Start one with `genret serve INDEX`, or "
            "correct the address."
        ) from error
    except (httpx.TimeoutException, asyncio.TimeoutError, FutureTimeout) as error:
        raise ServerUnreachable(
            f"{url} did not answer in time: {error!r}. Raise timeout_s, or look at the server."
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerUnreachable(f"the connection to {url} failed: {_hidden(repr(error), secrets)}.") from error


def json_object(answer: httpx.Response) -> dict[str, Any]:
    """The object in a server's answer.

    Raises:
        ServerError: it is an error, or no JSON object.
    """
    where, text = said_by(answer), partial_text(answer)
    if answer.status_code in BUSY:
        raise ServerError(
            f"{where} answered {answer.status_code}, and so did further tries: {text}. "
            "The server is overloaded, or its engine has died: look at its log."
        )
    if answer.status_code != 200:
        raise ServerError(f"{where} answered {answer.status_code}: {text}")
    try:
        body = json.loads(answer.content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{where} answered no JSON: {text[:200]!r}. Is it a vLLM server?") from error
    if not isinstance(body, dict):
        raise ServerError(f"{where} answered {type(body).__name__}, not an object. Is it a vLLM server?")
    return body


def json_objects(answer: httpx.Response, name: str) -> list[dict[str, Any]]:
    """The list of objects that an answer has under a name.

    Raises:
        ServerError: as of `json_object`, or it has no such list.
    """
    found = json_object(answer).get(name)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ServerError(f"{said_by(answer)} answered no list of {name}. Is it a vLLM server?")
    return found


def said_by(answer: httpx.Response) -> str:
    """The address that answered, as a message may show it."""
    return shown_address(str(answer.url))


def partial_text(answer: httpx.Response) -> str:
    """The beginning of an answer, as a message may show it: a server or proxy may repeat the key."""
    return _hidden(answer.text[:2000], answer.extensions.get(_SECRETS, ()))[:500]


def shown_address(url: str) -> str:
    """An address without user, password and query."""
    return _without_login(url).partition("?")[0]


_LOGIN = re.compile(r"^([a-z]+://)?([^/@]*)@", re.IGNORECASE)


def _login(url: str) -> str:
    found = _LOGIN.match(url)
    return found[2] if found else ""


def _without_login(url: str) -> str:
    return _LOGIN.sub(lambda found: found[1] or "", url)


def _hidden(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _pause(state: RetryCallState) -> float:
    """Before the next try: longer each time, by lot, and no shorter than the server asks for."""
    outcome = state.outcome
    asked = "" if outcome is None or outcome.failed else outcome.result().headers.get("Retry-After", "")
    return max(_JITTER(state), _seconds(asked))


_JITTER = wait_random_exponential(multiplier=0.2, max=2.0)


def _seconds(retry_after: str) -> float:
    """Of RFC 9110: a number of seconds, or a date. What is neither asks for none."""
    if re.fullmatch(r"[0-9]{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, TypeError):
        return 0.0


def _within(seconds: float, call: Callable[[], httpx.Response]) -> httpx.Response:
    """What `call` gives, or TimeoutError once the time is over.

    httpx limits each read, and not the sum: a server that sends a byte now and then would hold it for ever, and so
    would a name server. The thread of a call that nobody waits for any more ends with its connection.
    """
    done: Future[httpx.Response] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # handed to who waits
            done.set_exception(error)

    Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    return done.result(seconds)
