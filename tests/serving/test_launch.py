"""Starting and stopping a server; a small HTTP server stands in for vLLM."""

import sys

import psutil

from llama_index_genret.serving.launch import free_port, running_server

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


def test_server_that_does_not_stop_is_killed_with_its_children(tmp_path):
    port, log = free_port(), tmp_path / "server.log"
    command = [sys.executable, "-c", STUBBORN, str(port)]
    with running_server(command, host="127.0.0.1", port=port, log=log, stop_timeout_s=0.2):
        child = psutil.Process(int(log.read_text().split()[0]))
    _, alive = psutil.wait_procs([child], timeout=120)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
