"""When two rankings, computed in different ways, are the same. Knows names and numbers only."""

from __future__ import annotations

from collections.abc import Iterable

TOLERANCE = 1e-3
"""Of natural-log probabilities: float32 sums in another order, through the whole model."""

Ranked = tuple[str, float]


def disagreement(found: Iterable[Ranked], expected: Iterable[Ranked], *, tolerance: float = TOLERANCE) -> str:
    """What tells two rankings of (name, log-probability) apart; empty if they are the same.

        the log-probabilities are equal place by place;
        whoever is in both has the same in both;
        whoever was not expected ties with the last one, and took its place.

    Names whose log-probabilities are within the tolerance may so have changed places.
    """
    found, expected = list(found), list(expected)
    names, wanted = dict(found), dict(expected)
    if len(found) != len(expected) or len(names) != len(found):
        return f"{len(found)} names ({len(names)} different), {len(expected)} expected"
    for place, ((name, log_prob), (_, at_this_place)) in enumerate(zip(found, expected, strict=True)):
        if abs(log_prob - at_this_place) > tolerance:
            return f"place {place}: log p {log_prob} ({name}), expected {expected[place]}"
        if abs(log_prob - wanted.get(name, expected[-1][1])) > tolerance:
            return f"place {place}: {name} has log p {log_prob}, expected {wanted.get(name, 'not at all')}"
    return ""


def assert_same_ranking(found: Iterable[Ranked], expected: Iterable[Ranked], what: str) -> None:
    """Raise AssertionError, which names `what`, unless they are the same."""
    difference = disagreement(found, expected)
    assert not difference, f"{what}: {difference}"
