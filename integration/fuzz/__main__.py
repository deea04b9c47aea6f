"""Coverage-guided fuzzing with atheris (libFuzzer) of one target, for a bounded time.

DIR keeps the inputs that reach new code, and a `crash-*` file for each failure. Minimise it, fix the code, then move it
to `tests/guarantees/fuzz_findings/TARGET/`. The exit status is not zero if an input failed, or took longer than
TIMEOUT_S.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

from integration.fuzz import TARGETS, target
from integration.fuzz.mutation import mutated

TIMEOUT_S = 20
MAX_BYTES = 4096
MAX_MEMORY_MIB = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, required=True)
    options = parser.parse_args()
    with atheris.instrument_imports(include=["llama_index_genret", "json"]):
        tested = target(options.target)
    corpus = options.corpus / options.target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(tested.SEEDS):
        (corpus / f"seed-{number}").write_bytes(seed)
    with tempfile.NamedTemporaryFile("wb", suffix=".dict") as words:
        words.write(b"".join(b'"%s"\n' % _escaped(word) for word in tested.WORDS))
        words.flush()
        flags = {
            "max_total_time": options.seconds,
            "timeout": TIMEOUT_S,
            "max_len": MAX_BYTES,
            "rss_limit_mb": MAX_MEMORY_MIB,
            "dict": words.name,
            "artifact_prefix": f"{corpus}/",
            "print_final_stats": 1,
        }
        given = [sys.argv[0], *(f"-{name}={value}" for name, value in flags.items()), str(corpus)]
        atheris.Setup(given, tested.one, custom_mutator=_mutated)
        atheris.Fuzz()


def _mutated(data: bytes, max_size: int, seed: int) -> bytes:
    changed = mutated(data, seed, max_size) if seed % 2 else None
    return atheris.Mutate(data, max_size) if changed is None else changed


def _escaped(word: bytes) -> bytes:
    """Return a word in the syntax of libFuzzer's dictionaries."""
    return b"".join(bytes([byte]) if 32 <= byte < 127 and byte not in b'"\\' else b"\\x%02x" % byte for byte in word)


if __name__ == "__main__":
    main()
