"""Execute copies of all notebooks, as `make notebooks` does. A reader who runs them sees no error and no warning."""

import shutil

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from integration.run_notebooks import FOLDER, BadOutput, execute

NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
"""They run in this order and in one file, since later ones use the index that the first has trained."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Copy the notebooks without the results of earlier runs. A notebook finds the results of those before it."""
    copy = tmp_path_factory.mktemp("clone") / "notebooks"
    return shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("work"))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_from_top_to_bottom(name, folder):
    execute(folder / f"{name}.ipynb", folder / f"{name}.ipynb")
    cells = nbformat.read(folder / f"{name}.ipynb", 4).cells
    assert any("image/jpeg" in output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1 / 0", CellExecutionError),
        ("import warnings; warnings.warn('mind')", BadOutput),
        ("import os; print(os.path.expanduser('~/photos'))", BadOutput),
    ],
)
def test_failing_notebook_is_not_written(code, error, tmp_path):
    source, target = tmp_path / "a.ipynb", tmp_path / "b.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), source)
    with pytest.raises(error):
        execute(source, target)
    assert not target.exists()
