"""The seeds and findings of fuzzing as regression tests. `integration.fuzz` searches for more."""

from pathlib import Path

import pytest

from integration.fuzz import TARGETS, target

FINDINGS = Path(__file__).parent / "fuzz_findings"


@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_findings_give_a_result_or_a_genret_error(name):
    fuzzer = target(name)
    for seed in fuzzer.SEEDS:
        fuzzer.one(seed)
    for path in sorted((FINDINGS / name).glob("*")):
        fuzzer.one(path.read_bytes())
