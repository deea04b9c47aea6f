"""Test identifiers made of the words of captions."""

from hypothesis import given
from hypothesis import strategies as st

from llama_index_genret.identifiers import get_scheme
from llama_index_genret.identifiers.semantic import FUNCTION_WORDS, LONGEST_WORD, content_words
from tests.identifiers.test_schemes import facts


def test_taken_captions_get_more_words_then_a_number():
    caption = ("A red apple, on the old wooden table of my Grandmother!",)
    instance = get_scheme("semantic", words=4)
    identifiers = instance.fit(facts(5, None, [caption] * 4 + [()]), seed=0)
    assert identifiers == [
        ("red apple old wooden",),
        ("red apple old wooden table",),
        ("red apple old wooden table grandmother",),
        ("red apple old wooden table grandmother 2",),
        ("image 1",),
    ]
    assert instance.extend(facts(2, None, [caption, ("🦊", "")]), identifiers) == [
        ("red apple old wooden table grandmother 3",),
        ("image 2",),
    ]


def test_caption_without_words_is_skipped():
    assert get_scheme("semantic").fit(facts(1, None, [("🦊", "a fox")]), seed=0) == [("fox",)]


@given(st.text())
def test_content_words_are_clean_and_idempotent(text):
    for word in content_words(text):
        assert word.isprintable()
        assert 0 < len(word) <= LONGEST_WORD
        assert not set(word) & set(" <>|_[]/\ufe0f")
    assert content_words(" ".join(content_words(text))) == content_words(text)


def test_content_words_are_normalised_and_never_empty():
    assert content_words("ＡＰＰＬＥ Apple ﬁg Straße e\u0301") == ("apple", "apple", "fig", "strasse", "é")
    assert content_words("ℌat") == ("hat",)  # becomes a capital letter only by normalisation
    assert content_words("<g0_1>🦊the_cat") == ("g0", "1", "cat")
    assert content_words("the of") == ("the", "of")
    assert "the" in FUNCTION_WORDS
