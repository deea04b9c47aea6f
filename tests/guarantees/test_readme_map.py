"""The README: its size, the position of the first code and image, and its map of the package."""

import re

import tomllib

from tests.pages import README, ROOT

PACKAGE = ROOT / "llama_index_genret"
MOST_BYTES = 12_288
CONTRIBUTE = README.prose.partition("## Contribute")[2]


def paths_of(tree):
    """Return the paths in an indented tree of files, in order."""
    above, paths = [], []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [name]
        paths.append("".join(above))
    return paths


def test_readme_has_at_most_12_kilobytes():
    assert len(README.content.encode()) <= MOST_BYTES


def test_code_is_within_ten_lines_and_image_within_thirty():
    lines = README.content.splitlines()
    assert any(line == "```python" for line in lines[:10])
    assert any(line.startswith("![") for line in lines[:30])


def test_readme_tree_matches_the_package():
    """The tree has every package at any depth, and every module in the root."""
    packages = [file.parent for file in PACKAGE.rglob("__init__.py")]
    modules = [file for file in PACKAGE.glob("*.py") if file.name != "__init__.py"]
    real = [f"{path.relative_to(ROOT)}/" for path in packages] + [str(path.relative_to(ROOT)) for path in modules]
    (tree,) = README.of_language("text")
    assert sorted(paths_of(tree)) == sorted(real)


def test_readme_tree_has_the_order_of_the_import_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    order = [module.strip() for layer in layers for module in layer.split("|")]
    (tree,) = README.of_language("text")
    children = [path.split("/")[1] for path in paths_of(tree) if path.rstrip("/").count("/") == 1]
    assert [child.removesuffix(".py") for child in children] == order


def test_every_path_in_the_walks_exists():
    paths = re.findall(r"`([a-z_/]+/[a-z_]+\.py)`", CONTRIBUTE)
    assert len(paths) >= 15
    assert [path for path in paths if not (PACKAGE / path).is_file()] == []
    steps = re.findall(r"^\d\. .*$", CONTRIBUTE, re.MULTILINE)
    assert len(steps) == 15
    assert [step for step in steps if ".py`" not in step] == []
