"""Identifiers: unique for any input, none the beginning of another, and the same from the frozen codebooks."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_index_genret.errors import IdentifierError
from llama_index_genret.identifiers import get_scheme, register_scheme
from llama_index_genret.identifiers.base import suffix_collisions
from llama_index_genret.identifiers.structured import StructuredScheme


def assert_prefix_free(identifiers):
    """Sorted, a beginning stands directly before what it begins."""
    ordered = sorted(identifiers)
    assert len(set(ordered)) == len(ordered)
    assert not any(later[: len(first)] == first for first, later in pairwise(ordered))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_structured_identifiers_are_unique_however_many_images_are_alike(n_distinct, copies, seed):
    features = np.random.default_rng(seed).normal(size=(n_distinct, 5)).astype(np.float32)
    features = np.repeat(features, copies, axis=0)[:300]
    scheme = get_scheme("structured", levels=2, size=3)
    identifiers = scheme.fit(len(features), features, seed=seed)
    assert_prefix_free(identifiers)
    assert {s for identifier in identifiers for s in identifier} <= set(scheme.new_symbols())


def test_thousands_of_identical_images_get_thousands_of_identifiers():
    identifiers = get_scheme("structured").fit(3000, np.ones((3000, 4), np.float32), seed=0)
    assert_prefix_free(identifiers)


def test_a_suffix_stands_only_where_codes_collide():
    codes = [("a",), ("b",), ("a",), ("c",)]
    named = suffix_collisions(codes, lambda count, size: (f"s{count}/{size}",))
    assert named == [("a", "s0/2"), ("b",), ("a", "s1/2"), ("c",)]


def test_alike_images_share_the_beginning_of_their_identifiers():
    """What makes a wrong answer a near one: two far clusters never share the first symbol."""
    rng = np.random.default_rng(0)
    features = np.repeat(np.eye(3)[:2], 20, axis=0) + rng.normal(0, 0.01, (40, 3))
    identifiers = get_scheme("structured", levels=2, size=6).fit(40, features.astype(np.float32), seed=0)
    assert not {i[0] for i in identifiers[:20]} & {i[0] for i in identifiers[20:]}


def test_restored_codebooks_give_the_same_codes():
    features = np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32)
    fitted = StructuredScheme()
    identifiers = fitted.fit(200, features, seed=0)
    restored = get_scheme("structured", **fitted.options())
    restored.restore(fitted.arrays())
    np.testing.assert_array_equal(restored.encode(features), fitted.encode(features))
    assert [i[:2] for i in identifiers] == [(f"<g0_{a}>", f"<g1_{b}>") for a, b in restored.encode(features)]
    assert restored.new_symbols() == fitted.new_symbols()


def test_the_scale_of_a_feature_does_not_matter():
    features = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    scheme = StructuredScheme()
    scheme.fit(50, features, seed=0)
    np.testing.assert_array_equal(scheme.encode(features * 37.0), scheme.encode(features))


@pytest.mark.parametrize(("n", "levels"), [(1, 2), (100, 2), (1024, 2), (1025, 3)])
def test_depth_follows_the_number_of_images(n, levels):
    scheme = StructuredScheme()
    scheme.fit(n, np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32), seed=0)
    assert scheme.levels == levels


@given(st.integers(1, 2000))
def test_numbers_are_unique_and_of_one_length(n):
    identifiers = get_scheme("numeric").fit(n, None, seed=0)
    assert_prefix_free(identifiers)
    assert ["".join(i) for i in identifiers] == [str(i).zfill(len(str(n - 1))) for i in range(n)]


def test_missing_or_broken_features_are_errors_that_say_so():
    with pytest.raises(IdentifierError, match=r"\(3, d\)"):
        get_scheme("structured").fit(3, None, seed=0)
    with pytest.raises(IdentifierError, match="image 1"):
        get_scheme("structured").fit(2, np.array([[1, 2], [np.nan, 1]], np.float32), seed=0)
    with pytest.raises(IdentifierError, match="levels=0"):
        get_scheme("structured", levels=0)


def test_an_unknown_scheme_names_the_known_ones():
    with pytest.raises(IdentifierError, match=r"numeric.*structured"):
        get_scheme("roman")


def test_a_scheme_of_ones_own_is_found_by_its_name_and_a_taken_name_is_an_error():
    register_scheme("test-own")(lambda **options: ("mine", options))
    assert get_scheme("test-own", a=1) == ("mine", {"a": 1})
    with pytest.raises(IdentifierError, match="registered already"):
        register_scheme("numeric")(StructuredScheme)
