"""How found images are ranked beyond log p(id | query), and what of it was chosen on a validation split.

Knows numbers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from llama_index_genret.errors import SearchError

RerankBy = Literal["identifier", "image"]


@dataclass(frozen=True)
class Scoring:
    """Images are ranked by log p(id | query) - eta * log p(id) [+ rerank_weight * log p(query | image)].

    eta: 0 for no prior.
    rerank: how many of the best are ranked anew, 0 for none; never fewer than the results wanted.
    rerank_by: whether the model is told the image by its "identifier", which is cheap, or shown the "image" itself.
    Raises:
        SearchError: a number is negative or not finite, or `rerank_by` is neither.
    """

    eta: float = 0.0
    rerank: int = 0
    rerank_weight: float = 1.0
    rerank_by: RerankBy = "identifier"

    def __post_init__(self) -> None:
        for name in ("eta", "rerank", "rerank_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SearchError(f"{name}={getattr(self, name)} must be at least 0, and finite.")
        if self.rerank_by not in get_args(RerankBy):
            raise SearchError(f"rerank_by={self.rerank_by!r} is one of {', '.join(get_args(RerankBy))}.")

    def __str__(self) -> str:
        anew = f"the best {self.rerank} anew by {self.rerank_by}, weight {self.rerank_weight:g}"
        return f"eta {self.eta:g}, {anew if self.rerank else 'none ranked anew'}"


@dataclass(frozen=True)
class ScoringChoice:
    """What a user says of a `Scoring`; None leaves it to the index."""

    eta: float | None = None
    rerank: int | None = None
    rerank_weight: float | None = None
    rerank_by: RerankBy | None = None

    def over(self, default: Scoring) -> Scoring:
        """The choice where there is one, else the default."""
        return replace(default, **{name: value for name, value in vars(self).items() if value is not None})


class TunedScoring(BaseModel):
    """What `genret tune` chose on `queries` validation queries; none where it only computed the prior."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scoring: Scoring
    queries: int
