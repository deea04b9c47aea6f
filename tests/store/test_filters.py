"""Metadata filters over a whole index equal LlamaIndex's own evaluator on each record."""

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.vector_stores import types as llama_index_types
from llama_index.core.vector_stores.utils import build_metadata_filter_fn
from pydantic import ValidationError

from llama_index_genret.errors import FilterError
from llama_index_genret.store.filters import MAX_DEPTH, Columns, RecordFilter, RecordFilters

OPERATORS = [operator.value for operator in llama_index_types.FilterOperator]
WORDS = st.sampled_from(["red", "Red", "re", "blue", "", "2024"])
NUMBERS = st.sampled_from([0, 1, 2, 2024, 1.0, 2.5])
VALUES = st.one_of(WORDS, NUMBERS, st.lists(WORDS, max_size=3), st.lists(st.sampled_from([0, 1, 2]), max_size=3))
ROWS = st.lists(
    st.fixed_dictionaries(
        {"always": WORDS},
        optional={"color": WORDS, "year": NUMBERS, "any": st.one_of(WORDS, NUMBERS, st.booleans(), st.none())},
    ),
    min_size=1,
    max_size=8,
)
LEAVES = st.builds(
    lambda key, value, operator: {"key": key, "value": value, "operator": operator},
    st.sampled_from(["always", "color", "year", "any"]),
    VALUES,
    st.sampled_from(OPERATORS),
)


def evaluate_with_llama_index(filters, rows):
    """Evaluate the filters on each record with LlamaIndex's evaluator, which lacks nesting; this function adds it."""

    def passes(part, row):
        if not isinstance(part, llama_index_types.MetadataFilters):
            alone = llama_index_types.MetadataFilters(filters=[part])
            return build_metadata_filter_fn(lambda _: row, alone)("")
        found = [passes(inner, row) for inner in part.filters]
        if not found:
            return True
        return {"or": any(found), "not": not any(found)}.get(part.condition, all(found))

    return [passes(filters, row) for row in rows]


def refuse_mistakes(leaf, known):
    """Raise TypeError for filters that LlamaIndex evaluates to everything or nothing, and that we refuse."""
    value, several = leaf["value"], isinstance(leaf["value"], list)
    if leaf["operator"] == "is_empty":
        return
    if several != (leaf["operator"] in ("in", "nin", "any", "all")):
        raise TypeError
    kinds = {type(one) is str for one in known if one is not None}
    if leaf["operator"] in ("==", "!=", "in", "nin") and kinds:
        for one in value if several else [value]:
            if (type(one) is str) not in kinds:
                raise TypeError


@given(ROWS, LEAVES)
def test_every_operator_equals_llama_index(rows, leaf):
    filters = {"filters": [leaf], "condition": "and"}
    theirs = llama_index_types.MetadataFilters.model_validate(filters)
    ours = RecordFilters.model_validate(theirs.model_dump(mode="json"))
    if not any(leaf["key"] in row for row in rows):
        with pytest.raises(FilterError, match="knows"):
            Columns(rows).record_mask(ours)
        return
    try:
        refuse_mistakes(leaf, [row.get(leaf["key"]) for row in rows])
        expected = evaluate_with_llama_index(theirs, rows)
    except TypeError:
        with pytest.raises(FilterError, match="does not apply"):
            Columns(rows).record_mask(ours)
        return
    assert Columns(rows).record_mask(ours).tolist() == expected


def has_empty_condition(tree):
    """Tell whether the filters contain an "or" or a "not" without conditions."""
    parts = tree.get("filters")
    if parts is None:
        return False
    return (not parts and tree["condition"] in ("or", "not")) or any(map(has_empty_condition, parts))


@given(
    ROWS,
    st.recursive(
        st.builds(lambda value: {"key": "always", "value": value, "operator": "=="}, WORDS),
        lambda parts: st.builds(
            lambda filters, condition: {"filters": filters, "condition": condition},
            st.lists(parts, max_size=3),
            st.sampled_from(["and", "or", "not", None]),
        ),
        max_leaves=6,
    ),
)
def test_nested_conditions_equal_llama_index(rows, tree):
    theirs = llama_index_types.MetadataFilters.model_validate({"filters": [tree]})
    if has_empty_condition(tree):
        with pytest.raises(ValidationError, match="has no filters"):
            RecordFilters.model_validate(theirs.model_dump(mode="json"))
        return
    ours = RecordFilters.model_validate(theirs.model_dump(mode="json"))
    assert Columns(rows).record_mask(ours).tolist() == evaluate_with_llama_index(theirs, rows)


def test_equal_accepts_one_value_or_a_list():
    rows = [{"color": color, "n": n} for n, color in enumerate(["red", "blue", "green", "red"])]
    wanted = RecordFilters.equal({"color": ["red", "green"], "n": 3})
    assert Columns(rows).record_mask(wanted).tolist() == [False, False, False, True]


def test_error_contains_the_filter_and_the_known_keys():
    columns = Columns([{"color": "red"}])
    with pytest.raises(FilterError, match=r"color > 3 does not apply"):
        columns.record_mask(RecordFilters(filters=[RecordFilter(key="color", value=3, operator=">")]))
    with pytest.raises(FilterError, match=r"'size'; the index knows \['color'\]"):
        columns.record_mask(RecordFilters.equal({"size": 1}))


@pytest.mark.parametrize(("depth", "accepted"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False), (200, False)])
def test_filters_nested_too_deep_are_refused(depth, accepted):
    """Accepted filters can be serialised to JSON again."""
    nested = {"key": "color", "value": "red"}
    for _ in range(depth):
        nested = {"filters": [nested]}
    with nullcontext() if accepted else pytest.raises(ValidationError, match=f"at most {MAX_DEPTH} deep"):
        filters = RecordFilters.model_validate(nested)
        assert RecordFilters.model_validate_json(filters.model_dump_json()) == filters
        assert Columns([{"color": "red"}]).record_mask(filters).tolist() == [True]


def test_filter_of_an_index_without_records_is_empty():
    assert Columns([]).record_mask(RecordFilters.equal({"size": 1})).dtype == np.bool_
    assert len(Columns([]).record_mask(RecordFilters.equal({"size": 1}))) == 0
