"""The committed notebooks: length, outputs and titles. `integration/test_notebooks.py` executes them."""

import ast
import hashlib
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
MOST_LINES, MOST_BYTES = 6, 600_000
LOCAL = re.compile(r"(?<![\w.:/<])/(?:home|root|tmp|work|usr|opt|Users|var)/")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.fixture
def code(cells):
    return [cell for cell in cells if cell["cell_type"] == "code"]


def data(cells):
    """Yield mime type and content of every output."""
    for cell in cells:
        for output in cell["outputs"]:
            yield from output.get("data", {"text/plain": output.get("text", "")}).items()


def test_all_six_notebooks_exist():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_identifiers",
        "03_serving_with_vllm",
        "04_rag_pipelines",
        "05_changing_corpora",
        "06_your_own_model",
    ]


def test_cells_are_short_and_parse(code):
    for cell in code:
        source = "".join(cell["source"])
        assert sum(bool(line.strip()) for line in source.splitlines()) <= MOST_LINES, source
        ast.parse(source.replace("await ", ""))


def test_cells_were_executed_in_order_without_errors(code):
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [(output["output_type"], output.get("name", "")) for cell in code for output in cell["outputs"]]
    assert not [kind for kind in kinds if kind[0] == "error" or kind[1] == "stderr"]


def test_outputs_belong_to_the_committed_code(path, code):
    executed = json.loads(path.read_text(encoding="utf-8"))["metadata"]["executed"]
    sources = "\n\n".join("".join(cell["source"]) for cell in code)
    assert executed == hashlib.sha256(sources.encode()).hexdigest(), "run `make notebooks`"


def test_notebook_has_images_with_alternative_texts(code):
    images = [
        output
        for cell in code
        for output in cell["outputs"]
        if {"image/jpeg", "image/png"} & set(output.get("data", ()))
    ]
    assert len(images) >= 2
    assert all(next(iter(output["metadata"].values()))["alt"] for output in images)


def test_notebook_is_small_and_has_no_local_paths(path, code):
    assert path.stat().st_size < MOST_BYTES
    texts = ["".join(content) for mime, content in data(code) if not mime.startswith("image/")]
    assert not [text for text in texts if LOCAL.search(text)]


def test_notebook_begins_with_a_title(cells):
    assert cells[0]["cell_type"] == "markdown"
    assert "".join(cells[0]["source"]).startswith("# ")
