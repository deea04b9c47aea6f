"""Options that rank hits beyond log p(id | query), set by the user or tuned on a validation set.

Depends on numbers only; independent of the search and of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from llama_index_genret.errors import SearchError

RerankBy = Literal["identifier", "image"]

DEFAULT_MODEL_WEIGHT = 0.5

DEFAULT_TEMPERATURE = 0.05

MIN_TEMPERATURE = 0.005
"""Below it the least probable of all images would have a probability of 0 in float64."""


@dataclass(frozen=True)
class Scoring:
    """Rank images by log p(id | query) - eta * log p(id) [+ rerank_weight * log p(query | image)].

    model_weight: weight of the trained model in log p(id | query), from 0 to 1; the rest is the encoder's. 1 is the
        generative model alone. An index without an encoder, or without trained weights, uses the other one alone.
    temperature: temperature of the encoder's p(image | query), the softmax of cosine / temperature.
    eta: weight of the prior, 0 for no prior.
    rerank: number of best hits to re-rank, 0 for none; at least the number of requested results is re-ranked.
    rerank_weight: weight of log p(query | image).
    rerank_by: "identifier" conditions the model on the image's identifier, which is cheap; "image" on the image itself.
    Raises:
        SearchError: a number is negative or not finite, or `rerank_by` has another value.
    """

    model_weight: float = DEFAULT_MODEL_WEIGHT
    temperature: float = DEFAULT_TEMPERATURE
    eta: float = 0.0
    rerank: int = 0
    rerank_weight: float = 1.0
    rerank_by: RerankBy = "identifier"

    def __post_init__(self) -> None:
        if not 0.0 <= self.model_weight <= 1.0:
            raise SearchError(f"model_weight={self.model_weight} must be from 0 to 1.")
        if not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise SearchError(f"temperature={self.temperature} must be at least {MIN_TEMPERATURE}, and finite.")
        for name in ("eta", "rerank", "rerank_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SearchError(f"{name} must be finite and at least 0, got {getattr(self, name)}.")
        if self.rerank_by not in get_args(RerankBy):
            raise SearchError(f"unknown rerank_by {self.rerank_by!r}; choose from: {', '.join(get_args(RerankBy))}.")

    def __str__(self) -> str:
        blend = f"model weight {self.model_weight:g}, temperature {self.temperature:g}"
        reranked = f"best {self.rerank} re-ranked by {self.rerank_by}, weight {self.rerank_weight:g}"
        return f"{blend}, eta {self.eta:g}, {reranked if self.rerank else 'no re-ranking'}"


@dataclass(frozen=True)
class ScoringChoice:
    """The user's choice of `Scoring` fields. None takes the index's value."""

    model_weight: float | None = None
    temperature: float | None = None
    eta: float | None = None
    rerank: int | None = None
    rerank_weight: float | None = None
    rerank_by: RerankBy | None = None

    def over(self, default: Scoring) -> Scoring:
        """Return `default` with the chosen fields replaced."""
        return replace(default, **{name: value for name, value in vars(self).items() if value is not None})


class TunedScoring(BaseModel):
    """The scoring that `genret tune` chose. queries: number of validation queries, 0 if it only computed the prior."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scoring: Scoring
    queries: int
