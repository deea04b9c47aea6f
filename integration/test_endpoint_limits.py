"""Tests of the limits of the recall routes: the size of a request's body, and the duration of a recall."""

import asyncio
import json
import socket
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from fastapi import Request

from integration.recall_app import recall_app, served
from llama_index_genret.serving.endpoint.limits import LIMITS_VARIABLE
from llama_index_genret.serving.endpoint.schema import INDEXES_VARIABLE

MIB = 2**20
POST = b"POST /v1/recall HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture
def port(untrained_index, monkeypatch):
    """Start a server whose recall routes accept bodies of a MiB, with another route that accepts all."""
    monkeypatch.setenv(INDEXES_VARIABLE, f"shapes={untrained_index.folder}")
    monkeypatch.setenv(LIMITS_VARIABLE, "body_mib=1")
    app = recall_app(untrained_index)

    @app.post("/v1/chat/completions")
    async def chat(raw: Request):
        return len(await raw.body())

    with served(app) as port:
        yield port


@pytest.fixture
def client(port):
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=headers) as client:
        yield client


def in_one_piece(content):
    return content


def in_chunks(content):
    yield from (content[at : at + 1000] for at in range(0, len(content), 1000))


def recall_body(size):
    """Return JSON of a given number of bytes, padded with spaces before it."""
    return json.dumps({"query": "red circle"}).encode().rjust(size)


@pytest.mark.parametrize("sent", [in_one_piece, in_chunks])
def test_largest_body_is_accepted_and_one_byte_more_is_413(client, sent):
    assert client.post("/v1/recall", content=sent(recall_body(MIB))).status_code == 200
    for size in (MIB + 1, 20 * MIB):
        refused = client.post("/v1/recall", content=sent(recall_body(size)))
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == 413
        assert "1 MiB" in refused.json()["error"]["message"]


def test_a_body_for_another_route_is_not_limited(client):
    assert client.post("/v1/chat/completions", content=bytes(20 * MIB)).json() == 20 * MIB


def test_expect_100_continue_is_answered_413_before_the_body(port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as opened:
        opened.sendall(POST + b"Content-Length: 9999999\r\nExpect: 100-continue\r\n\r\n")
        assert opened.recv(100).startswith(b"HTTP/1.1 413 ")


def test_recall_ends_on_disconnect_timeout_or_shutdown():
    from llama_index_genret.serving.endpoint.app import TooSlow, _cancel_on_disconnect
    from llama_index_genret.serving.endpoint.engine_scorer import EngineStopped

    class Raw:
        """A request whose client disconnects after a given time."""

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
        assert await _cancel_on_disconnect(recall(0, ended), Raw(90), 60) == "found"
        assert await _cancel_on_disconnect(recall(60, ended), Raw(0), 60) is None
        with pytest.raises(TooSlow, match=r"0\.1 s"):
            await _cancel_on_disconnect(recall(61, ended), Raw(90), 0.1)
        with pytest.raises(EngineStopped, match="try again"):
            await _cancel_on_disconnect(recall(62, ended), Raw(90, should_exit=True), 90)
        await asyncio.sleep(0)
        assert ended == [0, 60, 61, 62]

    asyncio.run(run())


def test_stopping_server_cancels_a_chat_that_is_never_answered(untrained_index, monkeypatch):
    """vLLM's engine stops before its server does, and may leave a chat without an answer."""
    monkeypatch.setenv(INDEXES_VARIABLE, f"shapes={untrained_index.folder}")
    monkeypatch.setattr("llama_index_genret.serving.endpoint.app.STOP_S", 0.3)
    app = recall_app(untrained_index)
    entered, cancelled = asyncio.Event(), asyncio.Event()

    @app.post("/v1/chat/completions")
    async def chat():
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def run():
        server = app.state.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(timeout=60) as http:
            response = asyncio.create_task(http.post(f"http://127.0.0.1:{port}/v1/chat/completions"))
            await entered.wait()
            server.should_exit = True
            await asyncio.wait_for(serving, 10)
            assert cancelled.is_set()
            assert (await response).status_code == 500

    asyncio.run(run())
