"""The commands, links and images of README and of the pages that it links to, and README's line of `metadata.jsonl`.

The real parser reads every `genret` line of a block. All commands run in order on a tiny model, except `genret browse`
and `genret serve`, which `integration/` starts. For modules that take hours, only the flags are checked.
"""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from llama_index_genret.cli import app
from llama_index_genret.serving.endpoint.schema import RecallRequest
from llama_index_genret.store import load_index
from tests.conftest import draw_pictures
from tests.pages import OTHERS, PAGES, README, ROOT, read_page

PROSE = "\n".join(page.prose for page in PAGES)
INLINE = [code for page in PAGES for code in page.inline]
SHELL = [words for page in PAGES for words in page.shell]
COMMANDS = get_command(app).commands
NOT_RUN = ("browse", "serve")

INSTEAD = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": "tiny-model",
    "8": "2",
    "--offline": None,
}
"""Replacements of words: the model has 67,000 weights in two layers, and the batch runs without vLLM."""

MORE = {
    "index": ["--encoder", "tiny-encoder"],
    "train": ["--max-steps", "2", "--lora-rank", "2"],
    "write-queries": ["--per-image", "3"],
}
"""Additional options: the encoder, without a model hub, and those that shorten slow commands."""


def commands_of(program):
    """Return the arguments of each command of a program in the shell blocks."""
    return [words[1:] for words in SHELL if words[0] == program]


@dataclass
class Session:
    """The JSON output of each command, by its words."""

    outputs: dict[str, dict] = field(default_factory=dict)
    folder: Path = Path()


