"""Starting and stopping a server; a small HTTP server stands in for vLLM."""

import sys

import psutil
import pytest

from llama_index_genret.errors import NotTrained
from llama_index_genret.serving.launch import free_port, running_server, serve_command, serve_environment

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


@pytest.mark.torch
@pytest.mark.parametrize("adapters", [False, True])
def test_untrained_index_with_an_encoder_serves_its_base_model(encoded_index, untrained_index, adapters):
    command = serve_command([encoded_index], host="127.0.0.1", port=1, adapters=adapters)
    place = command.index(encoded_index.manifest.model.name_or_path)
    assert command[place + 1 : place + 3] == ["--served-model-name", "genret"]
    assert "--enable-lora" not in command
    with pytest.raises(NotTrained, match="no encoder"):
        serve_command([encoded_index, untrained_index], host="127.0.0.1", port=1, adapters=adapters)


@pytest.mark.torch
def test_trained_and_encoder_only_indexes_share_a_server(trained_index, encoded_index):
    alone = serve_command([trained_index], host="127.0.0.1", port=1)
    assert serve_command([trained_index, encoded_index], host="127.0.0.1", port=1) == alone


@pytest.mark.torch
def test_encoder_of_the_server_is_set_by_option_or_environment(encoded_index):
    inherited = {"GENRET_ENCODER": "/encoder", "GENRET_ENCODER_DEVICE": "cuda"}
    kept = serve_environment([encoded_index], inherited)
    assert inherited.items() <= kept.items()
    chosen = serve_environment([encoded_index], inherited, encoder="other", encoder_device="cpu")
    assert (chosen["GENRET_ENCODER"], chosen["GENRET_ENCODER_DEVICE"]) == ("other", "cpu")
