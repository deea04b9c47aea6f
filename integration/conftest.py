"""Fixtures of the integration tests: real models, real servers, each started once and stopped by its process id."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from integration.weights import minilm_folder
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.serving.launch import CPU_FLAGS, free_port, running_server
from llama_index_genret.store import load_index
from tests.conftest import (
    _no_loop_is_left_open,
    encoded_index,
    encoder,
    pictures,
    tiny_mllm,
    tiny_model_dir,
    trained_index,
    trained_mllm,
    untrained_index,
)

__all__ = [
    "_no_loop_is_left_open",
    "encoded_index",
    "encoder",
    "pictures",
    "tiny_mllm",
    "tiny_model_dir",
    "trained_index",
    "trained_mllm",
    "untrained_index",
]

GENRET = [sys.executable, "-m", "llama_index_genret.cli"]


def genret(*arguments, timeout_s=900.0, **options):
    """Run the command line in a process of its own."""
    command = [*GENRET, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, **options)


def genret_json(*arguments, **options):
    """Return the one JSON object that a command prints with --json."""
    done = genret(*arguments, "--json", **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def server(trained_index, tmp_path_factory):
    """Run `genret serve` on the tiny index: a stock vLLM server on the CPU."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "vllm.log"
    command = [*GENRET, "serve", str(trained_index.folder), "--port", str(port), "--", *CPU_FLAGS]
    with running_server(command, host="127.0.0.1", port=port, log=log) as served:
        yield served


@pytest.fixture
def server_scorer(server):
    return VllmScorer(server.api_base)


@pytest.fixture(scope="module")
def browser():
    """Run headless Chromium.

    It closes with its module: Playwright holds an event loop, and other tests run their own.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("no `chromium` on the PATH; install it with `apt-get install chromium`")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Run `genret demo --vllm` on the assembled base model. Returns its JSON, and its index."""
    base = subprocess.run([sys.executable, "-m", "integration.base_model"], capture_output=True, text=True, check=True)
    out = tmp_path_factory.mktemp("demo")
    options = ("--model", base.stdout.splitlines()[-1], "--encoder", minilm_folder(), "--out", out)
    result = genret_json("demo", "--vllm", *options, timeout_s=3500)
    return result, load_index(Path(out) / "index")
