"""Words of captions as identifiers."""

from hypothesis import given
from hypothesis import strategies as st

from llama_index_genret.identifiers import get_scheme
from llama_index_genret.identifiers.semantic import FUNCTION_WORDS, LONGEST_WORD, content_words
from tests.identifiers.test_schemes import facts


def test_a_caption_names_its_image_by_its_content_words_then_by_more_of_them_then_by_a_number():
    caption = ("A red apple, on the old wooden table of my Grandmother!",)
    naming = get_scheme("semantic", words=4)
    names = naming.fit(facts(5, None, [caption] * 4 + [()]), seed=0)
    assert names == [
        ("red apple old wooden",),
        ("red apple old wooden table",),
        ("red apple old wooden table grandmother",),
        ("red apple old wooden table grandmother 2",),
        ("image 1",),
    ]
    assert naming.extend(facts(2, None, [caption, ("🦊", "")]), names) == [
        ("red apple old wooden table grandmother 3",),
        ("image 2",),
    ]


def test_an_image_whose_first_caption_has_no_word_is_named_by_the_next():
    assert get_scheme("semantic").fit(facts(1, None, [("🦊", "a fox")]), seed=0) == [("fox",)]


@given(st.text())
def test_words_hold_letters_marks_and_digits_only_and_fold_to_themselves(text):
    for word in content_words(text):
        assert word.isprintable()
        assert 0 < len(word) <= LONGEST_WORD
        assert not set(word) & set(" <>|_[]/\ufe0f")
    assert content_words(" ".join(content_words(text))) == content_words(text)


def test_compatible_forms_and_letter_case_make_one_word_and_function_words_alone_are_kept():
    assert content_words("ＡＰＰＬＥ Apple ﬁg Straße e\u0301") == ("apple", "apple", "fig", "strasse", "é")
    assert content_words("ℌat") == ("hat",)  # a capital only once it is normalised
    assert content_words("<g0_1>🦊the_cat") == ("g0", "1", "cat")
    assert content_words("the of") == ("the", "of")
    assert "the" in FUNCTION_WORDS
