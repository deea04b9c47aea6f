"""The command line: its help, JSON, exit codes and errors, in separate processes where that is what counts."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from llama_index_genret.cli import app
from llama_index_genret.errors import EncoderUnavailable
from llama_index_genret.models.encoder import DEFAULT_ENCODER
from llama_index_genret.store import load_index
from llama_index_genret.training.options import TrainOptions


def genret(*arguments):
    command = [sys.executable, "-m", "llama_index_genret.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def genret_json(*arguments):
    done = genret(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def json_of(*arguments):
    """Return the JSON object of a command that runs in this process, which saves the seconds of loading torch."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


COMMANDS = typer.main.get_command(app).commands


def help_of(name):
    """Return the help of a command as one line, without the line breaks of the terminal."""
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_prints_every_bracketed_extra(name):
    """rich markup would drop `[eval]`."""
    command = COMMANDS[name]
    sources = [command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)]
    for source in sources:
        assert all(extra in help_of(name) for extra in re.findall(r"\[[a-z]+\]", source))


def test_help_of_eval_and_browse_has_their_extras():
    assert help_of("eval").count("Needs [eval].") == 1
    assert "Needs [browse]." in help_of("browse")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name):
    parameters = [one for one in COMMANDS[name].params if one.param_type_name == "option" and one.name != "help"]
    assert [one.name for one in parameters if not one.help] == []


def test_help_of_train_has_the_defaults_of_the_options():
    options = TrainOptions()
    for text in (
        f"Default: {options.epochs:g}",
        f"over all processes. Default: {options.batch_size}",
        f"to save memory. Default: {options.gradient_accumulation_steps}",
        f"Default: {options.learning_rate:g}",
        f"Rank of the LoRA matrices. Default: {options.lora_rank}",
        f"in other styles. Default: {options.redrawn}",
        "Default: " + ",".join(f"{task}={count}" for task, count in options.mix.items() if count),
    ):
        assert text.replace(" ", "") in help_of("train").replace(" ", "")  # a line break may split a long word


def test_commands_from_image_folder_to_answer(pictures, tiny_model_dir, tmp_path):
    """The commands index, train, inspect, query, ask, eval and export work in one session."""
    folder = tmp_path / "index"
    options = ("--model", tiny_model_dir, "--encoder", "none", "--device", "cpu")
    made = genret_json("index", pictures, "--out", folder, *options)
    assert (made["images"], made["scheme"], made["trained"]) == (20, "structured", False)
    untrained = genret("query", folder, "red circle")
    assert untrained.returncode == 1
    assert "genret train" in untrained.stderr
    assert json_of("train", folder, "--max-steps", 2, "--device", "cpu")["training"]["steps"] == 2
    facts = json_of("inspect", folder)
    assert facts["trained"]
    assert facts["nodes_per_level"][-1] <= 20
    found = genret_json("query", folder, "red circle", "-k", 3, "--filter", "color=red", "--device", "cpu")
    assert found["query"] == "red circle"
    assert [hit["file_name"].split("-")[0] for hit in found["hits"]] == ["red"] * 3
    assert set(found["hits"][0]) == {"image_id", "file_name", "score", "log_prob", "identifier"}
    certain = json_of("query", folder, "red circle", "-k", 3, "--mode", "exact", "--device", "cpu")
    assert certain["exact"]
    picture = pictures / "red-circle.png"
    for text in ([], ["the same, but blue"]):
        by_image = json_of("query", folder, *text, "--image", picture, "-k", 3, "--device", "cpu")
        assert len(by_image["hits"]) == 3
    answer = json_of("ask", folder, "What is it?", "-k", 2, "--device", "cpu")
    assert answer["sources"] == [hit["image_id"] for hit in answer["hits"]]
    assert len(answer["sources"]) == 2
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query": "red circle", "file_name": "red-circle.png"}\n')
    report = tmp_path / "report.html"
    figures = json_of("eval", folder, queries, "--baselines", "tfidf", "--report", report, "--device", "cpu")
    assert figures["n"] == 1
    assert figures["interval"]["recall@5"] == [figures["recall@5"]] * 2
    assert figures["baselines"]["tfidf"]["recall@1"] == 1.0
    assert "red circle" in report.read_text()
    checkpoint = tmp_path / "checkpoint"
    assert json_of("export", folder, "--out", checkpoint)["checkpoint"] == str(checkpoint)
    assert (checkpoint / "model.safetensors").is_file()


