"""What the model says for and against recalled images beyond the search, by log-probabilities of prompts.

    log p(query | image)        how well the image, named or shown, explains the query's words
    log p(query)                the same of an image at large: the mean over some other images of the index
    log p(identifier | query)   over the whole vocabulary: a search makes the valid names' probabilities sum to one

An `Inquiry` is pure; `inquired` and `ainquired` ask a session of any scorer.

Source: query likelihood with the difference to a background model (Zhai and Lafferty 2004), the pointwise mutual
information of a query and an image; reverse scoring as of TIGeR (arXiv:2406.05814).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from llama_index_genret.errors import QueryError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.abstention import Signals, log_odds
from llama_index_genret.scorers.base import AsyncScorer, Scorer, Scores
from llama_index_genret.scorers.rerank import Continuation, Float64, checked_likelihoods, describing_prompt
from llama_index_genret.search import Normalise, Row, Rows, check_scores
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
        return self.likelihoods - (self.background if np.isfinite(self.background) else 0.0)

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

    def told(self) -> list[Continuation]:
        """The query's words after each image, then after each reference."""
        return [Continuation(self._describing(row), self.prompt.words) for row in (*self.rows, *self._others)]

    def names(self, query: int) -> list[Row]:
        """What must be scored so that each identifier is, after the prompt at position `query`; a beginning once."""
        following: dict[tuple[int, ...], set[int]] = {}
        for prefix, token in chain.from_iterable(self._steps):
            following.setdefault(prefix, set()).add(token)
        return [Row(query, prefix, np.array(sorted(tokens))) for prefix, tokens in following.items()]

    def evidence(self, log_likelihoods: Float64, scores: Sequence[Float64]) -> Evidence:
        """What the answers to `told` and to each of `names` amount to.

        Without a reference that is left, the images asked about are the references.
        """
        likelihoods, others = np.split(log_likelihoods, [len(self.rows)])
        background = others if len(others) else likelihoods
        mean = float(np.logaddexp.reduce(background) - np.log(len(background)))
        found = {
            (row.prefix, token): float(score)
            for row, of_row in zip(self.names(0), scores, strict=True)
            for token, score in zip(row.token_ids.tolist(), of_row, strict=True)
        }
        naming = np.array([sum(found[step] for step in steps) for steps in self._steps])
        return Evidence(likelihoods, mean, naming, len(self.prompt.words))

    @property
    def _steps(self) -> list[list[tuple[tuple[int, ...], int]]]:
        """Of each image's identifier, every token with those before it."""
        names = [self.index.token_ids(row) for row in self.rows]
        return [[(name[:place], token) for place, token in enumerate(name)] for name in names]

    def _describing(self, row: int) -> Prompt:
        return describing_prompt(self.index, row, self.by)


def inquired(scorer: Scorer, inquiries: Sequence[Inquiry]) -> list[Evidence]:
    """The evidence of each, asked together: all names in one step, all likelihoods in another.

    Raises:
        NotANumber: the model answered NaN or +inf.
    """
    told, rows = _asked(inquiries)
    with scorer.session([inquiry.prompt for inquiry in inquiries], Normalise.VOCABULARY) as session:
        return _parted(inquiries, session.log_likelihoods(told), rows, session.score(rows))


async def ainquired(scorer: AsyncScorer, inquiries: Sequence[Inquiry]) -> list[Evidence]:
    """`inquired` for an event loop: both at once."""
    told, rows = _asked(inquiries)
    async with scorer.async_session([inquiry.prompt for inquiry in inquiries], Normalise.VOCABULARY) as session:
        likelihoods, scores = await asyncio.gather(session.log_likelihoods(told), session.score(rows))
    return _parted(inquiries, likelihoods, rows, scores)


def _asked(inquiries: Sequence[Inquiry]) -> tuple[list[Continuation], Rows]:
    told = [one for inquiry in inquiries for one in inquiry.told()]
    return told, Rows.of([row for query, inquiry in enumerate(inquiries) for row in inquiry.names(query)])


def _parted(inquiries: Sequence[Inquiry], likelihoods: Float64, rows: Rows, answer: Scores) -> list[Evidence]:
    found, told, named = [], 0, 0
    likelihoods, scores = checked_likelihoods(likelihoods), rows.split(np.asarray(check_scores(answer, rows.offsets)))
    for inquiry in inquiries:
        n, m = len(inquiry.told()), len(inquiry.names(0))
        found.append(inquiry.evidence(likelihoods[told : told + n], scores[named : named + m]))
        told, named = told + n, named + m
    return found
