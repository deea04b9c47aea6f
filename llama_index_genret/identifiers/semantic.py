"""`semantic`: a handful of words of the caption. GRACE's semantic identifiers (arXiv:2402.10805).

Knows captions and Unicode; nothing of image features or tokenizers.
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
"""Characters. Scripts without spaces give longer runs, which are read as several words."""

_FUNCTION_WORDS = """
a an the of in on at to by for from with without and or as is are was were be been being it its this that these those
there here he she they his her their him them i you we my your our s t some
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English words that tell images apart no better than chance; a caption of nothing else keeps them."""

FALLBACK_WORD = "image"
"""What an image without any word is called, before its number."""


@register_scheme("semantic")
class SemanticScheme:
    """`("red apple wooden table",)`: the first content words of the first caption that has any.

    Where that is taken, more words of the caption follow, then a number. Images without any word are `image 1`, ...
    words: how many content words to begin with.
    """

    name: ClassVar[str] = "semantic"
    needs: ClassVar[frozenset[Need]] = frozenset({"captions"})
    writes: ClassVar[Literal["symbols", "text"]] = "text"
    new_images: ClassVar[str] = "words of its caption; spelled like the words that the model knows already"

    def __init__(self, words: int = 5) -> None:
        if not isinstance(words, int) or words < 1:
            raise IdentifierError(f"words={words} must be an integer of at least 1.")
        self.words = words

    def fit(self, images: ImageFacts, *, seed: int) -> list[Identifier]:
        """See `Scheme.fit`; nothing is random."""
        return self.extend(images, ())

    def extend(self, images: ImageFacts, taken: Collection[Identifier]) -> list[Identifier]:
        """See `Scheme.extend`."""
        free = FirstFree(taken, self._candidates)
        return [free.name(_first_words(images.captions_of(row))) for row in range(images.n_images)]

    def _candidates(self, words: tuple[str, ...]) -> Iterator[Identifier]:
        for n in range(self.words, max(self.words, len(words)) + 1):
            if words:
                yield (" ".join(words[:n]),)
        for number in count(2 if words else 1):
            yield (" ".join([*(words or (FALLBACK_WORD,)), str(number)]),)

    def new_symbols(self) -> list[str]:
        """None: it is text."""
        return []

    def codes_per_level(self) -> tuple[int, ...]:
        """Not fixed: the tokenizer spells."""
        return ()

    def options(self) -> dict[str, Any]:
        """Words, as chosen."""
        return {"words": self.words}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """None."""
        return {}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Nothing to take back."""


def _first_words(captions: tuple[str, ...]) -> tuple[str, ...]:
    return next(filter(None, map(content_words, captions)), ())


def content_words(caption: str) -> tuple[str, ...]:
    """The words of a caption, compatibility-normalised and casefolded, function words left out unless all are.

    A word is a run of letters with their marks, and digits: markup, emoji, punctuation and control characters part
    words and are in none.
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
