"""Metrics equal their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_index_genret.evaluation.metrics import (
    RESAMPLES,
    bootstrap_interval,
    expected_calibration_error,
    mean_reciprocal_rank,
    ndcg_at,
    recall_at,
    reliability,
)

RANKED = [["a", "b", "c"], ["b", "c", "a"], ["c"], []]

EXPECTED = [{"a"}, {"a"}, {"a"}, {"a"}]


def test_metrics_match_a_worked_example():
    assert [recall_at(RANKED, EXPECTED, k) for k in (1, 2, 3)] == [0.25, 0.25, 0.5]
    assert mean_reciprocal_rank(RANKED, EXPECTED) == pytest.approx((1 + 1 / 3) / 4)
    assert ndcg_at(RANKED, EXPECTED, 3) == pytest.approx((1 + 0.5) / 4)
    assert ndcg_at([["x", "a", "b"]], [{"a", "b"}], 3) == pytest.approx((0.63093 + 0.5) / (1 + 0.63093), abs=1e-4)


@given(st.lists(st.permutations(["a", "b", "c", "d"]), min_size=1, max_size=5), st.integers(1, 4))
def test_metrics_lie_in_0_1_and_a_perfect_ranking_has_1(ranked, k):
    expected = [{ids[0]} for ids in ranked]
    assert recall_at(ranked, expected, k) == mean_reciprocal_rank(ranked, expected) == 1.0
    assert ndcg_at(ranked, expected, k) == pytest.approx(1.0)
    assert 0 <= recall_at(ranked, [{"a"}] * len(ranked), k) <= 1


def interval_by_loops(values, groups, level, seed):
    """Define the interval: draw groups, pool their values, take the mean, then the middle of the sorted means."""
    distinct = list(dict.fromkeys(groups))
    counts = np.random.default_rng(seed).multinomial(len(distinct), [1 / len(distinct)] * len(distinct), size=RESAMPLES)
    means = []
    for drawn in counts.tolist():
        pool = [v for v, g in zip(values, groups, strict=True) for _ in range(drawn[distinct.index(g)])]
        means.append(sum(pool) / len(pool))
    means.sort()

    def quantile(share):
        place = share * (len(means) - 1)
        below = int(place)
        above = min(below + 1, len(means) - 1)
        return means[below] + (place - below) * (means[above] - means[below])

    return quantile((1 - level) / 2), quantile((1 + level) / 2)


@pytest.mark.parametrize(("level", "seed"), [(0.95, 0), (0.5, 3)])
def test_bootstrap_interval_equals_its_definition(level, seed):
    rng = np.random.default_rng(seed)
    values, groups = rng.normal(size=23).tolist(), rng.choice(list("abcdefgh"), size=23).tolist()
    assert bootstrap_interval(values, groups, level=level, seed=seed) == pytest.approx(
        interval_by_loops(values, groups, level, seed)
    )
    alone = interval_by_loops(values, range(23), level, seed)
    assert bootstrap_interval(values, level=level, seed=seed) == pytest.approx(alone)


def test_interval_matches_normal_and_ignores_repeated_queries():
    values = [1.0] * 120 + [0.0] * 280
    low, high = bootstrap_interval(values)
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.006)
    again = bootstrap_interval([v for v in values for _ in range(4)], [i for i in range(400) for _ in range(4)])
    assert again == pytest.approx((low, high))
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    assert bootstrap_interval([]) == (0.0, 0.0)


ANSWERS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


def calibration_by_loops(answers, bins=10):
    """Define the calibration error, bin by bin."""
    error = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        here = [(score, right) for score, right in answers if low < score <= high or (score == 0 == number)]
        if here:
            mean = sum(score for score, _ in here) / len(here)
            error += len(here) / len(answers) * abs(mean - sum(right for _, right in here) / len(here))
    return error


@given(ANSWERS)
def test_calibration_error_equals_its_definition(answers):
    answers = [
        (round(score, 3), right) for score, right in answers if not (1000 * score) % 100 < 1
    ]  # no score on the edge of a bin
    scores, right = [score for score, _ in answers], [is_right for _, is_right in answers]
    assert expected_calibration_error(scores, right) == pytest.approx(calibration_by_loops(answers) if answers else 0)
    assert sum(bin.n for bin in reliability(scores, right)) == len(answers)


def test_calibrated_scores_have_no_calibration_error():
    assert expected_calibration_error([0.8] * 5, [True] * 4 + [False]) == pytest.approx(0)
    assert expected_calibration_error([1.0] * 5, [True] * 4 + [False]) == pytest.approx(0.2)
    (low, high) = reliability([0.0, 1.0], [False, True])
    assert (low.low, low.high, high.low, high.high) == (0.0, 0.1, 0.9, 1.0)
    (edge,) = reliability([0.5], [True])
    assert (edge.low, edge.high) == (0.4, 0.5)
