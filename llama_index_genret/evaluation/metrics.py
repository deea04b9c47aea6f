"""Metrics of ranked results, and the calibration of their scores. Depends on numbers and lists of ids only.

A query without an answer, or whose answer failed, counts as a miss: nothing leaves the denominator.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Interval(NamedTuple):
    """Between which values a mean over queries lies with the stated confidence."""

    low: float
    high: float


def recall_at(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]], k: int) -> float:
    """Share of the queries with at least one expected id among the first `k` (the field's recall@k, or hit rate)."""
    return _mean(hits_at(ranked, expected, k))


def mean_reciprocal_rank(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]]) -> float:
    """Mean of 1 / place of the first expected id, 0 where it is missing."""
    return _mean(reciprocal_ranks(ranked, expected))


def ndcg_at(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]], k: int) -> float:
    """Normalised discounted cumulative gain at `k`, each expected id worth one (Järvelin and Kekäläinen 2002).

    The best possible has `k` right ids at most: LlamaIndex's own figure has all, and is lower where they are more.
    """
    return _mean(ndcgs_at(ranked, expected, k))


def hits_at(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]], k: int) -> list[float]:
    """Of each query: 1 where an expected id is among the first `k`, else 0. Their mean is `recall_at`."""
    return [float(bool(set(ids[:k]) & set(right))) for ids, right in zip(ranked, expected, strict=True)]


def reciprocal_ranks(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]]) -> list[float]:
    """Of each query: what `mean_reciprocal_rank` is the mean of."""
    return [_reciprocal_rank(ids, right) for ids, right in zip(ranked, expected, strict=True)]


def ndcgs_at(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]], k: int) -> list[float]:
    """Of each query: what `ndcg_at` is the mean of."""
    return [_ndcg(ids[:k], right, k) for ids, right in zip(ranked, expected, strict=True)]


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, *, level: float = 0.95, seed: int = 0
) -> Interval:
    """How far the mean of `values` may be off by the choice of the queries alone.

        for _ in range(RESAMPLES): draw as many groups as there are, with replacement; take the mean of their values
        the interval holds the middle `level` of these means

    Of the differences between two systems, query by query, it is the paired bootstrap: it tells whether one is better.

    Args:
        values: (n,) one a query.
        groups: (n,) queries of one group are drawn together, such as those that ask for the same image: they are not
            independent. Each query by itself, if not given.
    Source: the percentile and the cluster bootstrap (Davison and Hinkley 1997, sections 5.3 and 3.8).
    """
    if not len(values):
        return Interval(0.0, 0.0)
    places = {group: place for place, group in enumerate(dict.fromkeys(groups or range(len(values))))}
    of_query = np.array([places[group] for group in groups or range(len(values))])
    sums, counts = np.bincount(of_query, weights=values), np.bincount(of_query)
    draws = np.random.default_rng(seed).multinomial(len(places), np.full(len(places), 1 / len(places)), RESAMPLES)
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def auroc(known: Sequence[float], unknown: Sequence[float]) -> float:
    """Share of the pairs of a known and an unknown in which the known has the larger value; ties count half.

    The area under the curve of wrongly answered against rightly answered, over all thresholds. NaN without pairs.
    """
    if not len(known) or not len(unknown):
        return float("nan")
    ordered = np.sort(np.asarray(unknown, np.float64))
    below = np.searchsorted(ordered, known, "left") + np.searchsorted(ordered, known, "right")
    return float(below.mean() / (2 * len(ordered)))


def _reciprocal_rank(ids: Sequence[str], right: Collection[str]) -> float:
    return next((1.0 / place for place, image_id in enumerate(ids, start=1) if image_id in right), 0.0)


def _ndcg(ids: Sequence[str], right: Collection[str], k: int) -> float:
    gains = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = float(gains[: len(set(right))].sum())
    return float(sum(gains[i] for i, image_id in enumerate(ids) if image_id in right)) / ideal if ideal else 0.0


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


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
