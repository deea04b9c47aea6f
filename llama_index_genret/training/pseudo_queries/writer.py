"""What a model is asked to write of a picture, and what whoever asks it promises.

Knows texts; nothing of models, servers or the index.
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
"""A longer text is no query: a written one is refused, a sample is not shown."""

SAMPLES_PER_PROMPT = 5
"""Sample queries in one prompt; others in the next, so that all of a file have their part."""

KINDS = {
    "scene": "Say what the whole picture shows.",
    "object": "Name one thing in the picture, and say what it looks like.",
    "relation": "Say how two things in the picture go together: where one is, or what it does with the other.",
}
"""Of what a query tells, and how the model is asked for it."""

ORDER = "Write one short search query for which this picture is the right result. {task} Write the query only."
STYLE = "\nIn the style of these queries, which are of other pictures:\n{samples}"


@dataclass(frozen=True)
class WriterRequest:
    """What is asked of one picture. seed: below 2**31, of the sampling."""

    image: Path
    text: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How a model is asked: `n` answers to each request, of at most `max_tokens` tokens."""

    n: int
    temperature: float
    top_p: float = 0.95
    max_tokens: int = 48


@dataclass(frozen=True)
class WriterReply:
    """What a model said. ended: by itself, not because it had no tokens left."""

    text: str
    ended: bool


class Writer(Protocol):
    """Lets a model look at pictures and speak. model, fingerprint: see `store.Provenance`."""

    model: str
    fingerprint: str | None

    def write(self, requests: Sequence[WriterRequest], sampling: Sampling) -> list[list[WriterReply]]:
        """Of each request `sampling.n` answers; the same ones for the same requests, but for those of a server."""


def instruction(kind: str, samples: Sequence[str], seed: int) -> str:
    """What is asked for a query of a kind, with some of the sample queries, by the seed, if there are any."""
    order = ORDER.format(task=KINDS[kind])
    if not samples:
        return order
    shown = random.Random(seed).sample(list(samples), min(SAMPLES_PER_PROMPT, len(samples)))
    return order + STYLE.format(samples="\n".join(f"- {sample}" for sample in shown))


def seed_of(*parts: object) -> int:
    """A seed that depends on all the parts and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def read_samples(path: Path) -> tuple[str, ...]:
    """Sample queries: one a line, or `{"query": "..."}` a line in a `.jsonl`; repeated ones once.

    Raises:
        CorpusError: the file cannot be read, a line is broken, or none has at most MAX_CHARACTERS.
    """
    texts = []
    for number, line in enumerate(read_lines(path), start=1):
        text = _query_in(line, f"{path}, line {number}: ") if path.suffix == ".jsonl" and line.strip() else line
        texts.append(" ".join(text.split()))
    samples = tuple(dict.fromkeys(text for text in texts if 0 < len(text) <= MAX_CHARACTERS))
    if not samples:
        raise CorpusError(f"{path} has no query of at most {MAX_CHARACTERS} characters: give some, one a line.")
    return samples


def _query_in(line: str, where: str) -> str:
    query = parse_object(line, where, example='{"query": "..."}').get("query")
    if not isinstance(query, str):
        raise CorpusError(f'{where}want {{"query": "..."}}, with text, found {line[:80]!r}.')
    return query
