"""An index that is edited while it is served, and the right answers in each of its states.

The index cycles through four states: whole, without a few images, without many, with only these many. Removing a few
leaves the trie's file unchanged. Removing many rebuilds it. The answers of a state are computed before the load, from
a trie of its identifiers alone and the model in this process. Independent of HTTP.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from integration.bench.agreement import TOLERANCE, Ranked, disagreement
from integration.bench.served import Site
from llama_index_genret.corpus import Record
from llama_index_genret.scorers.base import recall
from llama_index_genret.search import Mode, SearchOptions
from llama_index_genret.serving.endpoint.schema import Scalar
from llama_index_genret.store import Index, add_images, load_index, remove_images
from llama_index_genret.trie import LeafFilter, Trie, build_trie

COLORS = ("red", "green", "blue", "yellow", "black")
STATES = 4
FEW, MANY = 1, 2
GONE = ((), (FEW,), (FEW, MANY), (MANY,))
"""Groups of images that each state lacks. One edit leads to the next state."""

STALE_S = 5.0
"""A request sent these seconds after an edit must be answered by its version, or a later one."""


def metadata(row: int) -> dict[str, Scalar]:
    """Return the metadata of the image in a row of the whole index."""
    return {"color": COLORS[row % len(COLORS)], "year": 2020 + row % 3, "shared": row % 2 == 0}


def group(row: int) -> int:
    """Return the group of the image in a row: one in twenty is in FEW, one in four in MANY."""
    return FEW if row % 20 == 3 else MANY if row % 4 == 1 else 0


@dataclass(frozen=True)
class Question:
    """The options of a request, beside its query."""

    k: int
    mode: Mode = "beam"
    filters: Mapping[str, Scalar | list[Scalar]] = field(default_factory=dict, hash=False)

    def body(self) -> dict[str, Any]:
        """Return the fields of the request's body."""
        return {"k": self.k, "mode": self.mode, "filters": dict(self.filters) or None}

    def passes(self, known: Mapping[str, Any]) -> bool:
        """Return True if an image with this metadata passes the filter."""
        return all(known[key] in (v if isinstance(v, list) else [v]) for key, v in self.filters.items())


QUESTIONS: Mapping[str, tuple[Question, ...]] = {
    "beam": (Question(1), Question(5), Question(10), Question(25)),
    "exact": (Question(5, mode="exact"), Question(12, mode="exact")),
    "filtered": (
        Question(5, filters={"color": "red"}),
        Question(10, filters={"color": ["blue", "green"], "year": 2021}),
        Question(5, mode="exact", filters={"shared": True, "color": ["black", "yellow", "red"]}),
    ),
}


class Reference:
    """The right answers for every state, query and question."""

    def __init__(self, site: Site, index: Index, texts: Sequence[str]) -> None:
        """Compute all answers.

        Args:
            index: the whole index.
        """
        self._site, self._index, self._texts = site, index, list(texts)
        self._rankings: dict[tuple[int, str, Question], list[Ranked]] = {}
        self._log_probs: dict[tuple[int, str], dict[str, float]] = {}
        for state, gone in enumerate(GONE):
            rows = [row for row in range(len(index.records)) if group(row) not in gone]
            trie, order = build_trie([index.token_ids(row) for row in rows])
            records = [index.records[rows[at]] for at in order.tolist()]
            for question in (question for kind in QUESTIONS.values() for question in kind):
                for text, ranking in zip(self._texts, self._recall(trie, records, question), strict=True):
                    self._rankings[state, text, question] = ranking
            for text, ranking in zip(self._texts, self._recall(trie, records, Question(len(rows))), strict=True):
                self._log_probs[state, text] = dict(ranking)

    def _recall(self, trie: Trie, records: Sequence[Record], question: Question) -> list[list[Ranked]]:
        """Return one ranking per text. records: in the order of the leaves."""
        leaf_filter = LeafFilter.from_mask(np.array([question.passes(record.metadata) for record in records]))
        prompts = [self._site.prompt(text) for text in self._texts]
        options = SearchOptions(k=question.k, mode=question.mode, leaf_filter=leaf_filter)
        rankings = recall(self._site.scorer, trie, prompts, options)
        return [[(records[hit.leaf].image_id, hit.log_prob) for hit in ranking.hits] for ranking in rankings]

    def problem(self, state: int, text: str, question: Question, result: Mapping[str, Any]) -> str:
        """Describe the error in a result of the server, or return an empty text."""
        found = [(hit["image_id"], hit["log_prob"]) for hit in result["hits"]]
        right = self._log_probs[state, text]
        for (name, log_prob), hit in zip(found, result["hits"], strict=True):
            if abs(log_prob - right.get(name, np.inf)) > TOLERANCE:
                return f"{name} has log p {log_prob}, not {right.get(name, 'in this version')}"
            record = self._index.records[self._index.rows_by_id[name]]
            if hit["metadata"] != dict(record.metadata) or not question.passes(record.metadata):
                return f"{name} is not of the filter {question.filters}: {hit['metadata']}"
        if result["query"] != text or (question.mode == "exact" and not result["exact"]):
            return f"an answer to {result['query']!r}, exact: {result['exact']}"
        return disagreement(found, self._rankings[state, text, question])


@dataclass(frozen=True)
class Edition:
    """One version of the folder. number: count of edits before it."""

    number: int
    state: int
    written_s: float


class EditedIndex:
    """The served folder. Edits it, and records the state of each version."""

    def __init__(self, index: Index) -> None:
        self._whole = index
        self._editions = {index.version: Edition(0, 0, time.monotonic())}
        self.newest = self._editions[index.version]

    def edit(self) -> None:
        """Edit the index to the next state. Blocks for some milliseconds."""
        before, after = GONE[self.newest.state], GONE[(self.newest.state + 1) % STATES]
        changed = set(before) ^ set(after)
        rows = [row for row in range(len(self._whole.records)) if group(row) in changed]
        index = load_index(self._whole.folder)
        if len(after) > len(before):
            edited = remove_images(index, [self._whole.records[row].image_id for row in rows])
        else:
            records = [self._whole.records[row] for row in rows]
            edited = add_images(index, records, [self._whole.identifiers[row] for row in rows], index.scheme())
        self.newest = Edition(self.newest.number + 1, (self.newest.state + 1) % STATES, time.monotonic())
        self._editions[edited.version] = self.newest

    def oldest_allowed(self) -> int:
        """Return the number of the oldest edition that may answer a request sent now."""
        before = time.monotonic() - STALE_S
        return next((e.number for e in reversed(self._editions.values()) if e.written_s < before), 0)

    def replaced_s(self, edition: Edition) -> float:
        """Return the time at which the next edition was written, or infinity."""
        return next((e.written_s for e in self._editions.values() if e.number == edition.number + 1), math.inf)

    async def edition(self, version: str, *, timeout_s: float = 10.0) -> Edition | None:
        """Return the edition of a version. A server may know it before the call that wrote it has returned."""
        end = time.monotonic() + timeout_s
        while version not in self._editions and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return self._editions.get(version)
