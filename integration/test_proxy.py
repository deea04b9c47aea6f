"""Tests of `integration/deploy/nginx.conf` with a real nginx before the recall routes, and clients beyond its limits.

Every promise is kept with the configuration, and is broken without the directive that makes it.
"""

import asyncio
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import httpx
import pytest
from fastapi import Request
from fastapi.responses import StreamingResponse
from prometheus_client import REGISTRY
from starlette.types import ASGIApp

from integration.bench.load_faults import ESTABLISHED, FAULTS, Target, head
from integration.nginx import running_proxy, value_of
from integration.recall_app import TableEngine, recall_app, served
from llama_index_genret.serving.endpoint.limits import LIMITS_VARIABLE, Limits
from llama_index_genret.serving.endpoint.schema import INDEXES_VARIABLE
from llama_index_genret.serving.launch import KEEP_ALIVE_S, free_port

MIB = 2**20
TIGHT = {
    "client_max_body_size 64m;": "client_max_body_size 2m;",
    "client_header_timeout 30s;": "client_header_timeout 1s;",
    "client_body_timeout 30s;": "client_body_timeout 1500ms;",
    "send_timeout 30s;": "send_timeout 1s;",
}
"""Numbers that make the tests short."""

CUT_S = 5.0
EVENTS, PAUSE_S = 3, 0.4
RECALL = {"query": "red circle", "k": 20}


@dataclass
class Upstream:
    """The server behind the proxy: its address, and the requests that it has received."""

    app: ASGIApp
    engine: TableEngine
    port: int = 0
    requests: int = 0
    client_ports: set = field(default_factory=set)
    may_answer: threading.Event = field(default_factory=threading.Event)
    has_answered_much: bool = False

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            self.requests += 1
            self.client_ports.add(scope["client"][1])
        await self.app(scope, receive, send)


@pytest.fixture(scope="module")
def upstream(untrained_index):
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv(INDEXES_VARIABLE, f"shapes={untrained_index.folder}")
        patch.delenv("VLLM_API_KEY", raising=False)
        patch.delenv(LIMITS_VARIABLE, raising=False)
        app = recall_app(untrained_index)
        seen = Upstream(app, app.state.engine_client)

        @app.post("/v1/completions")
        async def held(raw: Request):
            """Answer with the size of the body, after the test permits it."""
            size = len(await raw.body())
            while not seen.may_answer.is_set():
                await asyncio.sleep(0.01)
            return size

        @app.post("/v1/chat/completions")
        async def streamed(raw: Request):
            """Answer as vLLM does with "stream": true."""

            async def events():
                for number in range(EVENTS):
                    yield f"data: {number}\n\n"
                    await asyncio.sleep(PAUSE_S)

            return StreamingResponse(events(), media_type="text/event-stream")

        @app.get("/much")
        async def much():
            """Send an answer that is larger than the buffers of a connection."""

            async def pieces():
                for _ in range(30):
                    yield bytes(MIB)
                seen.has_answered_much = True

            return StreamingResponse(pieces())

        seen.port = stack.enter_context(served(seen))
        seen.may_answer.set()
        yield seen


def client_of(port):
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)


def until(condition, timeout_s=5.0):
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def misused(kind):
    """Return a check by one of the clients of the load test."""

    def check(port, upstream):
        try:
            return asyncio.run(FAULTS[kind](Target("127.0.0.1", port, "shapes", CUT_S, 2 * MIB), random.Random(0)))
        except ConnectionError as error:
            return f"is cut: {error!r}"

    return check


def silent_after(sent):
    """Return a check by a client that sends a given number of bytes."""

    def check(port, upstream):
        with socket.create_connection(("127.0.0.1", port), timeout=CUT_S) as opened:
            opened.sendall(sent)
            with suppress(ConnectionError):
                try:
                    opened.recv(1000)
                except TimeoutError:
                    return f"is kept for more than {CUT_S} s"
        return ""

    return check


def largest_body(port, upstream):
    with client_of(port) as client:
        sizes = {size: client.post("/v1/completions", content=bytes(size)) for size in (2 * MIB, 2 * MIB + 1)}
    statuses = [answer.status_code for answer in sizes.values()]
    if statuses != [200, 413]:
        return f"is answered {statuses}"
    return "" if '"code": 413' in sizes[2 * MIB + 1].text else f"is answered {sizes[2 * MIB + 1].text}"


