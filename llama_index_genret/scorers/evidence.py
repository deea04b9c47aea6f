"""Gather evidence for and against recalled images from log-probabilities that the search does not compute.

    log p(query | image)        probability of the query's words after a prompt with the image or its identifier
    log p(query)                background: the mean of p(query | image) over some other images of the index
    log p(identifier | query)   over the whole vocabulary; in a search the valid identifiers sum to one

An `Inquiry` is pure. `gather_evidence` and `agather_evidence` query a session of any scorer.

Source: query likelihood relative to a background model (Zhai and Lafferty 2004), the pointwise mutual information of
a query and an image; reverse scoring as in TIGeR (arXiv:2406.05814).
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
from llama_index_genret.scorers.rerank import Continuation, Float64, check_likelihoods, describing_prompt
from llama_index_genret.search import Normalise, Row, Rows, check_scores
from llama_index_genret.store import Index
from llama_index_genret.store.scoring import RerankBy


@dataclass(frozen=True)
class Evidence:
    """Evidence for n images of one query; natural logarithms.

    likelihoods: (n,) log p(query | image).
    background: log p(query).
    identifier_log_probs: (n,) log p(identifier | query), over the whole vocabulary.
    n_words: number of tokens of the query's words.
    """

    likelihoods: Float64
    background: float
    identifier_log_probs: Float64
    n_words: int

    @property
    def information(self) -> Float64:
        """Return (n,) pointwise mutual information of query and image: log p(query | image) - log p(query)."""
        return self.likelihoods - (self.background if np.isfinite(self.background) else 0.0)

    def signals(self, scores: Sequence[float | None]) -> Signals:
        """Return the signals that the query is about one of the images.

        Args:
            scores: (n,) scores of the hits in the recall, at least one.
        """
        odds = sorted(map(log_odds, scores), reverse=True)
        return Signals(
            odds=odds[0],
            lead=odds[0] - odds[1] if len(odds) > 1 else 0.0,
            information=float(self.information.max()) / self.n_words,
            named=float(np.logaddexp.reduce(self.identifier_log_probs)),
        )


@dataclass(frozen=True)
class Inquiry:
    """A request for evidence about some images of an index, for one query.

    prompt: the query; it must have words.
    rows: rows of the images in the index.
    by: "identifier" if the describing prompt contains the identifier of an image, "image" if it shows the image.
    references: rows of the images whose mean estimates log p(query); those also in `rows` are left out.
    """

    index: Index
    prompt: Prompt
    rows: tuple[int, ...]
    by: RerankBy
    references: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt.words:
            raise QueryError(
                "verification scores the words of the query, but this query has none: use it for text queries only."
            )

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(row for row in self.references if row not in self.rows)

    def continuations(self) -> list[Continuation]:
        """Return the query's words after the prompt of each image, then of each reference."""
        rows = (*self.rows, *self._others)
        return [Continuation(describing_prompt(self.index, row, self.by), self.prompt.words) for row in rows]

    def identifier_rows(self, query: int) -> list[Row]:
        """Return the rows that score each identifier after the prompt at position `query`, each prefix once."""
        following: dict[tuple[int, ...], set[int]] = {}
        for prefix, token in chain.from_iterable(self._steps):
            following.setdefault(prefix, set()).add(token)
        return [Row(query, prefix, np.array(sorted(tokens))) for prefix, tokens in following.items()]

    def evidence(self, log_likelihoods: Float64, scores: Sequence[Float64]) -> Evidence:
        """Compute the evidence from the scores of `continuations` and of `identifier_rows`.

        If no references remain, the images of `rows` serve as references.
        """
        likelihoods, others = np.split(log_likelihoods, [len(self.rows)])
        background = others if len(others) else likelihoods
        mean = float(np.logaddexp.reduce(background) - np.log(len(background)))
        log_probs = {
            (row.prefix, token): float(score)
            for row, row_scores in zip(self.identifier_rows(0), scores, strict=True)
            for token, score in zip(row.token_ids.tolist(), row_scores, strict=True)
        }
        identifier_log_probs = np.array([sum(log_probs[step] for step in steps) for steps in self._steps])
        return Evidence(likelihoods, mean, identifier_log_probs, len(self.prompt.words))

    @property
    def _steps(self) -> list[list[tuple[tuple[int, ...], int]]]:
        """Return the (prefix, next token) pairs of each image's identifier."""
        identifiers = [self.index.token_ids(row) for row in self.rows]
        return [[(token_ids[:place], token) for place, token in enumerate(token_ids)] for token_ids in identifiers]


def gather_evidence(scorer: Scorer, inquiries: Sequence[Inquiry]) -> list[Evidence]:
    """Return the evidence of each inquiry. One batch scores all identifiers, another one all likelihoods.

    Raises:
        NotANumber: the model returned NaN or +inf.
    """
    continuations, rows = _batch(inquiries)
    with scorer.session([inquiry.prompt for inquiry in inquiries], Normalise.VOCABULARY) as session:
        return _split(inquiries, session.log_likelihoods(continuations), rows, session.score(rows))


async def agather_evidence(scorer: AsyncScorer, inquiries: Sequence[Inquiry]) -> list[Evidence]:
    """Run `gather_evidence` in an event loop, with both batches at once."""
    continuations, rows = _batch(inquiries)
    async with scorer.async_session([inquiry.prompt for inquiry in inquiries], Normalise.VOCABULARY) as session:
        likelihoods, scores = await asyncio.gather(session.log_likelihoods(continuations), session.score(rows))
    return _split(inquiries, likelihoods, rows, scores)


def _batch(inquiries: Sequence[Inquiry]) -> tuple[list[Continuation], Rows]:
    continuations = [one for inquiry in inquiries for one in inquiry.continuations()]
    rows = [row for query, inquiry in enumerate(inquiries) for row in inquiry.identifier_rows(query)]
    return continuations, Rows.of(rows)


def _split(inquiries: Sequence[Inquiry], likelihoods: Float64, rows: Rows, scores: Scores) -> list[Evidence]:
    evidence, start, first_row = [], 0, 0
    likelihoods = check_likelihoods(likelihoods)
    row_scores = rows.split(np.asarray(check_scores(scores, rows.offsets)))
    for inquiry in inquiries:
        end, end_row = start + len(inquiry.continuations()), first_row + len(inquiry.identifier_rows(0))
        evidence.append(inquiry.evidence(likelihoods[start:end], row_scores[first_row:end_row]))
        start, first_row = end, end_row
    return evidence
