"""What reads input from outside, fuzzed: each target is a function of bytes that only lets wrong answers out.

    python -m integration.fuzz TARGET --seconds 600 --corpus DIR

`tests/guarantees/test_fuzz_findings.py` replays what was found, without atheris.
"""

from importlib import import_module
from typing import Protocol

TARGETS = ("metadata", "query_file", "index_files", "recall_request", "server_answers")


class Target(Protocol):
    """A module of this package.

    SEEDS: inputs that are read without an error, and others close to them. WORDS: what is worth writing into one.
    """

    SEEDS: tuple[bytes, ...]
    WORDS: tuple[bytes, ...]

    def one(self, data: bytes) -> None:
        """Read one input. Raises what is wrong: any error but the package's own, or AssertionError."""


def target(name: str) -> Target:
    """The module of a target."""
    return import_module(f"{__name__}.{name}")