def make_photos(folder, *, album):
    """Write the README's image and twenty drawn ones."""
    drawn = [json.loads(line) for line in (draw_pictures(folder) / "metadata.jsonl").read_text().splitlines()]
    (row,) = map(json.loads, README.of_language("json"))
    Image.new("RGB", (64, 48), "sandybrown").save(folder / row["file_name"])
    lines = [row, *({"file_name": one["file_name"], "text": one["text"], "album": album} for one in drawn)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def session(tmp_path_factory, tiny_model_dir, encoder):
    """Run the commands in a folder with photos and files of queries."""
    session = Session(folder=tmp_path_factory.mktemp("readme"))
    folder = session.folder
    (folder / "tiny-model").symlink_to(tiny_model_dir)
    (folder / "tiny-encoder").symlink_to(encoder)
    make_photos(folder / "photos", album="2023")
    shutil.copy(folder / "photos" / "red-circle.png", folder / "dog.jpg")
    (folder / "new-photos").mkdir()
    Image.new("RGB", (50, 50), "purple").save(folder / "new-photos" / "purple.png")
    added = {"file_name": "purple.png", "text": "a purple square", "album": "2024"}
    (folder / "new-photos" / "metadata.jsonl").write_text(json.dumps(added))
    queries = [{"query": "the dog", "file_name": "beach.jpg"}, {"query": "red", "file_name": "red-circle.png"}]
    for name in ("queries", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        asyncio.set_event_loop(None)
        for words in commands_of("genret"):
            name, *given = words
            options = given[: given.index("--")] if "--" in given else given
            COMMANDS[name].make_context(name, list(given))
            if name in NOT_RUN:
                continue
            replaced = [INSTEAD.get(word, word) for word in options]
            if "--epochs" in replaced:
                replaced = replaced[: replaced.index("--epochs")]
            arguments = [name, *filter(None, replaced), *MORE.get(name, []), "--json"]
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, (arguments, done.output, done.exception)
            session.outputs[shlex.join(words)] = json.loads(done.stdout)
        yield session


def test_every_block_has_a_tested_language():
    """`test_readme.py` tests Python, `test_readme_map.py` the tree of packages, and this file the rest by program.

    `integration/test_deploy.py` starts docker, sed and nginx.
    """
    assert {language for page in PAGES for language, _ in page.blocks} == {"python", "json", "sh", "text"}
    assert [language for page in PAGES for language, _ in page.blocks].count("text") == 1
    programs = {next(word for word in words if "=" not in word) for words in SHELL}
    assert programs == {"make", "pip", "genret", "accelerate", "curl", "python", "jupyter"} | {"docker", "sed", "nginx"}


def test_commands_run_in_order(session):
    outputs = session.outputs
    assert len(outputs) == len([words for words in commands_of("genret") if words[0] not in NOT_RUN]) == 13
    filtered = next(value for words, value in outputs.items() if words.startswith("query") and "album=2024" in words)
    assert [hit["file_name"] for hit in filtered["hits"]] == ["beach.jpg"]
    by_image = next(value for words, value in outputs.items() if "--image" in words)
    assert len(by_image["hits"]) == 5
    answered = next(value for words, value in outputs.items() if words.startswith("ask"))
    assert len(answered["sources"]) == 1
    evaluated = next(value for words, value in outputs.items() if words.startswith("eval"))
    assert evaluated["n"] == 2
    assert set(evaluated["baselines"]) == {"tfidf", "bm25"}


def test_commands_leave_the_documented_files(session):
    names = {record.file_name for record in load_index(session.folder / "photos-index").records}
    assert "purple.png" in names
    assert "beach.jpg" not in names
    assert (session.folder / "report.html").read_text().count("<svg ") == 4
    assert len((session.folder / "hits.jsonl").read_text().splitlines()) == 2


def test_accelerate_command_is_read_by_both_parsers(session):
    launch = pytest.importorskip("accelerate.commands.launch")
    (words,) = commands_of("accelerate")
    assert words[0] == "launch"
    parsed = launch.launch_command_parser().parse_args(words[1:])
    assert parsed.module
    assert find_spec(parsed.training_script)
    name, *given = parsed.training_script_args
    assert COMMANDS[name].make_context(name, given).params["batch_size"] == 80


def test_each_curl_request_is_valid():
    assert len(commands_of("curl")) == 2
    for words in commands_of("curl"):
        assert words[0].endswith("/v1/recall")
        request = RecallRequest.model_validate_json(words[words.index("-d") + 1])
        assert request.query
        assert request.mode == "exact"


def test_extras_in_the_pages_exist():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    (words,) = commands_of("pip")
    assert Requirement(words[1]).extras <= extras
    assert set(re.findall(r"(?:`|add )\[([a-z-]+)\]", README.content + PROSE)) <= extras


def make_commands():
    """Return the arguments of every `make` command in blocks and in the text."""
    return [*commands_of("make"), *(shlex.split(code)[1:] for code in INLINE if code.startswith("make "))]


def test_every_make_target_exists():
    assert len(make_commands()) > 8
    for words in {tuple(words) for words in make_commands()}:
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_options_of_commands_in_the_text_exist():
    """Words after `--` are options of vLLM, which `integration/test_deploy.py` checks."""
    commands = [code.partition(" -- ")[0].split() for code in INLINE if code.startswith("genret ")]
    assert len(commands) > 15
    for _, name, *words in commands:
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--") and word != "--"} <= known, (name, words)


def test_every_run_module_exists_and_has_its_flags():
    commands = [code.split() for code in INLINE if code.startswith("python -m ")]
    commands += [["python", *words] for words in commands_of("python")]
    assert len(commands) > 15
    for _, _, module, *words in commands:
        spec = find_spec(module)
        assert spec, module
        source = Path(spec.origin).read_text()
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == [], module


def test_every_image_has_a_text_and_a_command():
    images = [(page, *match) for page in PAGES for match in re.findall(r"!\[(.*?)\]\((.*?)\)", page.prose)]
    assert len(images) == 4
    for page, alternative, address in images:
        path = page.target(address)
        assert len(alternative) > 20
        assert (ROOT / path).is_file()
        commands = [code.split() for code in page.inline if code.startswith(("python -m ", "genret "))]
        assert any(str(path) in words for words in commands), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.path))
def test_every_link_has_a_target(page):
    for address in re.findall(r"\]\((?!https?:)(.*?)\)", page.prose):
        file, _, anchor = address.partition("#")
        target = page.target(file) if file else page.path
        assert (ROOT / target).is_file(), address
        assert not anchor or anchor in read_page(target).anchors, address


def test_readme_links_to_every_page():
    addresses = {README.target(address) for address in re.findall(r"\]\((?!https?:)(.*?)\)", README.prose)}
    assert {page.path for page in OTHERS} <= addresses
