"""A server over a plain socket with scripted faults that no HTTP library would send."""

import contextlib
import re
import select
import socket
import time
from threading import Thread

GOOD = b'{"data": 1}'


def response(status=200, body=GOOD, length=None, headers=()):
    """Return a response that closes the connection: a client that kept it would lose a retry on it."""
    length = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {length}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def drip(content, pause_s=0.05):
    """Return steps that send single bytes with pauses."""
    return [step for byte in content for step in (bytes([byte]), pause_s)]


class ScriptedServer:
    """A server that plays one act per connection, and repeats the last one.

    An act is a list of steps: bytes to send, seconds (float) to wait, "reset" to end with a reset, or a function.
    seen: number of requests.
    at: time of each request.
    """

    def __init__(self, acts):
        self.acts, self.seen, self.at = list(acts), 0, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        Thread(target=self._serve, daemon=True).start()

    @property
    def api_base(self):
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"

    def has_seen(self, requests):
        """Wait for a number of requests: a client may give up before its connection is accepted."""
        while self.seen < requests:
            time.sleep(0.01)
        return self.seen == requests

    def _serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            Thread(target=self._play, args=(connection,), daemon=True).start()

    def _play(self, connection):
        act = self.acts[min(self.seen, len(self.acts) - 1)]
        self.seen += 1
        self.at.append(time.monotonic())
        with connection, contextlib.suppress(OSError):  # the client may disconnect
            _read_request(connection)
            for step in act:
                if step == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                elif callable(step):
                    step()
                elif isinstance(step, float):
                    if _has_disconnected(connection, step):
                        return
                else:
                    connection.sendall(step)


def _read_request(connection):
    """Read head and body: closing a connection with unread bytes would reset it."""
    request, end = b"", None
    while end is None or len(request) < end:
        received = connection.recv(65536)
        if not received:
            return
        request += received
        head, _, rest = request.partition(b"\r\n\r\n")
        if len(head) < len(request):
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            end = len(request) - len(rest) + int(length[1] if length else 0)


def _has_disconnected(connection, within_s):
    """Return whether the client closes the connection within some seconds."""
    end = time.monotonic() + within_s
    while select.select([connection], [], [], max(0.0, end - time.monotonic()))[0]:
        if not connection.recv(65536):
            return True
    return False
