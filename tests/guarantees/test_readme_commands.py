"""The rest of the README: its commands, its line of `metadata.jsonl`, its links and pictures.

Every `genret` line of a block is read by the real parser, and all but two are run, in order, on a tiny model. `genret
browse` and `genret serve` go on until they are stopped: `integration/` starts them.
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

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = FENCED.findall(README)
TEXT = FENCED.sub("", README)
INLINE = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", TEXT)]
SHELL = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "sh"
    for line in block.replace("\\\n", " ").splitlines()
]
COMMANDS = get_command(app).commands
NOT_RUN = ("browse", "serve")

INSTEAD = {"HuggingFaceTB/SmolVLM-256M-Instruct": "tiny-model", "--offline": None}
"""The model has 67,000 weights; without vLLM the batch is recalled in this process."""

SHORTER = {
    "train": ["--max-steps", "2", "--lora-rank", "2"],
    "write-queries": ["--per-image", "3"],
}
"""Further options, of commands that would take a while."""


def of(program):
    return [words[1:] for words in SHELL if words and words[0] == program]


@dataclass
class Session:
    """What the commands of the block said, by their words."""

    said: dict[str, dict] = field(default_factory=dict)
    folder: Path = Path()


def make_photos(folder, *, album):
    """The README's picture and twenty drawn ones."""
    drawn = [json.loads(line) for line in (draw_pictures(folder) / "metadata.jsonl").read_text().splitlines()]
    (row,) = (json.loads(block) for language, block in BLOCKS if language == "json")
    Image.new("RGB", (64, 48), "sandybrown").save(folder / row["file_name"])
    lines = [row, *({"file_name": one["file_name"], "text": one["text"], "album": album} for one in drawn)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def session(tmp_path_factory, tiny_model_dir):
    """A user's: in a folder with photos and files of queries."""
    session = Session(folder=tmp_path_factory.mktemp("readme"))
    folder = session.folder
    (folder / "tiny-model").symlink_to(tiny_model_dir)
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
        for words in of("genret"):
            name, *given = words
            options = given[: given.index("--")] if "--" in given else given
            COMMANDS[name].make_context(name, list(given))
            if name in NOT_RUN:
                continue
            changed = [INSTEAD.get(word, word) for word in options]
            if "--epochs" in changed:
                changed = changed[: changed.index("--epochs")]
            arguments = [name, *filter(None, changed), *SHORTER.get(name, []), "--json"]
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, (arguments, done.output, done.exception)
            session.said[shlex.join(words)] = json.loads(done.stdout)
        yield session


def test_every_block_is_of_a_kind_that_is_tested():
    """Python: `tests/guarantees/test_readme.py`, which counts them. The rest: here, by the program."""
    assert [language for language, _ in BLOCKS].count("json") == 1
    assert {language for language, _ in BLOCKS} == {"python", "json", "sh"}
    assert {words[0] for words in SHELL if words} == {"make", "pip", "genret", "accelerate", "curl"}


def test_the_commands_of_a_user_run_in_their_order(session):
    said = session.said
    assert len(said) == len(of("genret")) - len(NOT_RUN)
    found = next(value for words, value in said.items() if words.startswith("query") and "album=2024" in words)
    assert [hit["file_name"] for hit in found["hits"]] == ["beach.jpg"]
    pictured = next(value for words, value in said.items() if "--image" in words)
    assert len(pictured["hits"]) == 5
    asked = next(value for words, value in said.items() if words.startswith("ask"))
    assert len(asked["sources"]) == 1
    measured = next(value for words, value in said.items() if words.startswith("eval"))
    assert measured["n"] == 2
    assert set(measured["baselines"]) == {"tfidf", "bm25"}


def test_the_commands_leave_what_they_promise(session):
    names = {record.file_name for record in load_index(session.folder / "photos-index").records}
    assert "purple.png" in names
    assert "beach.jpg" not in names
    assert (session.folder / "report.html").read_text().count("<svg ") == 4
    assert len((session.folder / "hits.jsonl").read_text().splitlines()) == 2


def test_what_accelerate_starts_is_read_by_both_parsers(session):
    launch = pytest.importorskip("accelerate.commands.launch")
    (words,) = of("accelerate")
    assert words[0] == "launch"
    read = launch.launch_command_parser().parse_args(words[1:])
    assert read.module
    assert find_spec(read.training_script)
    name, *given = read.training_script_args
    assert COMMANDS[name].make_context(name, given).params["batch_size"] == 80


def test_the_request_is_one_that_the_endpoint_takes():
    (words,) = of("curl")
    assert words[0].endswith("/v1/recall")
    request = RecallRequest.model_validate_json(words[words.index("-d") + 1])
    assert request.query
    assert request.mode == "exact"


def test_what_pip_installs_has_the_extras_that_are_named():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    (words,) = of("pip")
    assert Requirement(words[1]).extras <= extras
    assert set(re.findall(r"(?:`|add )\[([a-z-]+)\]", README)) <= extras


def made():
    """Every `make` with its words, in blocks and in the text."""
    return [*of("make"), *(shlex.split(code)[1:] for code in INLINE if code.startswith("make "))]


def test_every_target_of_make_is_there():
    assert len(made()) > 8
    for words in {tuple(words) for words in made()}:
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_command_in_the_text_takes_its_options():
    """Words after `--` are vLLM's, which `integration/test_deploy.py` asks."""
    named = [code.partition(" -- ")[0].split() for code in INLINE if code.startswith("genret ")]
    assert len(named) > 15
    for _, name, *words in named:
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--") and word != "--"} <= known, (name, words)


def test_every_module_that_is_to_be_run_is_there_and_knows_its_flags():
    named = [code.split() for code in INLINE if code.startswith("python -m ")]
    assert len(named) > 5
    for _, _, module, *words in named:
        spec = find_spec(module)
        assert spec, module
        source = Path(spec.origin).read_text()
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == [], module


def test_every_picture_says_what_it_shows_and_is_made_by_a_command_that_is_named():
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", README)
    assert len(pictures) == 4
    for alternative, path in pictures:
        assert len(alternative) > 20
        assert (ROOT / path).is_file()
        assert [code for code in INLINE if code.startswith(("python -m ", "genret ")) and path in code.split()], path


def test_every_link_leads_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("#")
    }
    for address in re.findall(r"\]\((?!https?:)(.*?)\)", README):
        known = address[1:] in headings if address.startswith("#") else (ROOT / address).is_file()
        assert known, address


def test_code_comes_within_ten_lines_and_a_picture_within_thirty():
    lines = README.splitlines()
    assert any(line == "```python" for line in lines[:10])
    assert any(line.startswith("![") for line in lines[:30])
