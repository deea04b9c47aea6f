"""What fuzzing has found, and its seeds: read again, each in milliseconds. `integration.fuzz` finds more."""

from pathlib import Path

import pytest

from integration.fuzz import TARGETS, target

FINDINGS = Path(__file__).parent / "fuzz_findings"


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_read_from_outside_gives_a_result_or_an_error_of_ours(name):
    tested = target(name)
    for seed in tested.SEEDS:
        tested.one(seed)
    for path in sorted((FINDINGS / name).glob("*")):
        tested.one(path.read_bytes())
