"""Thresholds and fitted weights: against counting, and against a minimum found by small steps."""

import numpy as np
import pytest

from llama_index_genret.errors import QueryError
from llama_index_genret.evaluation.metrics import auroc
from llama_index_genret.scorers.abstention import PENALTY, Abstention, Signals, fit_abstention


def drawn(n, shift, seed):
    rng = np.random.default_rng(seed)
    return [Signals(*row) for row in (rng.normal(size=(n, 4)) * (1, 3, 0.1, 9) + np.array(shift)).tolist()]


@pytest.mark.parametrize("lost", [0.0, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("n", [1, 19, 20, 300])
def test_no_more_known_queries_are_lost_than_allowed_and_a_higher_threshold_would_lose_more(n, lost):
    """Whole numbers: many are equal."""
    known = [Signals(value, 0.0, 0.0, 0.0) for value in np.random.default_rng(n).integers(-5, 6, n).tolist()]
    chosen = fit_abstention(known, lost=lost, signals=("odds",))
    assert sum(map(chosen.abstains, known)) <= lost * len(known)
    above = chosen.model_copy(update={"threshold": np.nextafter(chosen.threshold, 2)})
    assert sum(map(above.abstains, known)) > lost * len(known)


def test_the_weights_are_those_of_the_least_penalised_loss():
    """Both kinds in equal shares, however many there are of each."""
    known, unknown = drawn(60, (1, 0, 0.1, 0), 0), drawn(20, (0, 0, 0, 9), 1)
    chosen = fit_abstention(known, unknown)
    table = np.array([*known, *unknown])

    def loss(weights, bias):
        log_odds = table @ weights + bias
        each = np.r_[np.logaddexp(0, -log_odds[:60]) * 40 / 60, np.logaddexp(0, log_odds[60:]) * 40 / 20]
        return each.sum() + PENALTY / 2 * ((weights * table.std(0)) ** 2).sum()

    weights = np.array([chosen.weights[name] for name in Signals._fields])
    least = loss(weights, chosen.bias)
    for step in (1e-3, -1e-3):
        for place, width in enumerate(table.std(0)):
            assert loss(weights + step / width * np.eye(4)[place], chosen.bias) > least
        assert loss(weights, chosen.bias + step) > least


def test_confidence_tells_both_kinds_apart_and_survives_json():
    chosen = fit_abstention(drawn(200, (2, 0, 0.2, 0), 0), drawn(200, (0, 0, 0, 0), 1), lost=0.1)
    chosen = Abstention.model_validate_json(chosen.model_dump_json())
    known, unknown = drawn(200, (2, 0, 0.2, 0), 2), drawn(200, (0, 0, 0, 0), 3)
    assert 0.04 < np.mean([chosen.abstains(one) for one in known]) < 0.18
    assert np.mean([chosen.abstains(one) for one in unknown]) > 0.6
    assert all(0 <= chosen.confidence(one) <= 1 for one in known + unknown)


def test_signals_that_never_change_do_no_harm():
    same = [signals._replace(lead=0.0) for signals in drawn(30, (1, 0, 0, 0), 0)]
    assert fit_abstention(same, [s._replace(odds=-s.odds) for s in same]).weights["lead"] == 0.0


@pytest.mark.parametrize(("known", "lost"), [(0, 0.05), (5, 1.0), (5, -0.1)])
def test_a_threshold_needs_known_queries_and_a_share(known, lost):
    with pytest.raises(QueryError, match="threshold"):
        fit_abstention(drawn(known, 0, 0), lost=lost)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_pairs_in_the_right_order(seed):
    known, unknown = (np.random.default_rng((seed, n)).integers(-5, 6, n) for n in (20, 31))
    pairs = [(a > b) + (a == b) / 2 for a in known for b in unknown]
    assert auroc(known, unknown) == pytest.approx(np.mean(pairs))
