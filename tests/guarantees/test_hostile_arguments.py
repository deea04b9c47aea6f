"""Hostile arguments of the command line, and hostile texts in its output."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llama_index_genret import cli
from llama_index_genret.cli import recall as recall_commands
from llama_index_genret.cli.options import parse_filters
from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import CorpusError, FilterError, ModelError, NotWritten, StoreError, TrainingError
from llama_index_genret.identifiers.tree_plot import draw_tree
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.export import export_checkpoint
from llama_index_genret.store import check_free, load_index
from llama_index_genret.store.build import build_index
from llama_index_genret.training.options import TrainOptions

pytestmark = pytest.mark.torch

HOSTILE = "[/x] [red]sign[/red] :smile: \x1b[31mred\x1b[0m \u202egnp.exe é"
"""Rich markup, a terminal escape sequence, and text from right to left."""


@pytest.fixture(scope="module")
def hostile_index(tiny_mllm, tmp_path_factory):
    """An index of two images whose captions, ids and metadata are HOSTILE."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = []
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), color).save(folder / f"[{color}].png")
        fields = {"file_name": f"[{color}].png", "image_id": f"[/{color}]", "text": HOSTILE, "public": bool(number)}
        rows.append(json.dumps({**fields, "note": HOSTILE, "year": 1999 + number}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return build_index(read_corpus(folder), tmp_path_factory.mktemp("index") / "index", tiny_mllm, scheme="numeric")


@pytest.fixture
def genret(hostile_index, monkeypatch):
    """Return a function that runs a command with a fake scorer: exit code, stdout, stderr."""
    scorer = FakeScorer(hostile_index.tokenizer.vocab_size)
    monkeypatch.setattr(recall_commands, "open_scorer", lambda *_: scorer)

    def run(*arguments, encoding="utf-8"):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "argv", ["genret", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        for stream in streams:
            stream.flush()
        return ended.value.code, *(stream.buffer.getvalue().decode(encoding) for stream in streams)

    return run


def test_markup_is_printed_and_control_codes_are_escaped(hostile_index, genret):
    code, output, _ = genret("query", hostile_index.folder, HOSTILE)
    assert code == 0
    title, *table = output.splitlines()
    for text in (title, "".join(line.split("│")[2].strip() for line in table if "[red].png" in line)):
        assert "[/x] [red]sign[/red] :smile:" in text
    assert "\x1b" not in output
    assert "\u202e" not in output
    assert r"\x1b[31mred" in title
    assert r"\u202egnp.exe" in title


def test_error_is_one_line_without_control_codes(hostile_index, genret, tmp_path):
    missing = tmp_path / ("a" * 200) / "\x1b[31m.jsonl"
    code, _, error = genret("eval", hostile_index.folder, missing)
    assert code == 1
    assert error.count("\n") == 1
    assert f"{missing.parent}/\\x1b[31m.jsonl cannot be read" in error


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_unencodable_text_is_escaped_and_json_stays_valid(hostile_index, genret, encoding):
    code, output, _ = genret("query", hostile_index.folder, "é 図", encoding=encoding)
    assert code == 0
    assert {"ascii": r"\xe9 \u56f3", "latin-1": r"é \u56f3", "utf-8": "é 図"}[encoding] in output
    code, output, _ = genret("query", hostile_index.folder, "é 図", "--json", encoding=encoding)
    assert code == 0
    assert json.loads(output)["query"] == "é 図"
    assert ("図" in output) == (encoding == "utf-8")


def test_contradicting_filters_are_refused():
    with pytest.raises(FilterError, match="color=red and color=blue contradict"):
        parse_filters(["color=red", "shape=bar", "color=blue"])
    assert parse_filters(["color=red", "color=red"]) == {"color": "red"}


@pytest.mark.parametrize(("value", "image_id"), [("true", "[/blue]"), ("True", "[/blue]"), ("false", "[/red]")])
def test_filter_values_true_and_false_are_booleans(hostile_index, genret, value, image_id):
    _, output, _ = genret("query", hostile_index.folder, "x", "--filter", f"public={value}", "--json")
    assert [hit["image_id"] for hit in json.loads(output)["hits"]] == [image_id]


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000])
def test_unparsable_option_is_a_usage_error(genret, value):
    code, _, error = genret("index", "nowhere", "--out", "unused", "--scheme-option", f"levels={value}")
    assert code == 2
    assert "--scheme-option levels" in error


def test_huge_k_costs_no_memory(hostile_index):
    """A table with k columns would need eight gigabytes."""
    scorer = FakeScorer(hostile_index.tokenizer.vocab_size)
    everything, more = (recall(scorer, hostile_index.trie, [Prompt((1, 2))], SearchOptions(k=k)) for k in (2, 10**9))
    assert more == everything


@pytest.mark.parametrize("device", ["xpu9", "cuda:99", "meta", ""])
def test_missing_device_is_refused_before_weights_load(device, tmp_path):
    with pytest.raises(ModelError, match=f"the device '{device}' cannot be used"):
        load_mllm(str(tmp_path), device=device)


@pytest.mark.parametrize("port", ["-1", "0", "65536", "http"])
def test_invalid_port_is_refused_before_a_server_starts(hostile_index, genret, port):
    code, _, error = genret("serve", hostile_index.folder, "--port", port)
    assert code == 2
    assert "'--port'" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"epochs": float("inf")}, "epochs=inf"),
        ({"epochs": 0}, "epochs=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"lora_rank": 10**9}, "lora_rank=1000000000"),
        ({"mix": {"retrieve": 5 * 10**9}}, "5000000000"),
        ({"redrawn": -1}, "redrawn=-1"),
        ({"minutes": 0.0}, "minutes=0.0"),
        ({"minutes": float("nan")}, "minutes=nan"),
        ({"patience": 0}, "patience=0"),
        ({"redrawn": 4, "mix": {"retrieve": 1}}, "redrawn=4 redraws images for the task `memorise`"),
    ],
)
def test_invalid_training_options_are_refused(options, words):
    with pytest.raises(TrainingError, match=words):
        TrainOptions(**options)


