"""Figures of ranked results. Knows lists of ids only.

A query without an answer, or whose answer failed, counts as a miss: nothing leaves the denominator.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def recall_at(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]], k: int) -> float:
    """Share of the queries with at least one expected id among the first `k` (the field's recall@k, or hit rate)."""
    return _mean([bool(set(ids[:k]) & set(right)) for ids, right in zip(ranked, expected, strict=True)])


def mean_reciprocal_rank(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]]) -> float:
    """Mean of 1 / place of the first expected id, 0 where it is missing."""
    return _mean([_reciprocal_rank(ids, right) for ids, right in zip(ranked, expected, strict=True)])


def ndcg_at(ranked: Sequence[Sequence[str]], expected: Sequence[Collection[str]], k: int) -> float:
    """Normalised discounted cumulative gain at `k`, each expected id worth one (Järvelin and Kekäläinen 2002)."""
    return _mean([_ndcg(ids[:k], right, k) for ids, right in zip(ranked, expected, strict=True)])


def _reciprocal_rank(ids: Sequence[str], right: Collection[str]) -> float:
    return next((1.0 / place for place, image_id in enumerate(ids, start=1) if image_id in right), 0.0)


def _ndcg(ids: Sequence[str], right: Collection[str], k: int) -> float:
    gains = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = float(gains[: len(set(right))].sum())
    return float(sum(gains[i] for i, image_id in enumerate(ids) if image_id in right)) / ideal if ideal else 0.0


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
