"""Tests of the wheel in an environment with nothing else: its files, dependencies, commands and types."""

import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest
import tomllib

from integration import client_program, supply
from llama_index_genret import FakeScorer, GenerativeImageRetriever
from tests.conftest import untrained_index
from tests.openai_server import ANSWER, OpenAIServer, running

__all__ = ["untrained_index"]

ROOT = Path(__file__).parents[1]
PROGRAM = Path(client_program.__file__)
HEAVY = {"torch", "transformers", "peft", "vllm", "sklearn", "accelerate", "torchvision", "sentence_transformers"}
WRONG = {
    "similarity_top_k=3, normalise": 'similarity_top_k="3", normalise',
    "normalise=Normalise.CHILDREN": 'normalise="children"',
    "load_index(folder)": "load_index(api_base)",
    "filters=green": 'filters={"color": "green"}',
    "captions: tuple[str, ...]": "captions: str",
    "image_query_engine(served": "image_query_engine(folder",
    "records[0].captions": "records[0].caption",
    "FakeScorer(index.tokenizer.vocab_size)": "FakeScorer(vocabulary=index.tokenizer.vocab_size)",
    "command_line: Callable[[], NoReturn]": "command_line: Callable[[str], NoReturn]",
}
"""Wrong edits of a line in the program of a user."""


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def installed(python):
    """Return names and versions of the packages of an environment."""
    listed = json.loads(run(python, "-I", "-m", "pip", "list", "--format", "json"))
    return {(one["name"], one["version"]) for one in listed}


def tracked(folder="."):
    """Return the files that git tracks or would add, without those that are deleted here."""
    paths = run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder, cwd=ROOT).splitlines()
    return {path for path in paths if (ROOT / path).is_file()}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build a source distribution, and the wheel from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    return out


