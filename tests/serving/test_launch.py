"""Starting and stopping a server, with a small one in vLLM's place."""

import asyncio
import gc
import shutil
import subprocess
import sys
import threading
import weakref

import psutil
import pytest

from llama_index_genret.errors import ServerError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.endpoint.limits import Admission, Limits, TooBusy
from llama_index_genret.serving.endpoint.loaded_indexes import Registry
from llama_index_genret.serving.endpoint.schema import INDEXES_VARIABLE
from llama_index_genret.serving.launch import free_port, running_server
from llama_index_genret.store import RecordFilters, load_index, remove_images

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
    exit_with_parent.end_with_parent()  # whose parent is a shell, or this test
    engine_process.start()
    engine_process.join()
"""


@pytest.mark.parametrize(
    ("how", "serves", "ends"), [(["fork"], "a", True), (["spawn", "stubborn"], "a", True), (["spawn"], None, False)]
)
def test_the_engine_of_a_killed_server_ends_with_it_and_others_are_left_alone(tmp_path, monkeypatch, how, serves, ends):
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


def test_a_server_that_does_not_stop_is_killed_with_its_children(tmp_path):
    port, log = free_port(), tmp_path / "server.log"
    command = [sys.executable, "-c", STUBBORN, str(port)]
    with running_server(command, host="127.0.0.1", port=port, log=log, stop_timeout_s=0.2):
        child = psutil.Process(int(log.read_text().split()[0]))
    _, alive = psutil.wait_procs([child], timeout=120)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_limits_are_the_defaults_but_for_those_that_are_named():
    assert Limits.from_text("") == Limits()
    assert Limits.from_text(" queries=7\nrecall_s=3 ") == Limits(queries=7, recall_s=3)


@pytest.mark.parametrize(
    "text", ["queris=7", "queries", "queries=", "queries=0", "queries=-1", "body_mib=1.5", "=3", "stop_s=3"]
)
def test_a_limit_that_is_none_is_refused(text):
    with pytest.raises(ServerError, match=r"positive whole numbers.*recall_s"):
        Limits.from_text(f"body_mib=2 {text}")


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


def test_an_edit_is_read_once_for_all_who_wait_and_no_answer_is_older(untrained_index, tmp_path, monkeypatch):
    """Or each would hold a thread of the server's few, which its other routes need."""
    folder = tmp_path / "index"
    shutil.copytree(untrained_index.folder, folder)
    registry, read, readings = Registry({"index": folder}), Registry._read, []
    all_wait = threading.Event()

    def slowly(*args):
        readings.append(threading.active_count())
        loaded = read(*args)
        all_wait.wait()
        return loaded

    monkeypatch.setattr(Registry, "_read", slowly)

    async def ask():
        first = remove_images(load_index(folder), ["red-circle"]).version
        early = [asyncio.create_task(registry.current("index")) for _ in range(20)]
        while not readings:
            await asyncio.sleep(0.01)
        second = remove_images(load_index(folder), ["red-bar"]).version
        late = [asyncio.create_task(registry.current("index")) for _ in range(20)]
        await asyncio.sleep(0)
        late[0].cancel()
        all_wait.set()
        found = [loaded.version for loaded in await asyncio.gather(*early, *late[1:])]
        assert set(found[:20]) <= {first, second}
        assert set(found[20:]) == {second}

    asyncio.run(ask())
    assert len(readings) == 2
    assert max(readings) - min(readings) <= 1


def test_an_older_version_goes_with_its_last_search_and_needs_no_collection_of_garbage(untrained_index, tmp_path):
    """Its files are mapped: a server whose index is edited would hold more and more of them."""
    folder = tmp_path / "index"
    shutil.copytree(untrained_index.folder, folder)
    gc.collect()
    gc.disable()
    try:
        registry = Registry({"index": folder})
        searched = registry.get("index")
        filters = RecordFilters.model_validate({"filters": [{"key": "color", "operator": "!=", "value": "x"}]})
        leaves = searched.leaf_filter(filters)
        scorer = FakeScorer(searched.index.tokenizer.vocab_size)
        assert recall(scorer, searched.index.trie, [Prompt((5,))], SearchOptions(k=3, leaf_filter=leaves))
        older = [weakref.ref(searched), weakref.ref(searched.index), weakref.ref(searched.index.trie)]
        remove_images(load_index(folder), ["red-circle"])
        registry.get("index")
        assert all(part() for part in older)
        del searched, leaves
        assert not any(part() for part in older)
    finally:
        gc.enable()
