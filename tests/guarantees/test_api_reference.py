"""The check of the API reference: names in the backticks of a docstring that lead nowhere."""

import pytest

from integration.api_reference import broken_references
from llama_index_genret import errors
from llama_index_genret.search import protocol
from llama_index_genret.training import soft_targets

MODULES = {module.__name__: module for module in (errors, protocol, soft_targets)}


def broken(monkeypatch, docstring):
    """What is broken of a docstring; others name modules that are not among these few."""
    monkeypatch.setattr(errors, "__doc__", docstring)
    return [line for line in broken_references(MODULES) if line.startswith(f"{errors.__name__}: ")]


@pytest.mark.parametrize(
    "name",
    ["GenretError", "errors.DeadEnd", "Hit.score", "protocol.Hit.score", "Row.query", "Paths.token_ids", "Hit.leaf"],
)
def test_what_is_there_is_not_broken(monkeypatch, name):
    assert broken(monkeypatch, f"See `{name}`.") == []


@pytest.mark.parametrize("name", ["GenretErro", "errors.NoSuchError", "Hit.scores", "Row.nothing", "protocol.Hit.no"])
def test_what_is_not_there_is_broken(monkeypatch, name):
    assert broken(monkeypatch, f"See `{name}()`, and `Hit`.") == [f"llama_index_genret.errors: `{name}`"]


@pytest.mark.parametrize("name", ["manifest.json", "rows.token_ids", "None", "query", "vllm.LLM"])
def test_files_variables_and_words_are_no_references(monkeypatch, name):
    assert broken(monkeypatch, f"See `{name}`.") == []