def test_scheme_options_are_used_and_inspect_shows_levels(pictures, tiny_model_dir, tmp_path):
    folder, tree = tmp_path / "index", tmp_path / "tree.png"
    options = ("--scheme-option", "method=rq", "--scheme-option", "sizes=[7,6]")
    made = genret_json("index", pictures, "--out", folder, "--model", tiny_model_dir, "--device", "cpu", *options)
    assert made["scheme_options"] == {"method": "rq", "levels": 2, "sizes": [7, 6], "source": "features"}
    assert made["alphabet"] == "new"
    facts = genret_json("inspect", folder, "--tree", tree)
    assert [level["codes_available"] for level in facts["levels"]] == [7, 6]
    assert [level["nodes"] for level in facts["levels"]] == facts["nodes_per_level"]
    assert tree.read_bytes().startswith(b"\x89PNG")


def test_index_without_a_hub_has_no_encoder_and_says_so(pictures, tiny_model_dir, tmp_path):
    options = ("--model", tiny_model_dir, "--device", "cpu")
    done = CliRunner().invoke(app, [*map(str, ("index", pictures, "--out", tmp_path / "index", *options))])
    assert done.exit_code == 0, done.output
    assert "made without an encoder" in " ".join(done.stderr.split())
    assert DEFAULT_ENCODER in done.stderr.replace("\n", "")
    assert load_index(tmp_path / "index").manifest.encoder is None


def test_named_encoder_that_does_not_load_is_an_error(pictures, tiny_model_dir, tmp_path):
    options = ("--model", tiny_model_dir, "--device", "cpu", "--encoder", DEFAULT_ENCODER)
    done = CliRunner().invoke(app, [*map(str, ("index", pictures, "--out", tmp_path / "index", *options))])
    assert isinstance(done.exception, EncoderUnavailable)
    assert not (tmp_path / "index").exists()


def test_index_with_an_encoder_recalls_before_training(pictures, tiny_model_dir, encoder, tmp_path):
    made = genret_json(
        *("index", pictures, "--out", tmp_path / "index", "--model", tiny_model_dir, "--device", "cpu"),
        *("--encoder", encoder),
    )
    assert made["scheme_options"]["source"] == "vectors"
    hits = genret_json("query", tmp_path / "index", "red circle", "-k", "3")["hits"]
    assert hits[0]["image_id"] == "red-circle"


@pytest.mark.torch
@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--scheme-option", "colour=1"], "colour", 1),
        (["--scheme", "roman"], "unknown scheme 'roman'", 1),
        (["--scheme-option", "levels"], "key=value", 2),
        (["--alphabet", "greek"], "existing", 2),
        (["--scheme", "atomic", "--scheme-option", "source=vectors"], "rejects the options", 1),
    ],
)
def test_invalid_scheme_option_fails_before_reading_images(arguments, words, code):
    done = genret("index", "nowhere", "--out", "unused", "--model", "unused", *arguments)
    assert done.returncode == code
    assert words in done.stderr


def test_index_with_another_tokenizer_is_refused(trained_index, tiny_model_dir, tmp_path):
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = genret("query", trained_index.folder, "red circle", "--model", other, "--device", "cpu")
    assert done.returncode == 1
    assert f"the tokenizer of {other}" in done.stderr.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["query", "nowhere", "x"], "no index in nowhere"),
        (["inspect", "nowhere"], "no index in nowhere"),
        pytest.param(["index", "nowhere", "--out", "unused", "--model", "unused"], "nowhere", marks=pytest.mark.torch),
    ],
)
def test_failure_prints_one_message_and_exits_with_1(arguments, words, tmp_path):
    done = genret(*arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [["query"], ["nonsense"], ["query", "a", "b", "-k", "0"], ["train", "x", "--epochs", "1", "--max-steps", "1"]],
)
def test_wrong_usage_exits_with_2(arguments):
    assert genret(*arguments).returncode == 2


def test_invalid_filter_error_shows_the_format(trained_index):
    done = genret("query", trained_index.folder, "x", "--filter", "color", "--device", "cpu")
    assert done.returncode == 1
    assert "key=value" in done.stderr
