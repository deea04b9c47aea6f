"""Metadata filters over whole indexes: the same as LlamaIndex's own evaluator, record by record."""

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


def by_llama_index(filters, rows):
    """Each record asked by LlamaIndex's evaluator, which refuses nesting: that much is added here."""

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
    """What LlamaIndex lets pass everything or nothing, and we take for a mistake."""
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
def test_every_operator_means_what_it_means_in_llama_index(rows, leaf):
    filters = {"filters": [leaf], "condition": "and"}
    theirs = llama_index_types.MetadataFilters.model_validate(filters)
    ours = RecordFilters.model_validate(theirs.model_dump(mode="json"))
    if not any(leaf["key"] in row for row in rows):
        with pytest.raises(FilterError, match="knows"):
            Columns(rows).record_mask(ours)
        return
    try:
        refuse_mistakes(leaf, [row.get(leaf["key"]) for row in rows])
        expected = by_llama_index(theirs, rows)
    except TypeError:
        with pytest.raises(FilterError, match="does not apply"):
            Columns(rows).record_mask(ours)
        return
    assert Columns(rows).record_mask(ours).tolist() == expected


def says_nothing(tree):
    """Whether an "or" or a "not" of nothing is in it."""
    parts = tree.get("filters")
    if parts is None:
        return False
    return (not parts and tree["condition"] in ("or", "not")) or any(map(says_nothing, parts))


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
def test_nested_conditions_hold_as_in_llama_index(rows, tree):
    theirs = llama_index_types.MetadataFilters.model_validate({"filters": [tree]})
    if says_nothing(tree):
        with pytest.raises(ValidationError, match="of no filters says nothing"):
            RecordFilters.model_validate(theirs.model_dump(mode="json"))
        return
    ours = RecordFilters.model_validate(theirs.model_dump(mode="json"))
    assert Columns(rows).record_mask(ours).tolist() == by_llama_index(theirs, rows)


def test_equal_takes_a_value_or_several():
    rows = [{"color": color, "n": n} for n, color in enumerate(["red", "blue", "green", "red"])]
    wanted = RecordFilters.equal({"color": ["red", "green"], "n": 3})
    assert Columns(rows).record_mask(wanted).tolist() == [False, False, False, True]


def test_what_does_not_apply_names_the_filter_and_the_known_keys():
    columns = Columns([{"color": "red"}])
    with pytest.raises(FilterError, match=r"color > 3 does not apply"):
        columns.record_mask(RecordFilters(filters=[RecordFilter(key="color", value=3, operator=">")]))
    with pytest.raises(FilterError, match=r"'size'; the index knows \['color'\]"):
        columns.record_mask(RecordFilters.equal({"size": 1}))


@pytest.mark.parametrize(("depth", "taken"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False), (200, False)])
def test_filters_that_lie_too_deep_are_refused_and_the_others_can_be_written_again(depth, taken):
    nested = {"key": "color", "value": "red"}
    for _ in range(depth):
        nested = {"filters": [nested]}
    with nullcontext() if taken else pytest.raises(ValidationError, match=f"at most {MAX_DEPTH} deep"):
        filters = RecordFilters.model_validate(nested)
        assert RecordFilters.model_validate_json(filters.model_dump_json()) == filters
        assert Columns([{"color": "red"}]).record_mask(filters).tolist() == [True]


def test_an_index_without_records_lets_nothing_pass():
    assert Columns([]).record_mask(RecordFilters.equal({"size": 1})).dtype == np.bool_
    assert len(Columns([]).record_mask(RecordFilters.equal({"size": 1}))) == 0
