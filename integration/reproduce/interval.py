"""How far a mean over queries may be off by the choice of the images alone: a bootstrap interval.

Knows numbers only. Whole images are drawn, each with all of its captions: these are not independent queries.
Source: the cluster bootstrap (Davison and Hinkley 1997, section 3.8).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 1000


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[Hashable], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentiles of the mean of `values` over RESAMPLES draws of whole groups, with replacement.

    Args:
        values: (n,) one a query. groups: (n,) the image of each.
    """
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    of_query = np.array([places[group] for group in groups])
    sums, counts = np.bincount(of_query, weights=values), np.bincount(of_query)
    draws = np.random.default_rng(seed).multinomial(len(places), np.full(len(places), 1 / len(places)), RESAMPLES)
    means = (draws @ sums) / (draws @ counts)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
