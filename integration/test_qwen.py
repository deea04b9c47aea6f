"""Tests of the Qwen-VL models, tiny and random: index, train, recall, export, serve, answer.

Their processor and vLLM's code for them need torchvision. It is in a folder of its own, which only the processes
started here can import.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from integration.conftest import GENRET, genret_json
from integration.in_process import ANSWER_TOKENS, TOP_K, answers, ranked
from integration.test_vllm import said
from llama_index_genret import GenerativeImageRetriever, genret_llm
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.serving.launch import CPU_FLAGS, free_port, running_server
from llama_index_genret.store import load_index
from tests.conftest import draw_pictures
from tests.tiny_qwen import FAMILIES, resize_images, save_tiny_qwen

QUESTION = "What is in the picture?"
TORCHVISION = Path(sys.prefix) / "torchvision"
OPERATORS = Path(__file__).parent / "torchvision_ops"


@pytest.fixture(scope="module")
def environment():
    """Environment for processes that import torchvision."""
    if not TORCHVISION.is_dir():
        pytest.fail(f"no {TORCHVISION}; install it with `make {Path(sys.prefix).name}/.qwen`")
    paths = [str(OPERATORS), str(TORCHVISION), os.environ.get("PYTHONPATH", "")]
    # A second thread only slows down so small a model.
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Draw ten images of two shapes and three sizes."""
    folder = draw_pictures(tmp_path_factory.mktemp("pictures") / "images")
    lines = (folder / "metadata.jsonl").read_text().splitlines()[::2]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return resize_images(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def qwen(request, pictures, environment, tmp_path_factory):
    """Train an index by the command line. Yields it with its results in process, and a server of it."""
    folder = tmp_path_factory.mktemp(request.param)
    model, out = save_tiny_qwen(folder / "model", request.param), folder / "shapes"
    env = os.environ | environment
    genret_json("index", pictures, "--out", out, "--model", model, "--device", "cpu", env=env)
    genret_json("train", out, "--max-steps", "80", "--learning-rate", "0.01", "--device", "cpu", env=env)
    index = load_index(out)
    questions = {
        "texts": [carrier.format(r.captions[0]) for r in index.records for carrier in ("{}", "show me the {}")],
        "images": [str(record.path) for record in index.records],
        "question": QUESTION,
    }
    local = subprocess.run(
        [sys.executable, "-m", "integration.in_process", str(out)],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        env=env,
        cwd=OPERATORS.parents[1],
    )
    assert local.returncode == 0, local.stderr[-4000:]
    port, log = free_port(), folder / "vllm.log"
    command = [*GENRET, "serve", str(out), "--port", str(port), "--", *CPU_FLAGS]
    with running_server(command, host="127.0.0.1", port=port, log=log, environment=env) as served:
        yield SimpleNamespace(
            index=index, questions=questions, local=json.loads(local.stdout), api_base=served.api_base
        )


def assert_same_ranking(found, expected):
    """Check for the same images, with log-probabilities within a thousandth, in an order that these allow."""
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[name] for name in expected], list(expected.values()), atol=1e-3)


def test_a_stock_server_finds_what_the_process_finds(qwen):
    retriever = GenerativeImageRetriever(qwen.index, VllmScorer(qwen.api_base), similarity_top_k=TOP_K)
    for text, expected in zip(qwen.questions["texts"], qwen.local["texts"], strict=True):
        assert_same_ranking(ranked(retriever, text), expected)
    assert len({next(iter(found)) for found in qwen.local["texts"]}) > len(qwen.index.records) / 2


def test_the_recall_endpoint_finds_what_the_process_finds(qwen):
    request = {"queries": qwen.questions["texts"], "k": TOP_K}
    results = httpx.post(f"{qwen.api_base}/recall", json=request, timeout=60).json()["results"]
    for result, expected in zip(results, qwen.local["texts"], strict=True):
        assert_same_ranking({hit["image_id"]: hit["log_prob"] for hit in result["hits"]}, expected)


def test_model_generates_identifiers_of_memorised_images(qwen):
    named = [next(iter(found)) for found in qwen.local["images"]]
    right = np.mean([name == record.image_id for name, record in zip(named, qwen.index.records, strict=True)])
    assert right >= 0.5  # by chance: 0.1


def test_image_answers_of_server_and_process_are_equal(qwen):
    retriever = GenerativeImageRetriever(qwen.index, VllmScorer(qwen.api_base))
    llm = genret_llm(qwen.api_base, max_tokens=ANSWER_TOKENS)
    theirs = [said(answer) for answer in answers(llm, retriever, QUESTION, qwen.questions["images"])]
    assert theirs == [said(answer) for answer in qwen.local["answers"]]
    assert len(set(theirs)) > 1


def test_command_line_recalls_the_same_in_process_and_server(qwen, environment):
    local, remote = (
        genret_json("query", qwen.index.folder, "red circle", *where, env=os.environ | environment)
        for where in (["--device", "cpu"], ["--server", qwen.api_base])
    )
    assert_same_ranking(*({hit["image_id"]: hit["log_prob"] for hit in done["hits"]} for done in (remote, local)))