@contextmanager
def reader_of_nothing(port):
    with socket.socket() as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.connect(("127.0.0.1", port))
        opened.sendall(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        yield opened


def reader_of_nothing_is_cut(port, upstream):
    with reader_of_nothing(port) as opened:

        def is_cut():
            return opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != ESTABLISHED

        return "" if until(is_cut, CUT_S) else f"is kept for more than {CUT_S} s"


def reader_of_nothing_is_kept_from_the_server(port, upstream):
    upstream.has_answered_much = False
    with reader_of_nothing(port):
        return "" if until(lambda: upstream.has_answered_much, 0.9) else "holds its answer in the server"


def slow_body_is_kept_from_the_server(port, upstream):
    before = upstream.requests
    with socket.create_connection(("127.0.0.1", port), timeout=CUT_S) as opened:
        opened.sendall(head("/v1/completions", 5000))
        for _ in range(15):
            opened.sendall(b" ")
            time.sleep(0.1)
    return "" if upstream.requests == before else "is seen by the server"


def recalls_are_unchanged(port, upstream):
    with client_of(upstream.port) as direct, client_of(port) as through:
        for body in (RECALL, {**RECALL, "filters": {"color": "red"}}, {"query": 5}):
            expected, found = (client.post("/v1/recall", json=body) for client in (direct, through))
            if (found.status_code, found.content) != (expected.status_code, expected.content):
                return f"{body} is answered {found.status_code}: {found.text}"
        if through.get("/v1/recall/indexes").json() != direct.get("/v1/recall/indexes").json():
            return "the list of indexes differs"
    return ""


def stream_arrives_as_it_is_made(port, upstream):
    times, text, start = [], b"", time.monotonic()
    with (
        client_of(port) as client,
        client.stream("POST", "/v1/chat/completions", json={"stream": True}) as answer,
        suppress(httpx.RemoteProtocolError),
    ):
        for piece in answer.iter_raw():
            times.append(time.monotonic() - start)
            text += piece
    expected = "".join(f"data: {number}\n\n" for number in range(EVENTS)).encode()
    if text != expected:
        return f"is {text}"
    return "" if times[0] < PAUSE_S <= times[-1] else f"arrives at {times} s"


def connections_are_kept(port, upstream):
    upstream.client_ports.clear()
    with client_of(port) as client:
        for _ in range(20):
            client.post("/v1/completions", content=b"x").raise_for_status()
    return "" if len(upstream.client_ports) < 10 else f"takes {len(upstream.client_ports)} connections"


@contextmanager
def held_requests(port, upstream, sizes):
    """Hold requests in the server until the end of the context."""
    upstream.may_answer.clear()
    before, statuses = upstream.requests, []

    def post(size):
        with client_of(port) as client:
            statuses.append(client.post("/v1/completions", content=bytes(size)).status_code)

    threads = [threading.Thread(target=post, args=(size,)) for size in sizes]
    try:
        for thread in threads:
            thread.start()
        assert until(lambda: upstream.requests + len(statuses) == before + len(sizes))
        yield
    finally:
        upstream.may_answer.set()
        for thread in threads:
            thread.join(30)


def is_turned_away(answer):
    if answer.status_code != 503 or answer.headers.get("Retry-After") != "1" or '"code": 503' not in answer.text:
        return f"is answered {answer.status_code} {answer.headers} {answer.text}"
    return ""


def few_requests_at_once(port, upstream):
    with held_requests(port, upstream, [1, 1]), client_of(port) as client:
        return is_turned_away(client.get("/v1/recall/indexes"))


def large_bodies_have_their_share(port, upstream):
    with held_requests(port, upstream, [MIB, MIB]), client_of(port) as client:
        chunked = (b"x" for _ in range(3))
        problem = is_turned_away(client.post("/v1/recall", content=bytes(MIB)))
        problem = problem or is_turned_away(client.post("/v1/recall", content=chunked))
        small = client.post("/v1/recall", json=RECALL)
        return problem or ("" if small.status_code == 200 else f"a small one is answered {small.status_code}")


def turned_away(port, upstream):
    with client_of(port) as client:
        return is_turned_away(client.post("/v1/recall", json=RECALL))


def client_that_leaves_ends_its_search(port, upstream):
    def cancelled():
        return REGISTRY.get_sample_value("genret_recall_requests_total", {"outcome": "cancelled"}) or 0

    before, upstream.engine.wait_s = cancelled(), 1.0
    try:
        with client_of(port) as client, suppress(httpx.TimeoutException):
            client.post("/v1/recall", json=RECALL, timeout=0.3)
        return "" if until(lambda: cancelled() > before, 2.0) else "is searched for all the same"
    finally:
        upstream.engine.wait_s = 0.0


def redirect_stays_at_the_proxy(port, upstream):
    with client_of(port) as client:
        to = client.get("/v1/recall/indexes/").headers["location"]
    return "" if to == f"http://127.0.0.1:{port}/v1/recall/indexes" else f"goes to {to}"


@dataclass(frozen=True)
class Promise:
    """A check that holds with `changes` to the configuration, and fails with `broken`. is_down: there is no server."""

    check: Callable[[int, Upstream], str]
    broken: Mapping[str, str]
    changes: Mapping[str, str] = field(default_factory=dict)
    is_down: bool = False


PARTS = head("/v1/recall", 5000)
PROMISES = {
    "silence before the head is cut": Promise(silent_after(b""), {"client_header_timeout 30s;": ""}),
    "silence within the head is cut": Promise(silent_after(PARTS[:30]), {"client_header_timeout 30s;": ""}),
    "silence within the body is cut": Promise(silent_after(PARTS + b"{"), {"client_body_timeout 30s;": ""}),
    "a slow head is cut": Promise(misused("slow head"), {"client_header_timeout 30s;": ""}),
    "a slow body is kept from the server": Promise(
        slow_body_is_kept_from_the_server, {"proxy_request_buffering on;": "proxy_request_buffering off;"}
    ),
    "a slow body that ends is answered": Promise(
        misused("slow body"), {"client_body_timeout 30s;": "client_body_timeout 500ms;"}
    ),
    "a slow reader is cut": Promise(misused("slow reader"), {"send_timeout 30s;": ""}),
    "a reader of nothing is cut": Promise(reader_of_nothing_is_cut, {"reset_timedout_connection on;": ""}),
    "a reader of nothing is kept from the server": Promise(
        reader_of_nothing_is_kept_from_the_server, {"proxy_buffering on;": "proxy_buffering off;"}
    ),
    "the largest body passes": Promise(largest_body, {"client_max_body_size 64m;": ""}),
    "an oversized body is 413": Promise(misused("oversized"), {"client_max_body_size 64m;": "client_max_body_size 0;"}),
    "413 has the shape of the OpenAI API": Promise(largest_body, {"error_page 413 @large;": ""}),
    "one address has its share": Promise(
        few_requests_at_once, {"limit_conn clients 256;": ""}, {"limit_conn clients 256;": "limit_conn clients 2;"}
    ),
    "all requests have their share": Promise(few_requests_at_once, {}, {"max_conns=1024": "max_conns=2"}),
    "large bodies have their share": Promise(
        large_bodies_have_their_share, {"max_conns=32": ""}, {"max_conns=32": "max_conns=2"}
    ),
    "a chunked body counts as large": Promise(
        large_bodies_have_their_share,
        {"max_conns=32": "max_conns=2", '"~^\\D" genret_large;': ""},
        {"max_conns=32": "max_conns=2"},
    ),
    "503 where the server is down": Promise(turned_away, {"error_page 502 503 =503 @busy;": ""}, is_down=True),
    "503 says when to try again": Promise(turned_away, {"add_header Retry-After 1 always;": ""}, is_down=True),
    "recalls pass unchanged": Promise(recalls_are_unchanged, {"http://$pool;": "http://$pool/v1;"}),
    "a stream arrives as it is made": Promise(
        stream_arrives_as_it_is_made, {"proxy_read_timeout 620s;": "proxy_read_timeout 200ms;"}
    ),
    "connections to the server are kept": Promise(connections_are_kept, {"keepalive 64;": ""}),
    "HTTP 1.1 keeps connections": Promise(connections_are_kept, {"proxy_http_version 1.1;": ""}),
    "no header closes connections": Promise(connections_are_kept, {'proxy_set_header Connection "";': ""}),
    "a client that leaves ends its search": Promise(
        client_that_leaves_ends_its_search,
        {"proxy_buffering on;": "proxy_ignore_client_abort on;"},
    ),
    "a redirect stays at the proxy": Promise(redirect_stays_at_the_proxy, {"proxy_set_header Host $http_host;": ""}),
}


def problem(promise, changes, upstream, folder):
    port = free_port() if promise.is_down else upstream.port
    with running_proxy(folder, port, {**TIGHT, **changes}) as listening:
        return promise.check(listening, upstream)


@pytest.mark.parametrize("name", PROMISES)
def test_the_proxy_keeps_its_promise(name, upstream, tmp_path):
    promise = PROMISES[name]
    assert problem(promise, promise.changes, upstream, tmp_path) == ""


@pytest.mark.parametrize("name", PROMISES)
def test_without_its_directive_a_promise_is_broken(name, upstream, tmp_path):
    promise = PROMISES[name]
    assert problem(promise, promise.broken, upstream, tmp_path) != ""


def test_the_numbers_fit_those_of_the_server():
    assert value_of("client_max_body_size") == f"{Limits().body_mib}m"
    assert seconds("proxy_read_timeout") > Limits().recall_s
    assert seconds("keepalive_timeout") < KEEP_ALIVE_S


def seconds(directive):
    return int(value_of(directive).removesuffix("s"))
