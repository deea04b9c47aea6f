"""Tests of one training in two processes, by `accelerate launch`: the same examples and equal losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from llama_index_genret.corpus import read_corpus
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.serving.launch import free_port
from llama_index_genret.store import load_index
from llama_index_genret.store.build import build_index
from llama_index_genret.store.model_state import adapter_folder
from tests.conftest import draw_pictures
from tests.tiny_model import make_tiny_model

STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    draw_pictures(folder / "pictures")
    make_tiny_model(folder / "model")
    return folder


def trained(folder: Path, name: str, n_processes: int, *options: str):
    """Train in a number of processes. Returns the index, and the output."""
    mllm = load_mllm(str(folder / "model"), device="cpu")
    build_index(read_corpus(folder / "pictures"), folder / name, mllm)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    launch += ["--multi_gpu"] * (n_processes > 1)  # accelerate's launcher for CPUs (`--cpu`) needs MPI
    launch += ["--num_processes", str(n_processes), "--main_process_port", str(free_port())]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "llama_index_genret.cli"]
    train = ["train", str(folder / name), "--max-steps", str(STEPS), "--device", "cpu", "--json", *options]
    done = subprocess.run([*launch, *train], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return load_index(folder / name), json.loads(done.stdout)


def test_two_processes_train_as_one_does(folder):
    """The processes share the validation queries, and take the mean of their clocks for the budget."""
    queries = folder / "queries.jsonl"
    lines = (folder / "pictures" / "metadata.jsonl").read_text().splitlines()
    rows = [{"query": row["text"][0], "file_name": row["file_name"]} for row in map(json.loads, lines)]
    queries.write_text("\n".join(map(json.dumps, rows)))
    options = ("--validation", str(queries), "--minutes", "60")
    alone, _ = trained(folder, "one", 1, *options)
    together, printed = trained(folder, "two", 2, *options)
    assert printed["trained"]
    one, two = alone.manifest.training, together.manifest.training
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(two["losses"]) == STEPS
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=2e-3)
    assert [entry["step"] for entry in two["validation"]] == list(range(1, STEPS + 1))
    for ours, theirs in zip(two["validation"], one["validation"], strict=True):
        assert ours["recall@5"] == pytest.approx(theirs["recall@5"], abs=0.051)  # one query of 20
    assert np.ptp(one["losses"]) > 0.02  # steps differ by more than that, so another order would be detected
    weights = [load_file(adapter_folder(index) / "adapter_model.safetensors") for index in (alone, together)]
    assert weights[0].keys() == weights[1].keys()


def test_a_batch_that_does_not_divide_is_refused(folder):
    with pytest.raises(AssertionError, match="does not divide into 2 processes"):
        trained(folder, "odd", 2, "--batch-size", "21")
