"""Compute metrics of ranked results and the calibration of their scores. Depends on numbers and lists of ids only.

A query that has no results, or that failed, counts as a miss. Every query stays in the denominator.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Interval(NamedTuple):
    """The bounds between which a mean over queries lies with the stated confidence."""

    low: float
    high: float


def recall_at(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]], k: int) -> float:
    """Return the share of the queries with an expected id among the first `k` (the field's recall@k, or hit rate)."""
    return _mean(hits_at(ranked, expected, k))


def mean_reciprocal_rank(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]]) -> float:
    """Return the mean of 1 / rank of the first expected id. A missing id counts as 0."""
    return _mean(reciprocal_ranks(ranked, expected))


def ndcg_at(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]], k: int) -> float:
    """Return the normalised discounted cumulative gain at `k` (Järvelin and Kekäläinen 2002).

    Each expected id has gain 1. The ideal ranking has at most `k` right ids. The ideal of LlamaIndex has all right ids,
    so its figure is lower if there are more than `k`.
    """
    return _mean(ndcgs_at(ranked, expected, k))


def hits_at(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]], k: int) -> list[float]:
    """Return per query 1 if an expected id is among the first `k`, else 0. `recall_at` is the mean."""
    return [float(bool(set(ids[:k]) & set(right))) for ids, right in zip(ranked, expected, strict=True)]


def reciprocal_ranks(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]]) -> list[float]:
    """Return the reciprocal rank per query. `mean_reciprocal_rank` is the mean."""
    return [_reciprocal_rank(ids, right) for ids, right in zip(ranked, expected, strict=True)]


def ndcgs_at(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]], k: int) -> list[float]:
    """Return nDCG at `k` per query. `ndcg_at` is the mean."""
    return [_ndcg(ids[:k], right, k) for ids, right in zip(ranked, expected, strict=True)]


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the bootstrap interval of the mean of `values` over the choice of the queries.

        for _ in range(RESAMPLES): draw as many groups as there are, with replacement; take the mean of their values
        the interval holds the middle `level` of these means

    For the differences between two systems per query, this is the paired bootstrap: an interval without 0 means that
    one system is better.

    Args:
        values: (n,) one value per query.
        groups: (n,) group of each query. Queries of one group are drawn together, because queries for the same image
            are not independent. Default: each query is a group.
        level: share of the means in the interval, default 0.95.
        seed: seed of the random draws, default 0.

    Source: the percentile and the cluster bootstrap (Davison and Hinkley 1997, sections 5.3 and 3.8).
    """
    if not len(values):
        return Interval(0.0, 0.0)
    places = {group: place for place, group in enumerate(dict.fromkeys(groups or range(len(values))))}
    group_of_query = np.array([places[group] for group in groups or range(len(values))])
    sums, counts = np.bincount(group_of_query, weights=values), np.bincount(group_of_query)
    draws = np.random.default_rng(seed).multinomial(len(places), np.full(len(places), 1 / len(places)), RESAMPLES)
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def auroc(known: Sequence[float], unknown: Sequence[float]) -> float:
    """Return the share of the (known, unknown) pairs in which the known value is larger. Ties count half.

    This is the area under the ROC curve: true positive rate over false positive rate, for all thresholds. Without
    pairs, it is NaN.
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
    """The results with scores in (low, high]. The first bin also holds 0."""

    low: float
    high: float
    n: int
    mean_score: float
    share_right: float


def reliability(scores: Sequence[float], right: Sequence[bool], *, bins: int = BINS) -> list[Bin]:
    """Return the bins of a reliability diagram, all of equal width. Empty bins are left out.

    Args:
        scores: (n,) in [0, 1], score of each result.
        right: (n,) whether the result is right.
        bins: number of bins, default 10.

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
    """Return the mean distance between the mean score of a bin and its share of right results. 0 is perfect.

    Each bin is weighted by its number of results. The arguments are those of `reliability`.

    Source: Naeini et al. 2015, with the bins of Guo et al. 2017 (arXiv:1706.04599).
    """
    found = reliability(scores, right, bins=bins)
    total = sum(bin.n for bin in found)
    return sum(bin.n * abs(bin.mean_score - bin.share_right) for bin in found) / total if total else 0.0
