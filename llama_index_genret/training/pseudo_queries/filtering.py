"""From what a model says to queries: cleaned, of each image none twice, and none that too many images share.

Pure functions of texts; knows nothing of models or files.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import chain, zip_longest

from llama_index_genret.store import PseudoQuery, text_key
from llama_index_genret.training.pseudo_queries.writer import MAX_CHARACTERS, WriterReply

MAX_IMAGES = 3
"""Images that may share a query. Of a query of s images the best possible recall@1 is 1/s, and what fits hundreds
("a picture") teaches nothing but how often it was said; but pictures of one thing rightly share a few words."""

NEARLY = 0.85
"""Share of matching characters from which two queries of one image are the same: "a red bus on the street" and "red bus
on a street". "A dog left of a cat" and "a cat left of a dog" lie below it, and stay."""

_QUOTES = "\"'`*_“”„‘’«»「」 \t"
_MARKER = re.compile(r"(?:[-•–—>#*]+|\(?\d{1,3}[.):])\s+")
_LABEL = re.compile(
    r"(?:(?:short|search|user|image)\s+)*(?:query|caption|answer|assistant|description)\s*\d*\s*[:：]\s*", re.I
)
_LEAD = re.compile(
    r"(?:in\s+)?(?:the|this|an?)\s+(?:image|picture|photo|photograph|scene|illustration)\s*,?\s+"
    r"(?:(?:shows|depicts|features|displays|contains|captures|presents|portrays|is\s+(?:of|showing))|(?:there\s+(?:is|are)))\s+",
    re.I,
)
_NO_QUERY = re.compile(
    r"(?:sure|certainly|of course|okay|here(?:'s| is| are)|i'm sorry|sorry|i can(?:'t|not)|as an ai)\b", re.I
)
_WHOLE = re.compile(r".*(?:\n|[^\W\d_][.!?](?=\s|$)|[。！？])", re.DOTALL)
_UNPRINTABLE = frozenset({"Cc", "Cs", "Co", "Cn"})


@dataclass(frozen=True)
class Candidates:
    """Queries that one image could have, and how many answers were refused, by reason."""

    queries: tuple[PseudoQuery, ...]
    refused: Mapping[str, int]


def clean(line: str) -> str:
    """The query in a line: without list marks, quotes, labels, "The image shows", and the stops around it."""
    before, text = None, " ".join(line.split())
    while text != before:
        before = text
        for beginning in (_MARKER, _LABEL, _LEAD):
            text = beginning.sub("", text, count=1) if beginning.match(text) else text
        text = text.strip(_QUOTES).lstrip(".,;:!?").rstrip(".,;。")
    return text


def query_in(answer: WriterReply) -> tuple[str, str]:
    """The query that an answer begins with and "", or "" and why there is none.

    Of an answer that did not end, only whole lines and sentences count: nothing is cut within one.
    """
    text = answer.text.strip()
    if not answer.ended:
        whole = _WHOLE.match(text)
        if text and not whole:
            return "", "unfinished"
        text = whole[0] if whole else ""
    queries = [clean(line) for line in text.splitlines() if not line.rstrip(_QUOTES).endswith((":", "："))]
    query = next((query for query in queries if query and not _NO_QUERY.match(query)), "")
    if not any(character.isalpha() for character in query):
        return "", "without words"
    if len(query) > MAX_CHARACTERS:
        return "", "too long"
    if "\ufffd" in query or any(unicodedata.category(character) in _UNPRINTABLE for character in query):
        return "", "garbled"
    return query, ""


def candidates_of(
    answers: Mapping[str, Sequence[WriterReply]],
    *,
    captions: Collection[str] = (),
    samples: Collection[str] = (),
    is_plain: Callable[[str], bool] = lambda text: True,
) -> Candidates:
    """The different queries in a model's answers of one image, the kinds by turns.

    Args:
        answers: by kind.
        captions: of the image; a query like one of them is refused.
        samples: keys (`text_key`) of queries that the model was shown; one of them is a copy, and says nothing.
        is_plain: whether a text is free of the model's markup.
    """
    queries: list[PseudoQuery] = []
    known = [text_key(caption) for caption in captions]
    refused: Counter[str] = Counter()
    by_turns = chain.from_iterable(zip_longest(*([(kind, a) for a in given] for kind, given in answers.items())))
    for kind, answer in filter(None, by_turns):
        text, reason = query_in(answer)
        key = text_key(text)
        if not reason and not is_plain(text):
            reason = "markup"
        if not reason and key in samples:
            reason = "copied from the samples"
        if not reason and any(nearly_the_same(key, other) for other in known):
            reason = "repeated"
        if reason:
            refused[reason] += 1
            continue
        known.append(key)
        queries.append(PseudoQuery(text=text, kind=kind))
    return Candidates(tuple(queries), dict(refused))


def nearly_the_same(key: str, other: str) -> bool:
    """Whether two texts, given by their keys, differ in so little that one of them is enough."""
    if key == other:
        return True
    first, second = sorted((key, other))  # the ratio depends on their order
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
    return all(bound() >= NEARLY for bound in bounds)


def choose(queries: Sequence[PseudoQuery], wanted: int, n_images: Mapping[str, int]) -> tuple[PseudoQuery, ...]:
    """At most `wanted` of an image's queries, of each kind in turn, without those that too many images have.

    Args:
        n_images: by key, how many images have a text.
    """
    own = [query for query in queries if n_images.get(text_key(query.text), 0) <= MAX_IMAGES]
    kinds = dict.fromkeys(query.kind for query in own)
    by_turns = zip_longest(*([query for query in own if query.kind == kind] for kind in kinds))
    return tuple(filter(None, chain.from_iterable(by_turns)))[:wanted]
