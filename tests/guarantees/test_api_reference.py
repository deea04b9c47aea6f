"""The check of the API reference for names in backticks that do not exist."""

import pytest

from integration.api_reference import broken_references
from llama_index_genret import errors
from llama_index_genret.search import protocol
from llama_index_genret.training import soft_targets

MODULES = {module.__name__: module for module in (errors, protocol, soft_targets)}


def broken(monkeypatch, docstring):
    """Return the broken references of a docstring. Other docstrings refer to modules outside `MODULES`."""
    monkeypatch.setattr(errors, "__doc__", docstring)
    return [line for line in broken_references(MODULES) if line.startswith(f"{errors.__name__}: ")]


@pytest.mark.parametrize(
    "name",
    ["GenretError", "errors.DeadEnd", "Hit.score", "protocol.Hit.score", "Row.query", "Paths.token_ids", "Hit.leaf"],
)
def test_existing_reference_is_accepted(monkeypatch, name):
    assert broken(monkeypatch, f"See `{name}`.") == []


@pytest.mark.parametrize("name", ["GenretErro", "errors.NoSuchError", "Hit.scores", "Row.nothing", "protocol.Hit.no"])
def test_missing_reference_is_reported(monkeypatch, name):
    assert broken(monkeypatch, f"See `{name}()`, and `Hit`.") == [f"llama_index_genret.errors: `{name}`"]


@pytest.mark.parametrize("name", ["manifest.json", "rows.token_ids", "None", "query", "vllm.LLM"])
def test_files_variables_and_words_are_no_references(monkeypatch, name):
    assert broken(monkeypatch, f"See `{name}`.") == []
