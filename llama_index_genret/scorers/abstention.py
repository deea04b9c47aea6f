"""When no image is the right answer: one number for how sure a recall is, and the threshold that it must reach.

Chosen on validation queries: some about images of the index, and, where there are any, some about nothing in it.

Knows numbers; nothing of models or LlamaIndex.
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
"""Of the squared weights of standardised signals: two that say the same share their weight."""

NEWTON_STEPS = 50


class Signals(NamedTuple):
    """What tells of one query whether its image was recalled. Natural logarithms; larger is surer.

    odds: log p / (1 - p) of the first image's score. lead: by how much it is ahead of the second's.
    information: the largest log p(query | image) - log p(query), for each token of the query.
    named: log of what the recalled identifiers have together of the whole vocabulary's probability.
    """

    odds: float
    lead: float
    information: float
    named: float


DEFAULT_SIGNALS = ("odds", "lead", "information", "named")


class Abstention(BaseModel):
    """A recall is answered with no image where its confidence is below `threshold`.

    confidence = logistic(bias + weights * signals), in (0, 1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: dict[str, float]
    bias: float = 0.0
    threshold: float = 0.0

    def confidence(self, signals: Signals) -> float:
        """In (0, 1): where it was fitted with both kinds of queries in equal shares, the chance that it is a known."""
        total = self.bias + sum(weight * getattr(signals, name) for name, weight in self.weights.items())
        return logistic(total)

    def abstains(self, signals: Signals) -> bool:
        """Whether no image is the answer."""
        return self.confidence(signals) < self.threshold


def fit_abstention(
    known: Sequence[Signals],
    unknown: Sequence[Signals] = (),
    *,
    lost: float = 0.05,
    signals: Sequence[str] = DEFAULT_SIGNALS,
) -> Abstention:
    """The threshold below which at most a share `lost` of the known queries fall.

    Args:
        known: of queries about images of the index; held out, as those who will ask are.
        unknown: of queries about nothing in it. With them, logistic regression weighs the signals (with both kinds
            in equal shares); without, the first of `signals` alone is taken.
    Raises:
        QueryError: there are no known queries, or `lost` is not in [0, 1).
    """
    if not known or not 0 <= lost < 1:
        raise QueryError(f"{len(known)} known queries and lost={lost}: a threshold needs some, and lost in [0, 1).")
    chosen = Abstention(weights={signals[0]: 1.0}) if not unknown else _fitted(known, unknown, signals)
    confidences = sorted(chosen.confidence(one) for one in known)
    return chosen.model_copy(update={"threshold": confidences[math.floor(lost * len(confidences))]})


def _fitted(known: Sequence[Signals], unknown: Sequence[Signals], names: Sequence[str]) -> Abstention:
    """Penalised logistic regression by Newton's method."""
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
    """log p / (1 - p) of a score, one outside (0, 1) taken as the nearest inside; of none, 0: even odds."""
    if score is None:
        return 0.0
    p = min(max(score, sys.float_info.min), 1 - sys.float_info.epsilon)
    return math.log(p) - math.log1p(-p)


def logistic(log_odds: float) -> float:
    """The probability of log-odds; too small for a float, the smallest normal float."""
    odds = math.exp(-abs(log_odds))
    return max((1.0 if log_odds > 0 else odds) / (1.0 + odds), sys.float_info.min)
