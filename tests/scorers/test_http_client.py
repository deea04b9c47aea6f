"""Test how a client handles faults of a server; a scripted server plays each fault over a plain socket."""

import asyncio

import pytest

from llama_index_genret.errors import ServerError, ServerUnreachable
from llama_index_genret.scorers.http_client import TRIES, Server, json_object
from tests.scripted_server import ScriptedServer, drip, response
from tests.simulated_clock import SimulatedClock

ACTS = {
    "drop": [],
    "cut": [response(length=100)],
    "slow": [60.0],
    "drip": drip(response() * 30),
}


@pytest.fixture
def faulty():
    servers = []

    def make(*script):
        servers.append(
            ScriptedServer(act if isinstance(act, list) else ACTS.get(act, [response(act)]) for act in script)
        )
        return servers[-1]

    yield make
    for server in servers:
        server.socket.close()


def post(server, how, clock=None):
    client = Server(server.api_base, timeout_s=600, clock=clock or SimulatedClock())

    def sync():
        with client.connection() as connection:
            return json_object(connection.request("POST", "/recall", {}))

    async def asynchronous():
        async with client.async_connection() as connection:
            return json_object(await connection.request("POST", "/recall", {}))

    return sync() if how == "sync" else asyncio.run(asynchronous())


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(
    ("script", "requests"),
    [
        ((200,), 1),
        ((503, 200), 2),
        ((429, 502, 200), 3),
        (("drop", 200), 2),
        (("cut", 200), 2),
        (("drop", 503, 200), 3),
    ],
)
def test_temporary_fault_is_retried_until_a_response(faulty, how, script, requests):
    server = faulty(*script)
    assert post(server, how) == {"data": 1}
    assert server.seen == requests


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(
    ("script", "error", "words", "requests"),
    [
        ((503,), ServerError, "503.*engine has died", TRIES),
        (("drop",), ServerUnreachable, "failed", TRIES),
        (("cut",), ServerUnreachable, "failed", TRIES),
        ((400,), ServerError, "answered 400", 1),
        ((401,), ServerError, "answered 401", 1),
        ((500, 200), ServerError, "answered 500", 1),
    ],
)
def test_lasting_fault_is_an_error_after_bounded_tries(faulty, how, script, error, words, requests):
    server = faulty(*script)
    with pytest.raises(error, match=words):
        post(server, how)
    assert server.seen == requests


def test_repr_hides_the_key():
    assert "secret" not in repr(Server("http://127.0.0.1:1/v1", "secret"))


@pytest.mark.parametrize(("how", "act"), [("sync", "slow"), ("async", "slow"), ("async", "drip")])
def test_deadline_holds_for_all_tries_together(faulty, how, act):
    """The first try leaves half a second of the deadline, so the second ends before the server's response."""
    clock = SimulatedClock()
    server = faulty([lambda: clock.advance(599.5), response(503)], act)
    with pytest.raises(ServerUnreachable, match="in time"):
        post(server, how, clock)
    assert server.has_seen(2)
