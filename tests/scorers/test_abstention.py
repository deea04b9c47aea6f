"""Test thresholds against counting, and fitted weights against small steps around the minimum."""

import numpy as np
import pytest

from llama_index_genret.errors import QueryError
from llama_index_genret.evaluation.metrics import auroc
from llama_index_genret.scorers.abstention import PENALTY, Abstention, Signals, fit_abstention


def random_signals(n, shift, seed):
    rng = np.random.default_rng(seed)
    return [Signals(*row) for row in (rng.normal(size=(n, 4)) * (1, 3, 0.1, 9) + np.array(shift)).tolist()]


@pytest.mark.parametrize("lost", [0.0, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("n", [1, 19, 20, 300])
def test_threshold_is_the_highest_that_keeps_the_allowed_share(n, lost):
    """Integer signals give many ties."""
    known = [Signals(value, 0.0, 0.0, 0.0) for value in np.random.default_rng(n).integers(-5, 6, n).tolist()]
    fitted = fit_abstention(known, lost=lost, signals=("odds",))
    assert sum(map(fitted.abstains, known)) <= lost * len(known)
    above = fitted.model_copy(update={"threshold": np.nextafter(fitted.threshold, 2)})
    assert sum(map(above.abstains, known)) > lost * len(known)


def test_fitted_weights_minimise_the_penalised_loss():
    """Known and unknown queries count equally, whatever their numbers."""
    known, unknown = random_signals(60, (1, 0, 0.1, 0), 0), random_signals(20, (0, 0, 0, 9), 1)
    fitted = fit_abstention(known, unknown)
    table = np.array([*known, *unknown])

    def loss(weights, bias):
        log_odds = table @ weights + bias
        each = np.r_[np.logaddexp(0, -log_odds[:60]) * 40 / 60, np.logaddexp(0, log_odds[60:]) * 40 / 20]
        return each.sum() + PENALTY / 2 * ((weights * table.std(0)) ** 2).sum()

    weights = np.array([fitted.weights[name] for name in Signals._fields])
    least = loss(weights, fitted.bias)
    for step in (1e-3, -1e-3):
        for place, width in enumerate(table.std(0)):
            assert loss(weights + step / width * np.eye(4)[place], fitted.bias) > least
        assert loss(weights, fitted.bias + step) > least


def test_confidence_separates_known_and_unknown_after_json():
    fitted = fit_abstention(random_signals(200, (2, 0, 0.2, 0), 0), random_signals(200, (0, 0, 0, 0), 1), lost=0.1)
    fitted = Abstention.model_validate_json(fitted.model_dump_json())
    known, unknown = random_signals(200, (2, 0, 0.2, 0), 2), random_signals(200, (0, 0, 0, 0), 3)
    assert 0.04 < np.mean([fitted.abstains(one) for one in known]) < 0.18
    assert np.mean([fitted.abstains(one) for one in unknown]) > 0.6
    assert all(0 <= fitted.confidence(one) <= 1 for one in known + unknown)


def test_constant_signal_gets_weight_zero():
    same = [signals._replace(lead=0.0) for signals in random_signals(30, (1, 0, 0, 0), 0)]
    assert fit_abstention(same, [s._replace(odds=-s.odds) for s in same]).weights["lead"] == 0.0


@pytest.mark.parametrize(("known", "lost"), [(0, 0.05), (5, 1.0), (5, -0.1)])
def test_threshold_needs_known_queries_and_a_valid_share(known, lost):
    with pytest.raises(QueryError, match="threshold"):
        fit_abstention(random_signals(known, 0, 0), lost=lost)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_share_of_correctly_ordered_pairs(seed):
    known, unknown = (np.random.default_rng((seed, n)).integers(-5, 6, n) for n in (20, 31))
    pairs = [(a > b) + (a == b) / 2 for a in known for b in unknown]
    assert auroc(known, unknown) == pytest.approx(np.mean(pairs))
