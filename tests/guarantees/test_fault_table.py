"""A table of server and network faults with the client's reaction, sync and async.

Each row has the server's acts, one per connection, the last one repeated; the client's error with some words; the
number of requests; and whether the deadline ends the request. Only deadlines pass in real time. The servers outlast
them, so that a missed deadline shows as another error.
Faults in `tests/scorers/test_http_client.py` are not repeated here.
"""

import asyncio
import contextlib
import json
import socket
import time
from threading import Thread

import pytest
from llama_index.core.schema import QueryBundle

from llama_index_genret import FakeScorer, GenerativeImageRetriever
from llama_index_genret.errors import QueryError, ServerError, ServerUnreachable
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.circuit_breaker import FAILED_REQUESTS, Circuit
from llama_index_genret.scorers.http_client import TRIES, Server, json_object
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.endpoint.client import RecallClient
from llama_index_genret.serving.launch import free_port
from llama_index_genret.trie import build_trie
from tests.openai_server import OpenAIServer, running
from tests.scripted_server import GOOD, ScriptedServer, drip, response
from tests.simulated_clock import SimulatedClock

DEADLINE_S, LONG_S = 0.6, 60.0

ACTS = {
    "fine": [response()],
    "reset in the body": [response(length=100), "reset"],
    "slow headers": drip(response() * 30),
    "slow body": [response(length=1500)[:-5], *drip(b" " * 1200)],
    "hang before an answer": [LONG_S],
    "hang after the headers": [response(body=b"", length=9), LONG_S],
    "429, retry at once": [response(429, headers=["Retry-After: 0"])],
    "429, in a while": [response(429, headers=["Retry-After: 1"])],
    "429, in an hour": [response(429, headers=["Retry-After: 3600"])],
    "503, at a date": [response(503, headers=["Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"])],
    "404": [response(404)],
    "413": [response(413)],
    "redirect": [response(302, headers=["Location: http://127.0.0.1:9/stolen"])],
    "half of the JSON": [response(body=GOOD[:5])],
    "too short a length": [response(body=GOOD, length=5)],
    "no UTF-8": [response(body=b'{"data": "\xff\xfe"}')],
    "HTML": [response(body=b"<html><h1>502 Bad Gateway</h1></html>")],
    "NaN": [response(body=b'{"data": NaN}')],
    "a list": [response(body=b"[1]")],
    "a tower of lists": [response(body=b"[" * 100_000)],
    "nothing": [response(body=b"")],
    "no HTTP": [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"],
}


@pytest.fixture
def acting():
    opened = []

    def make(*script):
        opened.append(ScriptedServer(ACTS[name] for name in script))
        return opened[-1]

    yield make
    for server in opened:
        server.socket.close()


def ask(client, how):
    def sync():
        with client.connection() as connection:
            return json_object(connection.request("POST", "/recall", {}))

    async def asynchronous():
        async with client.async_connection() as connection:
            return json_object(await connection.request("POST", "/recall", {}))

    return sync() if how == "sync" else asyncio.run(asynchronous())


U, E = ServerUnreachable, ServerError
TABLE = [
    # acts of the server              error  words                  requests  by the deadline
    (["reset in the body"],              U, "failed",                  TRIES, False),
    (["reset in the body", "fine"],   None, "",                            2, False),
    (["slow headers"],                   U, "in time",                     1, True),
    (["slow body"],                      U, "in time",                     1, True),
    (["hang before an answer"],          U, "in time",                     1, True),
    (["hang after the headers"],         U, "in time",                     1, True),
    (["429, retry at once", "fine"],  None, "",                            2, False),
    (["429, in an hour", "fine"],        E, "429.*overloaded",             1, False),
    (["503, at a date", "fine"],      None, "",                            2, False),
    (["404"],                            E, "answered 404",                1, False),
    (["413"],                            E, "answered 413",                1, False),
    (["redirect"],                       E, "answered 302",                1, False),
    (["half of the JSON"],               E, "no JSON",                     1, False),
    (["too short a length"],             E, "no JSON",                     1, False),
    (["no UTF-8"],                       E, "no JSON",                     1, False),
    (["HTML"],                           E, "no JSON.*Bad Gateway",        1, False),
    (["NaN"],                            E, "no JSON",                     1, False),
    (["a list"],                         E, "list, not an object",         1, False),
    (["a tower of lists"],               E, "no JSON",                     1, False),
    (["nothing"],                        E, "no JSON",                     1, False),
    (["no HTTP"],                        U, "failed",                  TRIES, False),
]  # fmt: skip


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(("script", "error", "words", "requests", "by_deadline"), TABLE, ids=lambda v: str(v))
def test_fault_has_its_error_retries_and_deadline(acting, how, script, error, words, requests, by_deadline):
    server, start, clock = acting(*script), time.monotonic(), SimulatedClock()
    client = Server(server.api_base, "sk-secret-key", DEADLINE_S if by_deadline else LONG_S, clock=clock)
    if error is None:
        assert ask(client, how) == {"data": 1}
    else:
        with pytest.raises(error, match=words) as raised:
            ask(client, how)
        assert type(raised.value) is error
        assert str(server.socket.getsockname()[1]) in str(raised.value)
    assert not by_deadline or time.monotonic() - start >= DEADLINE_S
    assert server.has_seen(requests)
    assert len(clock.pauses) == requests - 1


@pytest.mark.parametrize("how", ["sync", "async"])
def test_retry_after_is_respected(acting, how):
    server = acting("429, in a while", "fine")
    assert ask(Server(server.api_base, timeout_s=LONG_S), how) == {"data": 1}
    assert server.at[1] - server.at[0] >= 1.0


@pytest.mark.parametrize("how", ["sync", "async"])
def test_circuit_opens_on_refusal_and_closes_on_recovery(how):
    port = free_port()
    clock = SimulatedClock()
    circuit = Circuit(open_s=1000.0, clock=clock.now)
    client = Server(f"http://127.0.0.1:{port}/v1", timeout_s=LONG_S, circuit=circuit, clock=clock)
    for _ in range(FAILED_REQUESTS):
        with pytest.raises(ServerUnreachable, match="no server answers"):
            ask(client, how)
    tries = len(clock.pauses)
    with pytest.raises(ServerUnreachable, match="no request was sent"):
        ask(client, how)
    assert len(clock.pauses) == tries
    with contextlib.closing(socket.create_server(("127.0.0.1", port))) as listening:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(response())

        Thread(target=serve, daemon=True).start()
        clock.advance(1000.0)
        assert ask(client, how) == {"data": 1}
        assert ask(client, how) == {"data": 1}


def test_503_opens_the_circuit_and_429_does_not(acting):
    failing, busy = acting("503, at a date"), acting("429, in an hour")
    for server in (failing, busy):
        client = Server(server.api_base, timeout_s=LONG_S, clock=SimulatedClock())
        for _ in range(FAILED_REQUESTS + 1):
            with pytest.raises(ServerError) as raised:
                ask(client, "sync")
    assert "answered 429" in str(raised.value)
    assert (failing.seen, busy.seen) == (FAILED_REQUESTS * TRIES, FAILED_REQUESTS + 1)


def test_retriever_and_endpoint_share_a_circuit(untrained_index):
    retriever = GenerativeImageRetriever.from_server(untrained_index.folder, f"http://127.0.0.1:{free_port()}/v1")
    assert retriever._source.endpoint._server.circuit is retriever._scorer.server.circuit
    for words in [*["no server answers"] * FAILED_REQUESTS, "no request was sent"]:
        with pytest.raises(ServerUnreachable, match=words):
            retriever.retrieve("red circle")


HIT = {"image_id": "red-bar", "file_name": "red-bar.png", "caption": "", "identifier": "", "metadata": {}}


def recall_response(hits, **more):
    scored = [{**HIT, "score": 0.5, "log_prob": -0.7, **hit} for hit in hits]
    result = {"query": "x", "hits": scored, "exact": True, "nodes_expanded": 1}
    scoring = {"eta": 0.0, "rerank": 0, "rerank_weight": 1.0, "rerank_by": "identifier"}
    return {"index": "i", "version": "v", "scoring": scoring, "results": [result], **more}


SPOILT_RECALLS = {
    "no such image": (recall_response([{"image_id": "mauve-bar"}]), "does not have"),
    "an image twice": (recall_response([{}, {}]), "twice"),
    "more than requested": (
        recall_response([{}, {"image_id": "red-frame"}, {"image_id": "red-circle"}]),
        r"other images.*got \[3\]",
    ),
    "no result": (recall_response([], results=[]), r"other images.*got \[\]"),
    "two results": (recall_response([], results=recall_response([])["results"] * 2), r"other images.*got \[0, 0\]"),
    "a text for a number": (recall_response([{"log_prob": "very likely"}]), "something else than a recall"),
    "another schema": ({"hits": []}, "something else than a recall"),
}


@pytest.mark.parametrize("name", SPOILT_RECALLS)
def test_invalid_recall_response_raises(untrained_index, acting, name, monkeypatch):
    body, words = SPOILT_RECALLS[name]
    monkeypatch.setitem(ACTS, "recall", [response(body=json.dumps(body).encode())])
    server = Server(acting("recall").api_base, timeout_s=LONG_S)
    retriever = GenerativeImageRetriever(
        untrained_index, FakeScorer(400), endpoint=RecallClient(untrained_index, server), similarity_top_k=2
    )
    with pytest.raises(ServerError, match=words):
        retriever.retrieve("x")


def test_unsupported_queries_fall_back_or_are_refused(untrained_index, tmp_path):
    endpoint = RecallClient(untrained_index, Server(f"http://127.0.0.1:{free_port()}/v1"))
    scorer = FakeScorer(untrained_index.tokenizer.vocab_size)
    many = GenerativeImageRetriever(untrained_index, scorer, endpoint=endpoint, similarity_top_k=5000)
    assert len(many.retrieve("x")) == len(untrained_index.records)
    large = tmp_path / "large.png"
    large.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 26_000_000)
    with pytest.raises(QueryError, match="at most 33554432") as raised:
        many.retrieve(QueryBundle("", image_path=str(large)))
    assert "AAAA" not in str(raised.value)


SPOILT_LISTS = [None, 5, "data", [None], [[]], {"a": 1}]


@pytest.mark.parametrize("spoilt", SPOILT_LISTS, ids=str)
def test_invalid_list_raises(spoilt):
    with running(OpenAIServer(vocabulary=400)) as server:
        models = server.models
        server.models = spoilt
        with pytest.raises(ServerError, match="list of data"):
            VllmScorer(server.api_base).served_model()
        server.models = models
        server.spoil = lambda answer: {"choices": spoilt}
        with pytest.raises(ServerError, match=r"list of choices|other choices"):
            recall(VllmScorer(server.api_base), build_trie([(1, 2), (1, 3)])[0], [Prompt((5,))], SearchOptions(k=1))
