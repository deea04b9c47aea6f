"""Compare two rankings that were computed in different ways. Depends on identifiers and numbers only."""

from __future__ import annotations

from collections.abc import Iterable

TOLERANCE = 1e-3
"""Tolerance of natural-log probabilities: float32 sums in another order, through the whole model."""

Ranked = tuple[str, float]


def disagreement(found: Iterable[Ranked], expected: Iterable[Ranked], *, tolerance: float = TOLERANCE) -> str:
    """Describe the difference of two rankings of (image id, log-probability). Empty if they are equal.

        the log-probabilities are equal at every rank;
        an image in both rankings has the same log-probability in both;
        an image that was not expected ties with the last expected one, and replaces it.

    Images whose log-probabilities are within the tolerance may therefore be swapped.
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
    """Raise AssertionError with `what` in its message unless the rankings are equal."""
    difference = disagreement(found, expected)
    assert not difference, f"{what}: {difference}"
