"""Extract queries from a model's replies: clean them, and drop duplicates and queries that too many images share.

Depends on texts, as pure functions; independent of models and files.
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
"""Maximum number of images that may share a query.

The best possible recall@1 of a query for s images is 1/s, and a query that fits hundreds ("a picture") carries no
information. Images of the same object may share a few words.
"""

NEARLY = 0.85
"""Ratio of matching characters from which two queries of one image are duplicates.

"a red bus on the street" and "red bus on a street" are above it, "a dog left of a cat" and "a cat left of a dog" below.
"""

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
    """The possible queries of one image, and the number of refused replies by reason."""

    queries: tuple[PseudoQuery, ...]
    refused: Mapping[str, int]


def clean(line: str) -> str:
    """Strip list markers, quotes, labels, "The image shows" and surrounding punctuation from a line."""
    before, text = None, " ".join(line.split())
    while text != before:
        before = text
        for beginning in (_MARKER, _LABEL, _LEAD):
            text = beginning.sub("", text, count=1) if beginning.match(text) else text
        text = text.strip(_QUOTES).lstrip(".,;:!?").rstrip(".,;。")
    return text


def query_in(reply: WriterReply) -> tuple[str, str]:
    """Return the first query of a reply and "", or "" and the reason why there is none.

    A reply that did not end counts up to its last complete line or sentence, so that no query is cut.
    """
    text = reply.text.strip()
    if not reply.ended:
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
    replies: Mapping[str, Sequence[WriterReply]],
    *,
    captions: Collection[str] = (),
    samples: Collection[str] = (),
    is_plain: Callable[[str], bool] = lambda text: True,
) -> Candidates:
    """Return the distinct queries in a model's replies for one image, alternating between kinds.

    Args:
        replies: replies by kind.
        captions: captions of the image. A query similar to one of them is refused.
        samples: keys (`text_key`) of the sample queries in the prompt. A copy of one of them is refused.
        is_plain: returns True for a text without the model's markup.
    """
    queries: list[PseudoQuery] = []
    known = [text_key(caption) for caption in captions]
    refused: Counter[str] = Counter()
    alternating = chain.from_iterable(zip_longest(*([(kind, r) for r in texts] for kind, texts in replies.items())))
    for kind, reply in filter(None, alternating):
        text, reason = query_in(reply)
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
    """Return whether two texts, given by their keys, are duplicates up to a few characters."""
    if key == other:
        return True
    first, second = sorted((key, other))  # the ratio depends on the order
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
    return all(bound() >= NEARLY for bound in bounds)


def choose(queries: Sequence[PseudoQuery], wanted: int, n_images: Mapping[str, int]) -> tuple[PseudoQuery, ...]:
    """Return at most `wanted` queries of an image, alternating between kinds, without those of too many images.

    Args:
        n_images: number of images that have a text, by its key.
    """
    own = [query for query in queries if n_images.get(text_key(query.text), 0) <= MAX_IMAGES]
    kinds = dict.fromkeys(query.kind for query in own)
    alternating = zip_longest(*([query for query in own if query.kind == kind] for kind in kinds))
    return tuple(filter(None, chain.from_iterable(alternating)))[:wanted]