@pytest.fixture(scope="module")
def client(dist, tmp_path_factory):
    """Return the interpreter of an environment where the wheel is installed without extras."""
    home = tmp_path_factory.mktemp("client")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    install = ["install", "--quiet", "--no-compile", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    run(python, "-I", "-m", "pip", *install, wheel)
    return python


@pytest.fixture(scope="module")
def server(untrained_index):
    with running(OpenAIServer(vocabulary=untrained_index.tokenizer.vocab_size)) as server:
        server.models = [{"id": "only", "max_model_len": 2048}]
        yield server


@pytest.fixture(scope="module")
def report(client, untrained_index, server, tmp_path_factory):
    """Return the output of the client's program, run where nothing of this repository is on the path."""
    away = tmp_path_factory.mktemp("away")
    return json.loads(run(client, "-I", PROGRAM, untrained_index.folder, server.api_base, cwd=away))


def test_the_wheel_has_every_file_of_the_package_and_no_other(dist):
    (wheel,) = dist.glob("*.whl")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == tracked("llama_index_genret")
    assert {"llama_index_genret/py.typed", "llama_index_genret/cli/demo/data/LICENSE-fluent-emoji.txt"} < files


def test_wheel_metadata_has_licence_readme_and_one_version(dist):
    (wheel,) = dist.glob("*.whl")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    info = f"llama_index_genret-{version}.dist-info"
    content = zipfile.ZipFile(wheel)
    for licence in ("LICENSE", "llama_index_genret/cli/demo/data/LICENSE-fluent-emoji.txt"):
        assert content.read(f"{info}/licenses/{licence}") == (ROOT / licence).read_bytes()
    head, _, body = content.read(f"{info}/METADATA").decode().partition("\n\n")
    assert f"\nVersion: {version}\n" in head
    assert "\nLicense-Expression: Apache-2.0 AND MIT\n" in head
    assert body.strip() == (ROOT / "README.md").read_text().strip()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_source_distribution_is_the_clone(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        files = {str(PurePosixPath(*PurePosixPath(one.name).parts[1:])) for one in content if one.isfile()}
    assert files - {"PKG-INFO"} == tracked()


def test_the_client_brings_no_model_library(client, report):
    names = {name.lower() for name, _ in installed(client)}
    assert {"llama-index-genret", "llama-index-core", "numpy"} <= names
    assert not names & {name.replace("_", "-") for name in HEAVY | {"scikit-learn"}}
    assert "llama_index_genret" in report["modules"]
    assert not HEAVY & set(report["modules"])


def test_the_client_recalls_and_answers(report, untrained_index):
    retriever = GenerativeImageRetriever(
        untrained_index, FakeScorer(untrained_index.tokenizer.vocab_size), similarity_top_k=3
    )
    assert report["table"] == client_program.image_ids(retriever.retrieve(client_program.QUERY))
    assert len(set(report["served"])) == 3
    assert {i.split("-")[0] for i in report["filtered"]} == {"green"}
    assert len(report["filtered"]) == 4
    assert report["answer"] == ANSWER


def test_answers_of_the_client_come_from_the_images(report, server):
    (shown,) = server.images()
    assert len(shown) == 3


def test_the_client_has_the_command(client, untrained_index):
    genret = client.with_name("genret")
    assert "recall" in run(genret, "--help").lower()
    facts = json.loads(run(genret, "inspect", untrained_index.folder, "--json"))
    assert facts["images"] == len(untrained_index.records)


def test_command_that_needs_a_model_names_the_extra(client, untrained_index, tmp_path):
    command = [client.with_name("genret"), "query", untrained_index.folder, "red circle"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "llama-index-genret[train]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_users_types_are_checked(client, tmp_path):
    """The program passes mypy --strict against the installed wheel. Each wrong line is an error on that line."""
    text = PROGRAM.read_text()
    lines = {}
    for i, (right, wrong) in enumerate(WRONG.items()):
        assert text.count(right) == 1, right
        (tmp_path / f"wrong_{i}.py").write_text(text.replace(right, wrong))
        lines[f"wrong_{i}.py"] = text[: text.index(right)].count("\n") + 1
    (tmp_path / "right.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", client, "right.py", *lines]
    environment = {"PATH": "/usr/bin:/bin", "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    found = {tuple(line.split(":")[:2]) for line in done.stdout.splitlines() if ": error: " in line}
    assert found == {(name, str(line)) for name, line in lines.items()}, done.stdout + done.stderr


def test_every_licence_is_compatible_and_listed(client, tmp_path):
    supply.list_licences(client, tmp_path / "licences.md")
    listed = (tmp_path / "licences.md").read_text()
    assert "| llama-index-core " in listed
    assert "| llama-index-genret " in listed


@pytest.mark.parametrize(
    "licence_field",
    [
        *("License-Expression: GPL-3.0-only", "License: AGPL-3.0", "License: Business Source License 1.1"),
        *("License-Expression: MIT AND GPL-2.0-only", "License-Expression: MIT AND BUSL-1.1", "License: CC-BY-NC-4.0"),
        *("License: Limited use only", "License: Miscellaneous terms", "Summary: of no licence"),
    ],
)
def test_a_package_of_another_licence_is_refused(tmp_path, licence_field):
    with pytest.raises(supply.IncompatibleLicence, match=r"intruder"):
        supply.list_licences(_with_intruder(tmp_path, licence_field), tmp_path / "licences.md")


@pytest.mark.parametrize("licence_field", ["License: MIT License", "License-Expression: Apache-2.0 OR LicenseRef-Own"])
def test_a_package_of_a_compatible_licence_is_accepted(tmp_path, licence_field):
    supply.list_licences(_with_intruder(tmp_path, licence_field), tmp_path / "licences.md")
    assert "| intruder " in (tmp_path / "licences.md").read_text()


def _with_intruder(folder, licence_field):
    """Return the interpreter of an environment with one package, which has this licence field."""
    venv.create(folder / "other", with_pip=False)
    (packages,) = (folder / "other" / "lib").glob("python*/site-packages")
    (packages / "intruder-1.0.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.4\nName: intruder\nVersion: 1.0\n{licence_field}\n"
    (packages / "intruder-1.0.dist-info" / "METADATA").write_text(metadata)
    return folder / "other" / "bin" / "python"


def test_the_bill_of_materials_names_every_package(client, tmp_path):
    supply.write_bill_of_materials(client, tmp_path / "sbom.json", "--no-validate")
    bill = json.loads((tmp_path / "sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "llama-index-genret"
    dependencies = {one for one in installed(client) if one[0] != "llama-index-genret"}
    assert dependencies <= {(one["name"], one["version"]) for one in bill["components"]}
