"""The limits of the recall endpoint's server on a server of uvicorn's, by clients that do not keep to them."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from llama_index_genret.serving.endpoint.connection_timeouts import guard
from llama_index_genret.serving.endpoint.limits import Limits
from llama_index_genret.serving.endpoint.request_bodies import MIB, Bodies

LIMITS = Limits(head_s=1, body_s=2, stalled_s=2, body_mib=1, bodies_mib=2, stop_s=1)
POST = b"POST /asked HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
MUCH = b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n"
AT_ONCE_S = 1.5
"""More than a second late is late."""


class Asked(BaseModel):
    text: str
    wait_s: float = 0.0


def application(bodies):
    app = FastAPI()

    @app.post("/asked")
    async def asked(body: Asked):
        await asyncio.sleep(body.wait_s)
        return len(body.text)

    @app.get("/much")
    async def much():
        return "x" * 100_000

    async def limited(scope, receive, send):
        if scope["type"] == "http":
            return await bodies.serve(app, scope, receive, send)
        return await app(scope, receive, send)

    return limited


@contextmanager
def server(limits=LIMITS):
    """Its address, and the thread that ends with it."""
    config = uvicorn.Config(application(Bodies(limits)), port=0, log_level="critical")
    config.load()
    running = uvicorn.Server(config)
    guard(running, limits)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield running.servers[0].sockets[0].getsockname(), running, thread
    finally:
        running.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def address():
    with server() as (address, _, _):
        yield address


@pytest.fixture
def client(address):
    json_body = {"Content-Type": "application/json"}
    with httpx.Client(base_url="http://{}:{}".format(*address), timeout=30, headers=json_body) as client:
        yield client


@contextmanager
def line(address):
    with socket.create_connection(address, timeout=30) as opened:
        yield opened


def ended_after_s(opened, every_s=0.1, write=b""):
    """Until the server ends the connection, on which something is written all the while."""
    start = time.monotonic()
    while opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1 and time.monotonic() < start + 20:
        with suppress(OSError):
            opened.sendall(write)
        time.sleep(every_s)
    return time.monotonic() - start


def body(size):
    return b'{"text": "' + b"x" * (size - 12) + b'"}'


def test_the_largest_body_is_taken_and_one_byte_more_is_refused(client):
    def chunks(content):
        yield from (content[at : at + 1000] for at in range(0, len(content), 1000))

    for sent in (lambda content: content, chunks):
        assert client.post("/asked", content=sent(body(MIB))).json() == MIB - 12
        for size in (MIB + 1, 20 * MIB):
            refused = client.post("/asked", content=sent(body(size)))
            assert (refused.status_code, refused.headers["connection"]) == (413, "close")
            assert "1 MiB" in refused.text


def test_one_that_asks_first_is_told_before_it_sends(address):
    with line(address) as opened:
        opened.sendall(POST % 9999999 + b"Expect: 100-continue\r\n\r\n")
        assert opened.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_end_in_time_is_refused(address):
    with line(address) as opened:
        opened.sendall(POST % 5000 + b"\r\n")
        assert LIMITS.body_s <= ended_after_s(opened, write=b" ") < LIMITS.body_s + AT_ONCE_S
        assert opened.recv(100).startswith(b"HTTP/1.1 408 ")


def test_bodies_are_counted_together_and_given_back(address, client):
    with line(address) as first, line(address) as second:
        for opened in (first, second):
            opened.sendall(POST % MIB + b"\r\n" + body(MIB)[:-1])
        time.sleep(0.3)
        refused = client.post("/asked", content=body(MIB))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        second.sendall(b"}")
        assert second.recv(100).startswith(b"HTTP/1.1 200 ")
    time.sleep(0.3)
    assert client.post("/asked", content=body(MIB)).status_code == 200
    for _ in range(4):
        assert client.post("/asked", content=body(MIB)).status_code == 200


@pytest.mark.parametrize(("first", "then"), [(b"", b""), (b"GET /much HT", b""), (b"GET /much HTTP/1.1\r\nX: ", b"x")])
def test_a_connection_on_which_no_request_begins_is_ended(address, first, then):
    with line(address) as opened:
        opened.sendall(first)
        assert LIMITS.head_s - 0.2 <= ended_after_s(opened, write=then) < 2 * LIMITS.head_s + AT_ONCE_S


def test_one_that_stops_within_its_second_request_is_ended(address):
    with line(address) as opened:
        opened.sendall(POST % 12 + b"\r\n" + body(12))
        assert opened.recv(1000).startswith(b"HTTP/1.1 200 ")
        opened.sendall(b"GET /mu")
        assert ended_after_s(opened) < 3 * LIMITS.head_s + AT_ONCE_S


def test_connections_that_are_used_stay(client):
    """Between requests, and while one is answered for long."""
    assert client.post("/asked", content=body(12)).status_code == 200
    connections = client._transport._pool.connections
    for pause_s in (0.3, 2.5 * LIMITS.head_s):
        time.sleep(pause_s)
        assert client.post("/asked", content=body(12)).status_code == 200
    waits_s = 3.5 * LIMITS.head_s
    assert client.post("/asked", json={"text": "", "wait_s": waits_s}).json() == 0
    assert client._transport._pool.connections == connections


def stuck(opened):
    """Ask for much and read nothing."""
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.settimeout(0.5)
    with suppress(TimeoutError):
        opened.sendall(MUCH * 1000)


def test_a_reader_that_takes_nothing_is_cut(address):
    with line(address) as opened:
        stuck(opened)
        assert LIMITS.stalled_s - 1 < ended_after_s(opened, write=MUCH) < LIMITS.stalled_s + 5 * AT_ONCE_S


def test_a_server_stops_whoever_is_connected():
    with server(Limits(stop_s=1)) as (address, running, thread), line(address) as opened, line(address) as other:
        stuck(opened)
        other.sendall(POST % 5000 + b"\r\n")
        time.sleep(0.2)
        running.should_exit = True
        thread.join(1 + 2 * AT_ONCE_S)
        assert not thread.is_alive()


def test_a_recall_ends_with_its_client_its_time_or_its_server():
    from llama_index_genret.serving.endpoint.app import TooSlow, _cancel_on_disconnect
    from llama_index_genret.serving.endpoint.engine_scorer import EngineStopped

    class Raw:
        """A request whose client leaves after so long."""

        def __init__(self, stays_s, should_exit=False):
            self.stays_s, state = stays_s, SimpleNamespace(server=SimpleNamespace(should_exit=should_exit))
            self.app = SimpleNamespace(state=state)

        async def receive(self):
            await asyncio.sleep(self.stays_s)
            return {"type": "http.disconnect"}

    async def recall(seconds, ended):
        try:
            await asyncio.sleep(seconds)
            return "found"
        finally:
            ended.append(seconds)

    async def run():
        ended = []
        assert await _cancel_on_disconnect(recall(0, ended), Raw(90), 1) == "found"
        assert await _cancel_on_disconnect(recall(60, ended), Raw(0), 1) is None
        with pytest.raises(TooSlow, match=r"0\.1 s"):
            await _cancel_on_disconnect(recall(61, ended), Raw(90), 0.1)
        with pytest.raises(EngineStopped, match="try again"):
            await _cancel_on_disconnect(recall(62, ended), Raw(90, should_exit=True), 90)
        await asyncio.sleep(0)
        assert ended == [0, 60, 61, 62]

    asyncio.run(run())
