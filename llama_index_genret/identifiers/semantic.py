"""The `semantic` scheme makes identifiers of a few words of the caption.

Depends on captions and Unicode; independent of image features and tokenizers.

Source: GRACE's semantic identifiers (arXiv:2402.10805).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Mapping
from itertools import count
from typing import Any, ClassVar, Literal

from numpy.typing import NDArray

from llama_index_genret.errors import IdentifierError
from llama_index_genret.identifiers.base import FirstFree, Identifier, ImageFacts, Need, register_scheme

LONGEST_WORD = 24
"""Longest word in characters. Scripts without spaces give longer runs, which are split into several words."""

_FUNCTION_WORDS = """
a an the of in on at to by for from with without and or as is are was were be been being it its this that these those
there here he she they his her their him them i you we my your our s t some
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English words that do not distinguish images. A caption of only such words keeps them."""

FALLBACK_WORD = "image"
"""The word, before a number, for an image whose captions have no words."""


@register_scheme("semantic")
class SemanticScheme:
    """Makes identifiers like `("red apple wooden table",)`: the first content words of a caption.

    The first caption that has content words is used. If the identifier is taken, more words of the caption are
    appended, then a number. Images whose captions have no words get `image 1`, `image 2`, ...

    words: number of content words to start with, at least 1. Default 5.
    """

    name: ClassVar[str] = "semantic"
    needs: ClassVar[frozenset[Need]] = frozenset({"captions"})
    writes: ClassVar[Literal["symbols", "text"]] = "text"
    new_images: ClassVar[str] = "words of its caption, in tokens that the model already has"

    def __init__(self, words: int = 5) -> None:
        if not isinstance(words, int) or words < 1:
            raise IdentifierError(f"words={words} must be an integer of at least 1.")
        self.words = words

    def fit(self, images: ImageFacts, *, seed: int) -> list[Identifier]:
        """Assign identifiers deterministically: the seed has no effect. See `Scheme.fit`."""
        return self.extend(images, ())

    def extend(self, images: ImageFacts, taken: Collection[Identifier]) -> list[Identifier]:
        """Assign words that are not taken. See `Scheme.extend`."""
        free = FirstFree(taken, self._candidates)
        return [free.assign(_first_words(images.captions_of(row))) for row in range(images.n_images)]

    def _candidates(self, words: tuple[str, ...]) -> Iterator[Identifier]:
        for n in range(self.words, max(self.words, len(words)) + 1):
            if words:
                yield (" ".join(words[:n]),)
        for number in count(2 if words else 1):
            yield (" ".join([*(words or (FALLBACK_WORD,)), str(number)]),)

    def new_symbols(self) -> list[str]:
        """Return no symbols, as identifiers are text."""
        return []

    def codes_per_level(self) -> tuple[int, ...]:
        """Return (), as the tokenizer decides the number of tokens."""
        return ()

    def options(self) -> dict[str, Any]:
        """Return `words`."""
        return {"words": self.words}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return no arrays."""
        return {}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Do nothing, as there is no state."""


def _first_words(captions: tuple[str, ...]) -> tuple[str, ...]:
    return next(filter(None, map(content_words, captions)), ())


def content_words(caption: str) -> tuple[str, ...]:
    """Return the words of a caption, compatibility-normalised and casefolded, without function words.

    If all words are function words, return all of them. A word is a run of letters with their marks, and digits.
    Markup, emoji, punctuation and control characters separate words.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).casefold())
    before = " "
    spaced = []
    for character in folded:
        before = character if _belongs_to_word(character, before) else " "
        spaced.append(before)
    runs = "".join(spaced).split()
    words = [run[at : at + LONGEST_WORD] for run in runs for at in range(0, len(run), LONGEST_WORD)]
    return tuple([word for word in words if word not in FUNCTION_WORDS] or words)


def _belongs_to_word(character: str, before: str) -> bool:
    kind = unicodedata.category(character)[0]
    return kind in "LN" or (kind == "M" and unicodedata.category(before)[0] in "LM")
