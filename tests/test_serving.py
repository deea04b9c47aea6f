"""Starting and stopping a server, with a small one in vLLM's place."""

import sys

import psutil
import pytest

from llama_index_genret.endpoint.admission import Admission, TooBusy
from llama_index_genret.endpoint.limits import Limits
from llama_index_genret.errors import ServerError
from llama_index_genret.serving import free_port, running_server

STUBBORN = """
import signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def test_a_server_that_does_not_stop_is_killed_with_its_children(tmp_path):
    port, log = free_port(), tmp_path / "server.log"
    command = [sys.executable, "-c", STUBBORN, str(port)]
    with running_server(command, host="127.0.0.1", port=port, log=log, stop_timeout_s=0.2):
        child = psutil.Process(int(log.read_text().split()[0]))
    _, alive = psutil.wait_procs([child], timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_limits_are_the_defaults_but_for_those_that_are_named():
    assert Limits.from_text("") == Limits()
    assert Limits.from_text(" queries=7\nstop_s=3 ") == Limits(queries=7, stop_s=3)


@pytest.mark.parametrize("text", ["queris=7", "queries", "queries=", "queries=0", "queries=-1", "body_mib=1.5", "=3"])
def test_a_limit_that_is_none_is_refused(text):
    with pytest.raises(ServerError, match=r"positive whole numbers.*stalled_s"):
        Limits.from_text(f"body_s=2 {text}")


def test_more_queries_than_the_limit_are_turned_away_until_others_are_answered():
    admission = Admission(Limits(queries=10))
    with admission.of(6):
        with admission.of(4), pytest.raises(TooBusy, match=r"10 queries .* 10 at once"), admission.of(1):
            pass
        with pytest.raises(KeyError), admission.of(4):
            raise KeyError
        with admission.of(4):
            pass
    with admission.of(256):  # of one request that is alone
        pass