def test_queries_to_imitate_must_be_utf_8(untrained_index, genret, tmp_path):
    queries = tmp_path / "queries.txt"
    queries.write_bytes(b"red\n\xff\n")
    code, _, error = genret("train", untrained_index.folder, "--imitate", queries)
    assert code == 1
    assert f"{queries}, line 2: not UTF-8" in error


def test_unknown_dtype_is_refused_before_a_model_loads(untrained_index, tmp_path):
    with pytest.raises(ModelError, match=r"unknown dtype '__doc__'.*float32, bfloat16"):
        export_checkpoint(untrained_index, tmp_path / "out", dtype="__doc__")


def test_unwritable_tree_plot_raises_and_leaves_nothing(hostile_index, tmp_path):
    names, paths = [("a", "b"), ("a", "c")], [record.path for record in hostile_index.records]
    with pytest.raises(NotWritten, match=str(tmp_path)):
        draw_tree(names, paths, tmp_path)
    assert list(tmp_path.parent.glob(f".{tmp_path.name}*")) == []


def test_figures_are_printed_before_an_unwritable_report(hostile_index, genret, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    scorer = FakeScorer(hostile_index.tokenizer.vocab_size)
    from llama_index_genret.cli import evaluate

    monkeypatch.setattr(evaluate, "open_trained", lambda *_: scorer)
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query": "red", "image_id": "[/red]"}\n')
    code, output, error = genret("eval", hostile_index.folder, queries, "--report", tmp_path, "--json")
    assert code == 1
    assert json.loads(output)["n"] == 1
    assert f"{tmp_path} could not be written" in error


def test_folder_name_must_be_utf_8(hostile_index, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(hostile_index.folder, folder)
    for use, error in ((load_index, StoreError), (read_corpus, CorpusError)):
        with pytest.raises(error, match=r"'.*caf\\udce9' has a name that is not UTF-8: rename it"):
            use(folder)
    with pytest.raises(StoreError, match="not UTF-8"):
        check_free(tmp_path / os.fsdecode(b"new\xe9"))


def test_relative_model_path_is_stored_as_absolute(tiny_mllm, monkeypatch):
    model = Path(tiny_mllm.name_or_path)
    monkeypatch.chdir(model.parent)
    assert dataclasses.replace(tiny_mllm, name_or_path=model.name).entry() == tiny_mllm.entry()


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_result_on_a_full_disk_or_a_closed_pipe(hostile_index, form):
    command = [sys.executable, "-m", "llama_index_genret.cli", "inspect", str(hostile_index.folder), *form]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 1
    assert "error: the result could not be printed" in done.stderr
    assert done.stderr.count("\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
