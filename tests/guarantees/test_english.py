"""Docstrings are sentences, and the names of tests are short enough to read."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPLETES_A_NAME = re.compile(r"(Of|As|What|Whether|By|In|Where|To|How|That|Which|When|Those|From)\b")
"""First words of a docstring that completes the name instead of being a sentence."""

LONGEST_TEST_NAME = 60


def documented(folder):
    """(place, docstring) of every module, class and function of a folder."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", docstring


def test_docstrings_of_the_package_are_sentences():
    found = {place: text.partition("\n")[0] for place, text in documented("llama_index_genret")}
    assert len(found) > 500
    assert {place: line for place, line in found.items() if COMPLETES_A_NAME.match(line)} == {}


def test_names_of_tests_have_at_most_sixty_characters():
    names = [
        node.name
        for folder in ("tests", "integration")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 500
    assert [name for name in names if len(name) > LONGEST_TEST_NAME] == []
