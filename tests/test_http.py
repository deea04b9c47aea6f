"""What a client does when a server misbehaves: a table of faults, each played by a server over a plain socket."""

import asyncio
import contextlib
import socket
import time
from threading import Thread

import pytest

from llama_index_genret.errors import ServerError, ServerUnreachable
from llama_index_genret.scorers.http import TRIES, Server, json_object

ANSWER = b'{"data": 1}'


def response(status, body=ANSWER, length=None):
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


class Faulty:
    """Plays one act of the script a connection, the last one for ever. `seen` counts the requests."""

    def __init__(self, script):
        self.script, self.seen = list(script), 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        Thread(target=self._play, daemon=True).start()

    @property
    def api_base(self):
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"

    def _play(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            Thread(target=self._act, args=(connection,), daemon=True).start()

    def _act(self, connection):
        act = self.script[min(self.seen, len(self.script) - 1)]
        self.seen += 1
        with connection, contextlib.suppress(OSError):  # the client may leave first
            connection.recv(65536)
            if act == "slow":
                time.sleep(2)
            elif act == "drip":
                for byte in response(200) * 20:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
            elif act == "cut":
                connection.sendall(response(200, length=100))
            elif isinstance(act, int):
                connection.sendall(response(act))


@pytest.fixture
def faulty():
    opened = []

    def make(*script):
        opened.append(Faulty(script))
        return opened[-1]

    yield make
    for server in opened:
        server.socket.close()


def ask(server, timeout_s, how):
    client = Server(server.api_base, timeout_s=timeout_s)

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
def test_what_may_succeed_later_is_tried_again_and_an_answer_ends_it(faulty, how, script, requests):
    server = faulty(*script)
    assert ask(server, 10, how) == {"data": 1}
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
def test_what_does_not_get_better_is_an_error_after_a_bounded_number_of_tries(
    faulty, how, script, error, words, requests
):
    server = faulty(*script)
    with pytest.raises(error, match=words):
        ask(server, 10, how)
    assert server.seen == requests


def test_a_key_is_not_shown():
    assert "secret" not in repr(Server("http://127.0.0.1:1/v1", "secret"))


@pytest.mark.parametrize(("how", "act"), [("sync", "slow"), ("async", "slow"), ("async", "drip")])
def test_a_deadline_holds_for_all_tries_together(faulty, how, act):
    server = faulty(503, act)
    start = time.monotonic()
    with pytest.raises(ServerUnreachable, match="in time"):
        ask(server, 1.0, how)
    assert time.monotonic() - start < 1.9
    assert server.seen == 2
