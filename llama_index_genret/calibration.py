"""Whether a score of p is right in a share p of the cases. Knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Bin:
    """The answers whose scores lie in (low, high]; the first bin holds 0 too."""

    low: float
    high: float
    n: int
    mean_score: float
    share_right: float


def reliability(scores: Sequence[float], right: Sequence[bool], *, bins: int = BINS) -> list[Bin]:
    """The bins of a reliability diagram, all of one width; those without an answer are left out.

    Args:
        scores: (n,) in [0, 1], of each answer. right: (n,) whether it is right.
    Source: Guo et al. 2017 (arXiv:1706.04599), section 2.
    """
    score, is_right = np.asarray(scores, np.float64), np.asarray(right, np.float64)
    place = np.clip(np.ceil(score * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for number in np.unique(place).tolist():
        here = place == number
        means = float(score[here].mean()), float(is_right[here].mean())
        found.append(Bin(number / bins, (number + 1) / bins, int(here.sum()), *means))
    return found


def expected_calibration_error(scores: Sequence[float], right: Sequence[bool], *, bins: int = BINS) -> float:
    """Mean distance of a bin's score from its share of right answers, weighted by its answers; 0 is perfect.

    Source: as of `reliability`; defined by Naeini et al. 2015.
    """
    found = reliability(scores, right, bins=bins)
    total = sum(bin.n for bin in found)
    return sum(bin.n * abs(bin.mean_score - bin.share_right) for bin in found) / total if total else 0.0
