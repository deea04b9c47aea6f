"""What is given on the command line, what the commands show of hostile texts, and where they show it."""

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
"""Markup of rich's, an escape sequence of terminals, text that runs from right to left."""


@pytest.fixture(scope="module")
def hostile_index(tiny_mllm, tmp_path_factory):
    """Two pictures whose captions, ids and metadata are HOSTILE."""
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
    """Run a command here, on a scorer that needs no weights: exit code, stdout, stderr."""
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


def test_what_reads_as_markup_is_shown_as_it_is_and_nothing_steers_the_terminal(hostile_index, genret):
    code, shown, _ = genret("query", hostile_index.folder, HOSTILE)
    assert code == 0
    title, *table = shown.splitlines()
    for text in (title, "".join(line.split("│")[2].strip() for line in table if "[red].png" in line)):
        assert "[/x] [red]sign[/red] :smile:" in text
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert r"\x1b[31mred" in title
    assert r"\u202egnp.exe" in title


def test_an_error_is_one_line_however_long_and_steers_no_terminal(hostile_index, genret, tmp_path):
    missing = tmp_path / ("a" * 200) / "\x1b[31m.jsonl"
    code, _, said = genret("eval", hostile_index.folder, missing)
    assert code == 1
    assert said.count("\n") == 1
    assert f"{missing.parent}/\\x1b[31m.jsonl cannot be read" in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_the_characters_of_a_text_gets_escapes_and_json_stays_json(hostile_index, genret, encoding):
    code, shown, _ = genret("query", hostile_index.folder, "é 図", encoding=encoding)
    assert code == 0
    assert {"ascii": r"\xe9 \u56f3", "latin-1": r"é \u56f3", "utf-8": "é 図"}[encoding] in shown
    code, shown, _ = genret("query", hostile_index.folder, "é 図", "--json", encoding=encoding)
    assert code == 0
    assert json.loads(shown)["query"] == "é 図"
    assert ("図" in shown) == (encoding == "utf-8")


def test_filters_that_contradict_each_other_are_an_error_and_one_given_twice_is_none():
    with pytest.raises(FilterError, match="both color=red and color=blue"):
        parse_filters(["color=red", "shape=bar", "color=blue"])
    assert parse_filters(["color=red", "color=red"]) == {"color": "red"}


@pytest.mark.parametrize(("wanted", "found"), [("true", "[/blue]"), ("True", "[/blue]"), ("false", "[/red]")])
def test_a_filter_takes_true_and_false_as_json_writes_them(hostile_index, genret, wanted, found):
    _, shown, _ = genret("query", hostile_index.folder, "x", "--filter", f"public={wanted}", "--json")
    assert [hit["image_id"] for hit in json.loads(shown)["hits"]] == [found]


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000])
def test_an_option_that_no_parser_reads_is_wrong_usage(genret, value):
    code, _, said = genret("index", "nowhere", "--out", "unused", "--scheme-option", f"levels={value}")
    assert code == 2
    assert "--scheme-option levels" in said


def test_as_many_images_as_there_are_cost_what_they_cost_however_many_are_wanted(hostile_index):
    """A table as wide as k would be eight gigabytes."""
    scorer = FakeScorer(hostile_index.tokenizer.vocab_size)
    everything, more = (recall(scorer, hostile_index.trie, [Prompt((1, 2))], SearchOptions(k=k)) for k in (2, 10**9))
    assert more == everything


@pytest.mark.parametrize("device", ["xpu9", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_named_before_weights_are_read(device, tmp_path):
    with pytest.raises(ModelError, match=f"the device '{device}' cannot be used"):
        load_mllm(str(tmp_path), device=device)


@pytest.mark.parametrize("port", ["-1", "0", "65536", "http"])
def test_a_port_that_is_none_is_refused_before_a_server_starts(hostile_index, genret, port):
    code, _, said = genret("serve", hostile_index.folder, "--port", port)
    assert code == 2
    assert "'--port'" in said


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
        ({"redrawn": 4, "mix": {"retrieve": 1}}, "redrawn=4 draws pictures for the task `memorise`"),
    ],
)
def test_options_of_no_training_are_an_error_that_names_them(options, words):
    with pytest.raises(TrainingError, match=words):
        TrainOptions(**options)


def test_queries_to_imitate_that_are_no_text_are_an_error_that_names_file_and_line(untrained_index, genret, tmp_path):
    queries = tmp_path / "queries.txt"
    queries.write_bytes(b"red\n\xff\n")
    code, _, said = genret("train", untrained_index.folder, "--imitate", queries)
    assert code == 1
    assert f"{queries}, line 2: not UTF-8" in said


def test_a_checkpoint_of_no_known_dtype_is_refused_before_a_model_is_loaded(untrained_index, tmp_path):
    with pytest.raises(ModelError, match=r"dtype='__doc__'.*float32, bfloat16"):
        export_checkpoint(untrained_index, tmp_path / "out", dtype="__doc__")


def test_a_picture_of_the_tree_that_cannot_be_written_is_an_error_and_harms_nothing(hostile_index, tmp_path):
    names, paths = [("a", "b"), ("a", "c")], [record.path for record in hostile_index.records]
    with pytest.raises(NotWritten, match=str(tmp_path)):
        draw_tree(names, paths, tmp_path)
    assert list(tmp_path.parent.glob(f".{tmp_path.name}*")) == []


def test_figures_are_told_before_a_report_that_cannot_be_written(hostile_index, genret, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    scorer = FakeScorer(hostile_index.tokenizer.vocab_size)
    from llama_index_genret.cli import evaluate

    monkeypatch.setattr(evaluate, "open_scorer", lambda *_: scorer)
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query": "red", "image_id": "[/red]"}\n')
    code, shown, said = genret("eval", hostile_index.folder, queries, "--report", tmp_path, "--json")
    assert code == 1
    assert json.loads(shown)["n"] == 1
    assert f"{tmp_path} could not be written" in said


def test_folders_whose_names_are_not_utf_8_are_refused_by_name(hostile_index, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(hostile_index.folder, folder)
    for use, error in ((load_index, StoreError), (read_corpus, CorpusError)):
        with pytest.raises(error, match=r"'.*caf\\udce9' has a name that is not UTF-8: rename it"):
            use(folder)
    with pytest.raises(StoreError, match="not UTF-8"):
        check_free(tmp_path / os.fsdecode(b"new\xe9"))


def test_a_model_named_from_one_folder_is_found_from_another(tiny_mllm, monkeypatch):
    model = Path(tiny_mllm.name_or_path)
    monkeypatch.chdir(model.parent)
    assert dataclasses.replace(tiny_mllm, name_or_path=model.name).entry() == tiny_mllm.entry()


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_result_that_finds_the_disk_full_is_an_error_and_one_that_nobody_reads_is_none(hostile_index, form):
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
