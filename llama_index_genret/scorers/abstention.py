"""Decide that no image matches a query: the confidence of a recall, and the threshold that it must reach.

The threshold is fitted on validation queries about images of the index (known). Queries about no image of the index
(unknown) are optional.

Depends on numbers; independent of models and LlamaIndex.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from llama_index_genret.errors import QueryError

Float64 = NDArray[np.float64]

PENALTY = 1.0
"""Factor of the squared weights of standardised signals; redundant signals then share their weight."""

NEWTON_STEPS = 50


class Signals(NamedTuple):
    """Signals that the image of one query was recalled. Natural logarithms; larger means more confident.

    odds: log p / (1 - p) of the first image's score.
    lead: odds of the first image less odds of the second.
    information: the largest log p(query | image) - log p(query), divided by the number of query tokens.
    named: log of the total probability of the recalled identifiers, over the whole vocabulary.
    """

    odds: float
    lead: float
    information: float
    named: float


DEFAULT_SIGNALS = ("odds", "lead", "information", "named")


class Abstention(BaseModel):
    """A rule that rejects all images of a recall whose confidence is below `threshold`.

    confidence = logistic(bias + weights * signals), in (0, 1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: dict[str, float]
    bias: float = 0.0
    threshold: float = 0.0

    def confidence(self, signals: Signals) -> float:
        """Return the confidence in (0, 1).

        If the weights were fitted with unknown queries, this is the probability that the query is known, for equal
        shares of known and unknown queries.
        """
        total = self.bias + sum(weight * getattr(signals, name) for name, weight in self.weights.items())
        return logistic(total)

    def abstains(self, signals: Signals) -> bool:
        """Return True if no image should be returned."""
        return self.confidence(signals) < self.threshold


def fit_abstention(
    known: Sequence[Signals],
    unknown: Sequence[Signals] = (),
    *,
    lost: float = 0.05,
    signals: Sequence[str] = DEFAULT_SIGNALS,
) -> Abstention:
    """Fit the threshold below which at most a share `lost` of the known queries fall.

    Args:
        known: signals of queries about images of the index; these queries must not be in the training data.
        unknown: signals of queries about no image of the index. With them, logistic regression weights the signals
            (both kinds count equally). Without them, the confidence uses only the first of `signals`.
        lost: share of the known queries that may be rejected, in [0, 1), default 0.05.
        signals: names of the signals to use, default all.
    Raises:
        QueryError: there are no known queries, or `lost` is not in [0, 1).
    """
    if not known or not 0 <= lost < 1:
        raise QueryError(
            f"a threshold needs at least one known query and lost in [0, 1), got {len(known)} known queries and "
            f"lost={lost}."
        )
    fitted = Abstention(weights={signals[0]: 1.0}) if not unknown else _fit(known, unknown, signals)
    confidences = sorted(fitted.confidence(one) for one in known)
    return fitted.model_copy(update={"threshold": confidences[math.floor(lost * len(confidences))]})


def _fit(known: Sequence[Signals], unknown: Sequence[Signals], names: Sequence[str]) -> Abstention:
    """Fit a penalised logistic regression by Newton's method."""
    table = np.array([[getattr(one, name) for name in names] for one in (*known, *unknown)])
    mean, deviation = table.mean(0), table.std(0)
    deviation[deviation == 0] = 1.0
    inputs = np.c_[(table - mean) / deviation, np.ones(len(table))]
    right = np.r_[np.ones(len(known)), np.zeros(len(unknown))]
    share = np.r_[np.full(len(known), 0.5 / len(known)), np.full(len(unknown), 0.5 / len(unknown))] * len(table)
    penalty = np.diag([*[PENALTY] * len(names), 1e-6])
    weights = np.zeros(len(names) + 1)
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-inputs @ weights))
        slope = inputs.T @ (share * (p - right)) + penalty @ weights
        curvature = (inputs * (share * p * (1 - p))[:, None]).T @ inputs + penalty
        weights = weights - np.linalg.solve(curvature, slope)
    raw = weights[:-1] / deviation
    return Abstention(weights=dict(zip(names, raw.tolist(), strict=True)), bias=float(weights[-1] - raw @ mean))


def log_odds(score: float | None) -> float:
    """Return log p / (1 - p) of a score clipped into (0, 1), or 0 (even odds) for None."""
    if score is None:
        return 0.0
    p = min(max(score, sys.float_info.min), 1 - sys.float_info.epsilon)
    return math.log(p) - math.log1p(-p)


def logistic(log_odds: float) -> float:
    """Return the probability of log-odds, at least the smallest normal float."""
    odds = math.exp(-abs(log_odds))
    return max((1.0 if log_odds > 0 else odds) / (1.0 + odds), sys.float_info.min)
