"""The client side on the lowest and on the newest LlamaIndex that pyproject allows, in environments without torch.

Each environment is made once, beside the packages of this one, and kept; the newest is brought up to date.
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

ROOT = Path(__file__).parent.parent
NEEDED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
TESTING = ["llama-index-retrievers-bm25", "pytest>=8.3", "pytest-asyncio>=0.25", "pytest-timeout>=2.3"]
TESTS = ["test_engines.py", "test_hybrid.py", "test_answer_faults.py", "test_image_node.py"]
OURS = re.compile(r"(?P<name>llama-index-[a-z-]+)>=(?P<lowest>[\d.]+),<(?P<bound>[\d.]+)")
PROBE = """
from importlib import metadata, util
print(metadata.version("llama-index-core"), util.find_spec("torch"))
"""


def lowest(requirement):
    """The requirement at its lower bound, if it is one of LlamaIndex's."""
    bounds = OURS.fullmatch(requirement)
    return f"{bounds['name']}=={bounds['lowest']}" if bounds else requirement


REQUIREMENTS = {"lowest": [lowest(requirement) for requirement in NEEDED], "newest": NEEDED}


def environment(name):
    """Python of the environment `name`."""
    folder = Path(sys.prefix) / f"llama-index-{name}"
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
def test_engines_fusion_faults_and_nodes_on_another_llama_index(trained_index, name):
    python = environment(name)
    version, torch = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=True).stdout.split()
    assert torch == "None"
    assert name == "newest" or f"llama-index-core=={version}" in REQUIREMENTS["lowest"]
    options = {**os.environ, "GENRET_TEST_INDEX": str(trained_index.folder)}
    run = [python, "-m", "pytest", *(f"tests/{test}" for test in TESTS)]
    done = subprocess.run(run, cwd=ROOT, env=options, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"llama-index-core {version}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert re.search(r"^\d{3} passed", done.stdout.splitlines()[-1]), done.stdout[-300:]
