"""A class name has one meaning across the package, and does not shadow one of LlamaIndex."""

import ast
from collections import defaultdict

from llama_index.core.vector_stores import types as vector_store_types

from tests.guarantees.package_source import modules


def test_class_names_are_unique_across_the_package():
    """A leading underscore does not count: `_Row` and `Row` would be confused."""
    places = defaultdict(list)
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(f"{name}:{node.lineno}")
    assert len(places) > 200  # else the walk found nothing
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_filter_classes_do_not_shadow_those_of_llama_index():
    theirs = {name for name, value in vars(vector_store_types).items() if isinstance(value, type)}
    assert "MetadataFilters" in theirs
    ours = {node.name for _, tree in modules() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert ours & theirs == set()
