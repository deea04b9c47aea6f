"""Tests of `genret batch --offline`: real `vllm.LLM` on the CPU in a process of its own, against this process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from integration.conftest import GENRET, genret_json
from llama_index_genret.cli.models import VLLM_ENVIRONMENT
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import Normalise, SearchOptions
from llama_index_genret.store import load_index

OWNER = "GENRET_TEST_OWNER"
"""Variable that identifies a process and all that it starts."""


def processes_of(owner):
    """Return the ids of the living processes that have the variable in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{OWNER}={owner}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # ended, or of another user
            continue
    return found


def wait_until(holds, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


@pytest.fixture(scope="module")
def queries(trained_index, tmp_path_factory):
    """Make enough queries that a run takes seconds. One of 61 ended before it could be killed."""
    templates = ("{}", "where is a {}?", "{} ?", *(f"{number} of {{}}" for number in range(2, 20)))
    texts = [text.format(record.captions[0]) for text in templates for record in trained_index.records]
    path = tmp_path_factory.mktemp("batch") / "queries.jsonl"
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in [*texts, " "]))
    return path


@pytest.fixture(scope="module")
def local(trained_index, trained_mllm, queries, tmp_path_factory):
    """Write HITS.jsonl with the model in this process."""
    out = tmp_path_factory.mktemp("local") / "hits.jsonl"
    genret_json("batch", trained_index.folder, queries, "--out", out, "-k", 5, "--device", "cpu")
    return read(out)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_alike(theirs, ours):
    assert [line["query"] for line in theirs] == [line["query"] for line in ours]
    for a, b in zip(theirs, ours, strict=True):
        assert a.get("error") == b.get("error")
        found, expected = a.get("hits", []), b.get("hits", [])
        assert [hit["image_id"] for hit in found] == [hit["image_id"] for hit in expected]
        np.testing.assert_allclose([hit["log_prob"] for hit in found], [hit["log_prob"] for hit in expected], atol=1e-3)


def test_offline_batch_equals_process_and_resumes_after_a_kill(trained_index, queries, local, tmp_path):
    out, part = tmp_path / "hits.jsonl", tmp_path / "hits.jsonl.part"
    arguments = ["batch", trained_index.folder, queries, "--out", out, "-k", 5, "--offline", "--batch-size", 4]
    environment = {**os.environ, OWNER: str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        killed = subprocess.Popen([*GENRET, *map(str, arguments)], env=environment, stdout=log, stderr=log)
        assert wait_until(lambda: (part.is_file() and part.stat().st_size) or killed.poll() is not None, 300)
        killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()[-4000:]
    assert wait_until(lambda: not processes_of(tmp_path)), "vLLM outlives the process that was killed"
    kept = part.read_bytes().count(b"\n")
    summary = genret_json(*arguments, env=environment)
    assert not processes_of(tmp_path)
    assert summary["kept"] == kept - kept % 4 > 0
    assert (summary["queries"], summary["refused"]) == (len(local), 1)
    assert_alike(read(out), local)
    assert len({line["hits"][0]["image_id"] for line in read(out) if "hits" in line}) > 1


def test_processes_are_found_by_their_environment_variable():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={OWNER: "probe"}) as process:
        assert wait_until(lambda: processes_of("probe") == [process.pid], 10)
        process.communicate(b"\n")
    assert processes_of("probe") == []


IN_A_PROCESS_OF_ITS_OWN = """
import json, sys
from pathlib import Path
from integration.test_batch import ranked
from llama_index_genret.scorers.vllm_offline import VllmOfflineScorer
from llama_index_genret.serving.launch import served_checkpoint
from llama_index_genret.store import load_index

if __name__ == "__main__":
    index = load_index(Path(sys.argv[1]))
    print(json.dumps(ranked(index, VllmOfflineScorer.load(served_checkpoint(index)), together=True)))
"""


def ranked(index, scorer, *, together):
    """Hits of alternating texts and images, with either score, have the same (leaf, log p) in one search and alone."""
    texts = [index.prompts.for_query(index.tokenizer, record.captions[0]) for record in index.records]
    images = [index.prompts.for_image(index.tokenizer, record.path) for record in index.records]
    prompts = [prompt for pair in zip(texts, images, strict=True) for prompt in pair]
    batches = [prompts] if together else [[prompt] for prompt in prompts]
    rankings = [
        r for n in Normalise for b in batches for r in recall(scorer, index.trie, b, SearchOptions(k=5, normalise=n))
    ]
    return [[(hit.leaf, hit.log_prob) for hit in ranking.hits] for ranking in rankings]


def test_text_and_image_prompts_score_as_in_the_process(trained_index, trained_mllm):
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, trained_index.folder],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **VLLM_ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = np.array(json.loads(done.stdout))
    expected = np.array(ranked(trained_index, TransformersScorer(trained_mllm), together=False))
    np.testing.assert_array_equal(found[..., 0], expected[..., 0])
    np.testing.assert_allclose(found[..., 1], expected[..., 1], atol=1e-3)
    assert len({tuple(row) for row in expected[1::2, :, 0]}) > 2, "the pictures make no difference"


def test_offline_pseudo_queries_are_stored_with_their_source(pictures, tiny_model_dir, tmp_path):
    """The base model runs `genret write-queries --offline`. Most of its random text is refused, but not all."""
    bare = tmp_path / "bare"
    shutil.copytree(pictures, bare, ignore=shutil.ignore_patterns("metadata.jsonl"))
    genret_json("index", bare, "--out", tmp_path / "index", "--model", tiny_model_dir, "--device", "cpu")
    summary = genret_json("write-queries", tmp_path / "index", "--offline", "--batch-size", 10)
    lines = load_index(tmp_path / "index").pseudo_queries
    texts = [query.text for line in lines.values() for query in line.queries]
    assert summary["images"] == len(lines) == 20
    assert summary["pseudo_queries"] == summary["queries"] == len(texts) > 0
    assert sum(summary["refused"].values()) > 20
    assert all(texts)
    provenance = {line.provenance for line in lines.values()}
    assert [(one.written_by, one.model, one.fingerprint) for one in provenance] == [
        ("vllm.LLM", str(tiny_model_dir), None)
    ]
