"""Tests of the client side on the lowest versions in pyproject.toml, and on the newest LlamaIndex that it allows.

Each environment is without torch, is made once beside the packages of this one, and is kept. The newest is updated.
"""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import tomllib
from packaging.version import Version

ROOT = Path(__file__).parent.parent
NEEDED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
TESTING = [
    *("hypothesis>=6.100", "llama-index-retrievers-bm25", "psutil"),
    *("pytest>=8.3", "pytest-asyncio>=0.25", "pytest-timeout>=2.3"),
]
TESTS = [
    "llamaindex/test_engines.py",
    "llamaindex/test_hybrid.py",
    "guarantees/test_answer_faults.py",
    "llamaindex/test_nodes.py",
]
"""Test files that use LlamaIndex."""

MORE_TESTS = [
    "corpus/test_imagefolder.py",
    "trie/test_edits.py",
    "store/test_filters.py",
    "scorers/test_http_client.py",
    "serving/endpoint/test_client.py",
    "evaluation/test_html_page.py",
    "search/test_beam_search.py",
    "serving/test_launch.py",
    "store/test_index.py",
    "trie/test_flat.py",
    "scorers/test_vllm_http.py",
]
"""Test files that use the other packages: numpy, pillow, pydantic, httpx, tenacity, jinja2, tokenizers, safetensors."""

PROBE = """
import json, sys
from importlib import metadata, util
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]} | {"torch": bool(util.find_spec("torch"))}))
"""


def at_its_lowest(requirement):
    """Return the requirement with its lower bound as the only version."""
    bounds = re.fullmatch(r"(?P<name>[A-Za-z0-9-]+)>=(?P<lowest>[\d.]+)(,<[\d.]+)?", requirement)
    assert bounds, f"{requirement} has no lower bound"
    return f"{bounds['name']}=={bounds['lowest']}"


REQUIREMENTS = {"lowest": [at_its_lowest(requirement) for requirement in NEEDED], "newest": NEEDED}


def environment(name):
    """Return the Python of the environment `name`."""
    folder = Path(sys.prefix) / f"versions-{name}"
    python, done = folder / "bin" / "python", folder / "requirements.json"
    wanted = [*REQUIREMENTS[name], *TESTING]
    if not done.exists() or json.loads(done.read_text()) != wanted or name == "newest":
        if not python.exists():
            venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", *wanted]
        subprocess.run(install, check=True, timeout=1700)
        done.write_text(json.dumps(wanted))
    return python


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_client_works_on_other_dependency_versions(untrained_index, name):
    python, names = environment(name), [re.split("[=><]", requirement)[0] for requirement in NEEDED]
    probed = subprocess.run([python, "-c", PROBE, *names], capture_output=True, text=True, check=True)
    versions = json.loads(probed.stdout)
    assert not versions.pop("torch")
    if name == "lowest":
        wanted = dict(requirement.split("==") for requirement in REQUIREMENTS[name])
        assert {one: Version(found) for one, found in versions.items()} == {
            one: Version(v) for one, v in wanted.items()
        }
    options = {**os.environ, "GENRET_TEST_INDEX": str(untrained_index.folder), "PYTHONPATH": str(ROOT)}
    tests = [*TESTS, *MORE_TESTS] if name == "lowest" else TESTS
    run = [python, "-m", "pytest", *(f"tests/{test}" for test in tests)]
    done = subprocess.run(run, cwd=ROOT, env=options, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{versions}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert re.search(r"^\d{3} passed", done.stdout.splitlines()[-1]), done.stdout[-300:]
