"""Fuzz the code that reads input from outside. A target is a function of bytes that raises only on wrong results.

    python -m integration.fuzz TARGET --seconds 600 --corpus DIR

`tests/guarantees/test_fuzz_findings.py` replays the findings without atheris.
"""

from importlib import import_module
from typing import Protocol

TARGETS = ("metadata", "query_file", "index_files", "recall_request", "server_answers")


class Target(Protocol):
    """A module of this package.

    SEEDS: inputs that are read without an error, and others close to them. WORDS: useful fragments to insert.
    """

    SEEDS: tuple[bytes, ...]
    WORDS: tuple[bytes, ...]

    def one(self, data: bytes) -> None:
        """Read one input. Raises AssertionError on a wrong result, and passes on every error but the package's own."""


def target(name: str) -> Target:
    """Return the module of a target."""
    return import_module(f"{__name__}.{name}")
