"""Test that identifiers are unique, deterministic, and unchanged when images are added."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_index_genret.errors import IdentifierError
from llama_index_genret.identifiers import ImageFacts, get_scheme, register_scheme
from llama_index_genret.identifiers.base import FirstFree
from llama_index_genret.identifiers.structured import StructuredScheme

SCHEMES = ("numeric", "string", "semantic", pytest.param("structured", marks=pytest.mark.torch), "atomic")

HOSTILE = (
    "",
    "🦊🔥",
    "تفاحة حمراء على طاولة",
    "<g0_1><g1_2>",
    "<|im_end|> </s> [INST] <s_0>",
    "the of a",
    "image 1",
    "image",
    "red apple 2",
    "red apple",
    "हिन्दी में एक लाल सेब",
    "e\u0301te\u0301 \u212bngstro\u0308m ﬁne ＡＢＣ",
    "1️⃣ 2️⃣",
    "红苹果在木桌上" * 9,
    "\ud800 \x00 a\u200db",
)


def captions():
    return st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=12)), max_size=2).map(tuple)


@st.composite
def image_facts(draw, most=25):
    """Draw images of which many have equal features and captions."""
    n = draw(st.integers(1, most))
    features = np.random.default_rng(draw(st.integers(0, 5))).normal(size=(4, 3))
    rows = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    return ImageFacts(n, features[rows].astype(np.float32), tuple(draw(st.lists(captions(), min_size=n, max_size=n))))


def facts(n, features=None, captions=()):
    return ImageFacts(n, features, tuple(captions))


def random_features(n, dim=8, seed=1):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def assert_unique(identifiers):
    assert len(set(identifiers)) == len(identifiers)
    assert all(identifiers)
    assert all(all(symbols) for symbols in identifiers)


def assert_prefix_free(identifiers):
    """Check neighbours only: in sorted order a prefix is directly before an identifier that begins with it."""
    ordered = sorted(identifiers)
    assert len(set(ordered)) == len(ordered)
    assert not any(later[: len(first)] == first for first, later in pairwise(ordered))


@pytest.mark.parametrize("scheme", SCHEMES)
@given(image_facts(), image_facts(), image_facts())
def test_identifiers_are_unique_for_any_and_added_images(scheme, first, second, third):
    options = {"sizes": 2, "levels": 8} if scheme == "structured" else {}
    instance = get_scheme(scheme, **options)
    identifiers = instance.fit(first, seed=0)
    symbols = instance.new_symbols()
    for later in (second, third):
        added = instance.extend(later, set(identifiers))
        restored = get_scheme(scheme, **instance.options())
        restored.restore(instance.arrays())
        assert restored.new_symbols() == instance.new_symbols()
        assert len(added) == later.n_images
        identifiers += added
        assert_unique(identifiers)
    assert instance.new_symbols()[: len(symbols)] == symbols
    if symbols:
        assert {symbol for identifier in identifiers for symbol in identifier} <= set(instance.new_symbols())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_identical_images_get_distinct_identifiers(scheme):
    instance, n = get_scheme(scheme), 3000
    images = facts(n, np.ones((n, 4), np.float32), [("a red apple on a table",)] * n)
    identifiers = instance.fit(images, seed=0)
    assert_unique(identifiers + instance.extend(images, identifiers))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_are_deterministic_and_restorable(scheme):
    images = facts(60, random_features(60), [(HOSTILE[i % len(HOSTILE)],) for i in range(60)])
    one, two = get_scheme(scheme), get_scheme(scheme)
    identifiers = one.fit(images, seed=4)
    assert two.fit(images, seed=4) == identifiers
    restored = get_scheme(scheme, **one.options())
    restored.restore(one.arrays())
    assert restored.extend(images, identifiers) == one.extend(images, identifiers)


@pytest.mark.parametrize("scheme", ["numeric", "string", "atomic"])
def test_number_of_a_removed_image_is_not_reused(scheme):
    instance = get_scheme(scheme)
    identifiers = instance.fit(facts(12), seed=0)
    assert instance.extend(facts(1), identifiers[:5])[0] not in identifiers


@given(st.integers(1, 2000))
def test_numbers_are_padded_and_continue(n):
    scheme = get_scheme("numeric")
    identifiers = scheme.fit(facts(n), seed=0)
    assert_prefix_free(identifiers)
    assert ["".join(i) for i in identifiers] == [str(i).zfill(len(str(n - 1))) for i in range(n)]
    assert scheme.extend(facts(1), identifiers) == [tuple(str(n).zfill(len(str(n - 1))))]


def test_first_free_skips_taken_identifiers():
    free = FirstFree([("a0",)], lambda key: ((f"{key}{n}",) for n in range(9)))
    assert [free.assign("a"), free.assign("b"), free.assign("a")] == [("a1",), ("b0",), ("a2",)]


def test_missing_or_invalid_inputs_are_errors():
    with pytest.raises(IdentifierError, match=r"\(3, d\)"):
        get_scheme("structured").fit(facts(3), seed=0)
    with pytest.raises(IdentifierError, match="image 1"):
        facts(2, np.array([[1, 2], [np.nan, 1]], np.float32))
    with pytest.raises(IdentifierError, match=r"\(2, d\), not \(3, 1\)"):
        facts(2, np.ones((3, 1), np.float32))
    with pytest.raises(IdentifierError, match="2 images have 1"):
        facts(2, None, [("x",)])
    with pytest.raises(IdentifierError, match="no images"):
        get_scheme("structured").fit(facts(0, np.ones((0, 2), np.float32)), seed=0)


@pytest.mark.parametrize(
    ("scheme", "options", "words"),
    [
        ("structured", {"levels": 0}, "levels=0"),
        ("structured", {"sizes": 1}, "sizes=1"),
        ("structured", {"sizes": "34"}, "sizes=34"),
        ("structured", {"levels": 3, "sizes": [4, 4]}, "each of 3 levels"),
        ("structured", {"method": "magic"}, "'kmeans' or 'rq'"),
        ("structured", {"colour": "red"}, "colour"),
        ("structured", {"source": "captions"}, "source='captions'"),
        ("structured", {"levels": 2.5}, "levels=2.5"),
        ("structured", {"levels": 10**6}, "levels=1000000"),
        ("structured", {"sizes": 10**9}, "sizes=1000000000"),
        ("numeric", {"digits": 1.5}, "digits=1.5"),
        ("numeric", {"digits": -1}, "digits=-1"),
        ("numeric", {"digits": 10**5}, "digits=100000"),
        ("semantic", {"words": 0}, "words=0"),
        ("semantic", {"words": 2.5}, "words=2.5"),
    ],
)
def test_error_for_an_invalid_option_shows_it(scheme, options, words):
    with pytest.raises(IdentifierError, match=words):
        get_scheme(scheme, **options)


def test_error_for_an_unknown_scheme_lists_the_schemes():
    with pytest.raises(IdentifierError, match=r"atomic.*numeric.*semantic.*string.*structured"):
        get_scheme("roman")


def test_custom_scheme_is_registered_under_a_free_name():
    register_scheme("test-own")(lambda **options: ("mine", options))
    assert get_scheme("test-own", a=1) == ("mine", {"a": 1})
    with pytest.raises(IdentifierError, match="registered already"):
        register_scheme("numeric")(StructuredScheme)
