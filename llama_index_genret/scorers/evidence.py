"""What the model says for and against recalled images beyond the search, by log-probabilities of prompts.

    log p(query | image)        how well the image, named or shown, explains the query's words
    log p(query)                the same of an image at large: the mean over some other images of the index
    log p(identifier | query)   over the whole vocabulary: a search makes the valid names' probabilities sum to one

Pure: `inquired` and `ainquired` ask a session of any scorer in between, once a query.

Source: query likelihood with the difference to a background model (Zhai and Lafferty 2004), the pointwise mutual
information of a query and an image; reverse scoring as of TIGeR (arXiv:2406.05814).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llama_index_genret.abstention import Signals, log_odds
from llama_index_genret.errors import QueryError
from llama_index_genret.prompts import Prompt
from llama_index_genret.scorers.base import AsyncScorer, Scorer
from llama_index_genret.scorers.rerank import Continuation, Float64
from llama_index_genret.search import Hit, Normalise
from llama_index_genret.store import Index
from llama_index_genret.store.scoring import RerankBy


@dataclass(frozen=True)
class Evidence:
    """Of one query and n images; natural logarithms.

    likelihoods: (n,) log p(query | image). background: log p(query).
    naming: (n,) log p(identifier | query), over the whole vocabulary. n_words: tokens of the query.
    """

    likelihoods: Float64
    background: float
    naming: Float64
    n_words: int

    @property
    def information(self) -> Float64:
        """(n,) what the query and the image tell of each other: log p(query | image) - log p(query)."""
        return self.likelihoods - self.background

    def signals(self, scores: Sequence[float | None]) -> Signals:
        """What tells whether one of the images, one at least, is meant. scores: of each, as they were recalled."""
        odds = sorted(map(log_odds, scores), reverse=True)
        return Signals(
            odds=odds[0],
            lead=odds[0] - odds[1] if len(odds) > 1 else 0.0,
            information=float(self.information.max()) / self.n_words,
            named=float(np.logaddexp.reduce(self.naming)),
        )


@dataclass(frozen=True)
class Inquiry:
    """What is asked of the images of some rows, for one query.

    by: whether the model is told the image by its "identifier" or shown the "image".
    references: rows whose mean stands for log p(query); of those, the images asked about do not count.
    """

    index: Index
    prompt: Prompt
    rows: tuple[int, ...]
    by: RerankBy
    references: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt.words:
            raise QueryError("verification asks how probable the query's words are: it takes text queries only.")

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(row for row in self.references if row not in self.rows)

    def continuations(self) -> list[Continuation]:
        """What a session must score: the query after each image, then after each reference, then each name."""
        told = [Continuation(self._describing(row), self.prompt.words) for row in (*self.rows, *self._others)]
        return told + [Continuation(self.prompt, self.index.token_ids(row)) for row in self.rows]

    def evidence(self, log_likelihoods: Float64) -> Evidence:
        """What the answers to `continuations` amount to.

        Without a reference that is left, the images asked about are the references.
        """
        n, m = len(self.rows), len(self._others)
        likelihoods, others, naming = np.split(log_likelihoods, [n, n + m])
        background = others if m else likelihoods
        mean = float(np.logaddexp.reduce(background) - np.log(len(background)))
        return Evidence(likelihoods, mean, naming, len(self.prompt.words))

    def _describing(self, row: int) -> Prompt:
        return self.index.describing_prompt(Hit(row, row, self.index.token_ids(row), 0.0), self.by)


def inquired(scorer: Scorer, inquiries: Sequence[Inquiry]) -> list[Evidence]:
    """The evidence of each, asked together."""
    asked = [inquiry.continuations() for inquiry in inquiries]
    with scorer.session([], Normalise.CHILDREN) as session:
        return _parted(inquiries, asked, session.log_likelihoods([one for part in asked for one in part]))


async def ainquired(scorer: AsyncScorer, inquiries: Sequence[Inquiry]) -> list[Evidence]:
    """`inquired` for an event loop."""
    asked = [inquiry.continuations() for inquiry in inquiries]
    async with scorer.async_session([], Normalise.CHILDREN) as session:
        answers = await session.log_likelihoods([one for part in asked for one in part])
    return _parted(inquiries, asked, answers)


def _parted(inquiries: Sequence[Inquiry], asked: Sequence[Sequence[Continuation]], answers: Float64) -> list[Evidence]:
    parts = np.split(answers, np.cumsum([len(part) for part in asked])[:-1])
    return [inquiry.evidence(part) for inquiry, part in zip(inquiries, parts, strict=True)]
