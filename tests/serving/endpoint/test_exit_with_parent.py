"""The engine process of a killed server exits."""

import subprocess
import sys

import psutil
import pytest

from llama_index_genret.serving.endpoint.schema import INDEXES_VARIABLE

PARENT = """
import multiprocessing, os, signal, sys, time
from llama_index_genret.serving.endpoint import exit_with_parent

def engine(stubborn):
    if stubborn:
        exit_with_parent.GRACE_S = 0.1
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    exit_with_parent.end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    engine_process = multiprocessing.get_context(sys.argv[1]).Process(target=engine, args=(len(sys.argv) > 2,))
    exit_with_parent.end_with_parent()  # the parent is a shell or this test, so this call has no effect
    engine_process.start()
    engine_process.join()
"""


@pytest.mark.parametrize(
    ("how", "serves", "ends"), [(["fork"], "a", True), (["spawn", "stubborn"], "a", True), (["spawn"], None, False)]
)
def test_engine_of_a_killed_server_exits(tmp_path, monkeypatch, how, serves, ends):
    """A process without indexes of this package keeps running."""
    (script := tmp_path / "parent.py").write_text(PARENT)
    monkeypatch.delenv(INDEXES_VARIABLE, raising=False)
    if serves:
        monkeypatch.setenv(INDEXES_VARIABLE, serves)
    with subprocess.Popen([sys.executable, script, *how], stdout=subprocess.PIPE, text=True) as parent:
        engine = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([engine], timeout=120 if ends else 0.5)
    for process in alive:
        process.kill()
    assert bool(alive) != ends
