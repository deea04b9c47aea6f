"""Rerank the best hits of a search by log p(query | image), the probability of the query given each image.

The model scores the words of the query after a prompt with either the image or its identifier.
`with_scoring` and `reranking` turn the `Scoring` of an index into the arguments of `recall`.

Depends on the index; independent of models: `scorers.base` queries the session in between.
Source: reverse re-ranking of TIGeR (arXiv:2406.05814), with the model's own describe and answer prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import NotANumber, QueryError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.search import Hit, Ranking, SearchOptions
from llama_index_genret.store import Index, Scoring
from llama_index_genret.store.scoring import RerankBy

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Continuation:
    """A prompt, and the tokens whose probability after it a session scores; at least one token."""

    prompt: Prompt
    token_ids: tuple[int, ...]

    @property
    def whole(self) -> Prompt:
        """Return the prompt with the tokens appended."""
        prompt = self.prompt
        rest = (*prompt.rest, *self.token_ids) if prompt.image is not None else ()
        return replace(prompt, token_ids=(*prompt.token_ids, *self.token_ids), rest=rest)


@dataclass(frozen=True)
class Rerank:
    """A re-ranking: it adds weight * (log p(query | image) - log p(query)) to the ranking value of each hit.

    p(query) is estimated as the mean over the candidates of the query. It is the same for all of them, so it does not
    change their order. It makes the scores of different queries comparable.

    candidates: number of hits of a query that are re-ranked; a driver raises it to the number of results.
    weight: factor of the added term.
    prompt_of: returns the prompt that contains the identifier of a hit, or its image.
    """

    candidates: int
    weight: float
    prompt_of: Callable[[Hit], Prompt]

    def continuations(self, prompts: Sequence[Prompt], rankings: Sequence[Ranking]) -> list[Continuation]:
        """Return what a session must score: one continuation for each hit, query after query.

        Raises:
            QueryError: a query has no words.
        """
        if any(not prompt.words for prompt in prompts):
            raise QueryError(
                "re-ranking scores the words of the query, but a query has none: use it for text queries only."
            )
        pairs = [(prompt, hit) for prompt, ranking in zip(prompts, rankings, strict=True) for hit in ranking.hits]
        return [Continuation(self.prompt_of(hit), prompt.words) for prompt, hit in pairs]

    def apply(self, rankings: Sequence[Ranking], log_likelihoods: Float64, k: int) -> list[Ranking]:
        """Return the best `k` hits of each query. Hits with equal values keep the order of the search.

        Args:
            log_likelihoods: (n,) natural logarithms, one for each of `continuations`.
        Raises:
            NotANumber: a log-likelihood is NaN or +inf.
        """
        log_likelihoods = check_likelihoods(log_likelihoods)
        ends = np.cumsum([len(ranking.hits) for ranking in rankings])
        each = np.split(log_likelihoods, ends[:-1])
        return [
            replace(ranking, hits=rescore(ranking.hits, values, self.weight)[:k])
            for ranking, values in zip(rankings, each, strict=True)
        ]


def check_likelihoods(log_likelihoods: Float64) -> Float64:
    """Return the log-likelihoods of a session unchanged.

    Raises:
        NotANumber: a log-likelihood is NaN or +inf.
    """
    if not (log_likelihoods < np.inf).all():
        raise NotANumber(
            "the model returned NaN or +inf as the log-probability of a query. The weights are damaged, or the dtype "
            "overflows: load the checkpoint again, or use float32."
        )
    return log_likelihoods


def rescore(hits: Sequence[Hit], log_likelihoods: Float64, weight: float) -> tuple[Hit, ...]:
    """Return the hits of one query in their new order.

    Args:
        log_likelihoods: (n,) log p(query | image) of each hit, natural logarithms.
        weight: factor of the log-likelihoods.
    """
    if not hits:
        return ()
    if not weight:  # 0 * -inf would be NaN
        log_likelihoods = np.zeros(len(hits))
    before = np.array([hit.log_prob if hit.ranked_by is None else hit.ranked_by for hit in hits])
    mean = np.logaddexp.reduce(log_likelihoods) - np.log(len(hits))
    ranked_by = before + weight * (log_likelihoods - (mean if np.isfinite(mean) else 0.0))
    order = np.argsort(-ranked_by, kind="stable")
    return tuple(hits[row]._replace(ranked_by=float(ranked_by[row])) for row in order)


def describing_prompt(index: Index, row: int, by: RerankBy) -> Prompt:
    """Return the prompt after which the model describes the image of a record.

    Args:
        row: row of the record in the index.
        by: "identifier" if the prompt contains the identifier of the image, "image" if it shows the image.
    """
    if by == "image":
        return index.prompts.for_caption(index.tokenizer, index.records[row].path)
    return index.prompts.for_identifier(index.tokenizer, index.token_ids(row))


def with_scoring(options: SearchOptions, index: Index, scoring: Scoring) -> SearchOptions:
    """Return the options with the `eta` of the scoring, and the index's prior unless `eta` is 0.

    Raises:
        SearchError: the index has no prior.
    """
    return replace(options, prior=index.prior if scoring.eta else None, eta=scoring.eta)


def reranking(index: Index, scoring: Scoring) -> Rerank | None:
    """Return the re-ranking of the scoring, or None if it re-ranks no hits."""

    def prompt_of(hit: Hit) -> Prompt:
        return describing_prompt(index, hit.key, scoring.rerank_by)

    return Rerank(scoring.rerank, scoring.rerank_weight, prompt_of) if scoring.rerank else None
