"""The instructions for writing queries of an image, and the protocol of a writer.

Depends on texts; independent of models, servers and the index.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llama_index_genret.corpus.jsonl import parse_object, read_lines
from llama_index_genret.errors import CorpusError

MAX_CHARACTERS = 160
"""Maximum length of a query. Longer replies are refused, and longer samples are ignored."""

SAMPLES_PER_PROMPT = 5
"""Number of sample queries in a prompt. Each prompt shows other samples."""

KINDS = {
    "scene": "Say what the whole picture shows.",
    "object": "Name one thing in the picture, and say what it looks like.",
    "relation": "Say how two things in the picture go together: where one is, or what it does with the other.",
}
"""The kinds of queries, and the instruction for each."""

ORDER = "Write one short search query for which this picture is the right result. {task} Write the query only."
STYLE = "\nIn the style of these queries, which are of other pictures:\n{samples}"


@dataclass(frozen=True)
class WriterRequest:
    """A request for queries of one image.

    image: path of the image.
    text: the instruction.
    seed: seed of the sampling, below 2**31.
    """

    image: Path
    text: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters: `n` replies to each request, with at most `max_tokens` tokens each."""

    n: int
    temperature: float
    top_p: float = 0.95
    max_tokens: int = 48


@dataclass(frozen=True)
class WriterReply:
    """A reply of a model.

    ended: the model ended the reply itself, before `max_tokens`.
    """

    text: str
    ended: bool


class Writer(Protocol):
    """A model that writes texts about images. See `store.Provenance` for `model` and `fingerprint`."""

    model: str
    fingerprint: str | None

    def write(self, requests: Sequence[WriterRequest], sampling: Sampling) -> list[list[WriterReply]]:
        """Return `sampling.n` replies per request. Equal requests give equal replies, except from a server."""


def instruction(kind: str, samples: Sequence[str], seed: int) -> str:
    """Return the instruction for a kind of query, with sample queries chosen by the seed if there are any."""
    order = ORDER.format(task=KINDS[kind])
    if not samples:
        return order
    shown = random.Random(seed).sample(list(samples), min(SAMPLES_PER_PROMPT, len(samples)))
    return order + STYLE.format(samples="\n".join(f"- {sample}" for sample in shown))


def seed_of(*parts: object) -> int:
    """Return a seed below 2**31 that depends on the parts only."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def read_samples(path: Path) -> tuple[str, ...]:
    """Read distinct sample queries, one per line, or `{"query": "..."}` per line of a `.jsonl`.

    Raises:
        CorpusError: the file cannot be read, a line is invalid, or no query has at most MAX_CHARACTERS.
    """
    texts = []
    for number, line in enumerate(read_lines(path), start=1):
        text = _query_in(line, f"{path}, line {number}: ") if path.suffix == ".jsonl" and line.strip() else line
        texts.append(" ".join(text.split()))
    samples = tuple(dict.fromkeys(text for text in texts if 0 < len(text) <= MAX_CHARACTERS))
    if not samples:
        raise CorpusError(f"{path} has no query of at most {MAX_CHARACTERS} characters: add queries, one per line.")
    return samples


def _query_in(line: str, where: str) -> str:
    query = parse_object(line, where, example='{"query": "..."}').get("query")
    if not isinstance(query, str):
        raise CorpusError(f'{where}expected {{"query": "..."}} with a text, got {line[:80]!r}.')
    return query
