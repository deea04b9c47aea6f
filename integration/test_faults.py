"""Tests with killed processes, full disks and power cuts at every point, and with flipped bits.

All commands, all points: `python -m integration.faults`, `python -m integration.faults.flips --trials 2000`.
"""

import pytest

from integration.faults.commands import LOADING, Workshop
from integration.faults.flips import flips, full_index
from integration.faults.syscalls import supported
from integration.faults.trials import KINDS, Trials

pytestmark = pytest.mark.skipif(not supported(), reason="needs Linux 5.5 on x86-64 with seccomp")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        for module in LOADING:  # the workshop replaces it by its own model
            patched.setattr(module, "load_mllm", module.load_mllm)
        yield Workshop(tmp_path_factory.mktemp("faults").resolve())


@pytest.mark.parametrize(
    ("name", "kind", "few"),
    [
        ("remove", "kill", True),
        ("remove", "power", False),
        ("remove", "full", True),
        ("remove", "read", False),
        ("remove", "race", True),
        ("index", "power", False),
        ("export", "power", False),
        ("export", "full", True),
        ("write-queries", "kill", True),
        ("batch", "kill", True),
        ("train", "power", True),
        ("train", "read", False),
    ],
)
def test_index_is_whole_after_a_fault_at_every_point(workshop, name, kind, few):
    found = KINDS[kind](Trials(workshop, workshop.commands[name], few=few))
    assert found.figures["points"] >= 8
    assert found.failures == []


def test_flipped_bits_and_cut_files_are_found_and_named(workshop):
    counts, failures = flips(full_index(workshop), trials=150)
    assert failures == []
    assert counts["found"] > 100
