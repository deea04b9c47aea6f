"""Filters extract queries from a model's replies and drop redundant ones."""

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_index_genret.store import PseudoQuery, text_key
from llama_index_genret.training.pseudo_queries import WriterReply
from llama_index_genret.training.pseudo_queries.filtering import (
    MAX_IMAGES,
    candidates_of,
    choose,
    clean,
    nearly_the_same,
    query_in,
)
from llama_index_genret.training.pseudo_queries.writer import KINDS

WORDS = st.lists(st.sampled_from(["a", "red", "bus", "on", "the", "left", "of", "2", "1.", "-", "The image shows"]))

LINES = WORDS.map(" ".join) | st.text(max_size=40)


@pytest.mark.parametrize(
    ("line", "query"),
    [
        ('1. "A red bus."', "A red bus"),
        ("- **red bus at night**", "red bus at night"),
        ("The image shows a dog on a beach.", "a dog on a beach"),
        ("In this picture, there is a dog", "a dog"),
        ("Search query: dog with a ball", "dog with a ball"),
        ("2) Query: “The photo depicts two cats”.", "two cats"),
        ("where is the dog?", "where is the dog?"),
        ("3 dogs and 1.5 l of milk", "3 dogs and 1.5 l of milk"),
        ("a photo of a dog", "a photo of a dog"),
        (". and a dog,", "and a dog"),
        ("赤いバス。", "赤いバス"),
    ],
)
def test_clean_removes_all_but_the_query(line, query):
    assert clean(line) == query


@given(LINES)
def test_clean_is_idempotent(line):
    assert clean(clean(line)) == clean(line)


@pytest.mark.parametrize(
    ("text", "ended", "query", "reason"),
    [
        ("Sure! Here is one:\n\n1. a red bus", True, "a red bus", ""),
        ("a red bus\nThis query is short.", True, "a red bus", ""),
        ("a red bus. It stands on the", False, "a red bus", ""),
        ("a red bus on the stre", False, "", "unfinished"),
        ("a red bus\nbecause it", False, "a red bus", ""),
        ("1. a red bus on", False, "", "unfinished"),
        ("", True, "", "without words"),
        ("I'm sorry, I cannot see it.", True, "", "without words"),
        (" 42 . \n", True, "", "without words"),
        ("red \ufffd bus", True, "", "garbled"),
        ("red \x00 bus", True, "", "garbled"),
        ("bus " * 60, True, "", "too long"),
    ],
)
def test_reply_gives_one_whole_query_or_a_reason(text, ended, query, reason):
    assert query_in(WriterReply(text, ended)) == (query, reason)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A red  bus!", "a red bus", True),
        ("a red bus on the street", "red bus on a street", True),
        ("a dog left of a cat", "a cat left of a dog", False),
        ("a red bus on the street", "a blue car on the street", False),
    ],
)
def test_similar_and_different_queries_are_distinguished(one, other, same):
    assert nearly_the_same(text_key(one), text_key(other)) is same


@given(LINES, LINES)
@example("a red on of old front street", "a red front of old on street")
def test_similarity_is_symmetric(one, other):
    assert nearly_the_same(one, other) == nearly_the_same(other, one)


@given(
    st.lists(LINES, max_size=6), st.lists(LINES, max_size=6), st.lists(LINES, max_size=2), st.sets(LINES, max_size=2)
)
def test_candidates_differ_from_captions_samples_and_each_other(scenes, objects, captions, samples):
    replies = {"scene": [WriterReply(t, True) for t in scenes], "object": [WriterReply(t, True) for t in objects]}
    found = candidates_of(replies, captions=captions, samples={text_key(s) for s in samples})
    keys = [text_key(query.text) for query in found.queries]
    known = [*map(text_key, captions), *keys]
    assert not any(nearly_the_same(a, b) for i, a in enumerate(known) for b in known[i + 1 :] if b in keys)
    assert not set(keys) & {text_key(s) for s in samples}
    assert len(found.queries) + sum(found.refused.values()) == len(scenes) + len(objects)


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(list(KINDS))), max_size=9, unique_by=lambda q: q[0]),
    st.integers(0, 9),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 2 * MAX_IMAGES)),
)
def test_choose_balances_kinds_and_drops_shared_queries(queries, wanted, n_images):
    offered = [PseudoQuery(text=text, kind=kind) for text, kind in queries]
    chosen = choose(offered, wanted, n_images)
    own = [query for query in offered if n_images.get(query.text, 0) <= MAX_IMAGES]
    assert set(chosen) <= set(own)
    assert len(chosen) == min(wanted, len(own))
    left, taken = Counter(q.kind for q in own if q not in chosen), Counter(q.kind for q in chosen)
    assert all(taken[kind] >= max(taken.values(), default=0) - 1 for kind in left)
