"""Rerank the best hits of a search by log p(query | image), the probability of the query given each image.

The model scores the words of the query after a prompt that either names the image by its identifier or shows it.
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
    """A prompt, and the tokens whose probability after it is asked for; one at least."""

    prompt: Prompt
    token_ids: tuple[int, ...]

    @property
    def whole(self) -> Prompt:
        """The prompt with the tokens at its end."""
        prompt = self.prompt
        rest = (*prompt.rest, *self.token_ids) if prompt.image is not None else ()
        return replace(prompt, token_ids=(*prompt.token_ids, *self.token_ids), rest=rest)


@dataclass(frozen=True)
class Rerank:
    """How hits are ranked anew: by what they were ranked by + weight * (log p(query | image) - log p(query)).

    p(query) is estimated as the mean over the query's candidates. It is the same for all of them, and only makes the
    scores of different queries comparable.

    candidates: hits of a query that are looked at; never less than the results wanted.
    prompt_of: the prompt that names or shows a hit's image.
    """

    candidates: int
    weight: float
    prompt_of: Callable[[Hit], Prompt]

    def asked(self, prompts: Sequence[Prompt], rankings: Sequence[Ranking]) -> list[Continuation]:
        """What a session must score: one for each hit, all hits of one query after those of another.

        Raises:
            QueryError: a query has no words of its own.
        """
        if any(not prompt.words for prompt in prompts):
            raise QueryError("re-ranking asks how probable the query's words are: it takes text queries only.")
        pairs = [(prompt, hit) for prompt, ranking in zip(prompts, rankings, strict=True) for hit in ranking.hits]
        return [Continuation(self.prompt_of(hit), prompt.words) for prompt, hit in pairs]

    def ranked(self, rankings: Sequence[Ranking], log_likelihoods: Float64, k: int) -> list[Ranking]:
        """The best `k` of each; equal ones stay in the order of the search.

        Raises:
            NotANumber: a log-likelihood is.
        """
        log_likelihoods = checked_likelihoods(log_likelihoods)
        ends = np.cumsum([len(ranking.hits) for ranking in rankings])
        each = np.split(log_likelihoods, ends[:-1])
        return [
            replace(ranking, hits=rescored(ranking.hits, values, self.weight)[:k])
            for ranking, values in zip(rankings, each, strict=True)
        ]


def checked_likelihoods(log_likelihoods: Float64) -> Float64:
    """What a session answered.

    Raises:
        NotANumber: it holds NaN or +inf.
    """
    if not (log_likelihoods < np.inf).all():
        raise NotANumber(
            "the model answered NaN or +inf as the log-probability of a query: its weights are damaged, or its dtype "
            "overflows."
        )
    return log_likelihoods


def rescored(hits: Sequence[Hit], log_likelihoods: Float64, weight: float) -> tuple[Hit, ...]:
    """The hits of one query in their new order. log_likelihoods: (n,) log p(query | image) of each."""
    if not hits:
        return ()
    if not weight:  # which makes nothing of a probability of zero
        log_likelihoods = np.zeros(len(hits))
    before = np.array([hit.log_prob if hit.ranked_by is None else hit.ranked_by for hit in hits])
    mean = np.logaddexp.reduce(log_likelihoods) - np.log(len(hits))
    ranked_by = before + weight * (log_likelihoods - (mean if np.isfinite(mean) else 0.0))
    order = np.argsort(-ranked_by, kind="stable")
    return tuple(hits[row]._replace(ranked_by=float(ranked_by[row])) for row in order)


def describing_prompt(index: Index, row: int, by: RerankBy) -> Prompt:
    """Return the prompt after which the model describes the image of a record.

    Args:
        by: whether the prompt names the image by its "identifier" or shows the "image" itself.
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
    """Return the re-ranking of the scoring, None where it re-ranks no hits."""

    def prompt_of(hit: Hit) -> Prompt:
        return describing_prompt(index, hit.key, scoring.rerank_by)

    return Rerank(scoring.rerank, scoring.rerank_weight, prompt_of) if scoring.rerank else None
