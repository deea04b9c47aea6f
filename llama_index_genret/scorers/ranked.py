"""From a `Scoring` to what `recall` takes of it.

Knows the index; nothing of models.
"""

from __future__ import annotations

from functools import partial
from typing import TypedDict

from llama_index_genret.scorers.rerank import Rerank
from llama_index_genret.store import Index, Scoring
from llama_index_genret.trie import TriePrior


class RankingOptions(TypedDict):
    """Arguments of `recall` and `arecall`."""

    prior: TriePrior | None
    eta: float
    rerank: Rerank | None


def ranking_options(index: Index, scoring: Scoring) -> RankingOptions:
    """The arguments with which `recall` ranks so; without a prior where `eta` is 0."""
    told = partial(index.describing_prompt, by=scoring.rerank_by)
    return {
        "prior": index.prior if scoring.eta else None,
        "eta": scoring.eta,
        "rerank": Rerank(scoring.rerank, scoring.rerank_weight, told) if scoring.rerank else None,
    }
