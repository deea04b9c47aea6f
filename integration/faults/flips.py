"""Flip bits and cut files of an index, at random places of all files. Each is found and named, or has no effect.

    python -m integration.faults.flips --trials 2000

Each trial reads all that any command reads, and searches, in a child process that must not crash.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from integration.faults.commands import OPTIONS, Workshop, Writer, genret, state_of
from integration.faults.syscalls import wait_for_child
from llama_index_genret.errors import StoreError
from llama_index_genret.store import load_index
from llama_index_genret.training.pseudo_queries import WriteOptions, open_writing
from llama_index_genret.training.recipe import train

KINDS = ("bit", "byte", "block of zeros", "cut")
A_CHILD = 100


def full_index(workshop: Workshop) -> Path:
    """Make an index with every optional file: `atomic`, with an added image that has a row of its own."""
    folder = workshop.place / "index"
    shutil.rmtree(workshop.place, ignore_errors=True)  # left by other trials
    workshop.place.mkdir()
    model = ("--model", workshop.model, "--device", "cpu")

    def learn(*, update: bool = False) -> None:
        train(load_index(folder), OPTIONS, update=update, device="cpu", show_progress=False)

    def write() -> None:
        with open_writing(load_index(folder), WriteOptions(per_image=3)) as run:
            run.finish(Writer)

    for step in (
        lambda: genret("index", workshop.pictures, "--out", folder, "--scheme", "atomic", *model),
        learn,
        lambda: genret("add", folder, workshop.more, "--device", "cpu"),
        lambda: genret("remove", folder, "red-bar"),
        lambda: learn(update=True),
        write,
        lambda: genret("tune", folder, "--device", "cpu"),
    ):
        status, said = wait_for_child(step)
        assert status == 0, said
    return folder


def files_of(folder: Path) -> list[Path]:
    """Return the manifest, and all files that it lists."""
    named = [folder / entry.path for entry in load_index(folder).manifest.files.values()]
    return [folder / "manifest.json", *sorted(named)]


def damaged(content: bytes, kind: str, place: int, draw: np.random.Generator) -> bytes:
    """Return the content with one fault in it, at a place or from there on."""
    changed = bytearray(content)
    if kind == "bit":
        changed[place] ^= 1 << int(draw.integers(8))
    elif kind == "byte":
        changed[place] ^= int(draw.integers(1, 256))
    elif kind == "block of zeros":
        changed[place : place + 512] = bytes(len(changed[place : place + 512]))
    else:
        del changed[place:]
    return bytes(changed)


def trial(folder: Path, files: list[Path], number: int, seed: int, sound: object) -> str:
    """Run one trial. Returns a failure as a sentence, or "found" or "without effect"."""
    draw = np.random.default_rng((seed, number))
    path = files[int(draw.integers(len(files)))]
    content, kind = path.read_bytes(), KINDS[int(draw.integers(len(KINDS)))]
    place = int(draw.integers(len(content)))
    where = f"{kind} at {place} of {path.relative_to(folder)}"
    path.write_bytes(damaged(content, kind, place, draw))
    try:
        state = state_of(folder.parent)
    except StoreError as error:
        return "found" if path.name in str(error) else f"FAILED {where}: the error does not name it: {error}"
    except BaseException as error:
        return f"FAILED {where}: {error!r}"
    finally:
        path.write_bytes(content)
    return "without effect" if state == sound else f"FAILED {where}: another answer"


def flips(folder: Path, *, trials: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Run all trials. Returns the count of each result, and a sentence for each failure."""
    files, sound, said = files_of(folder), state_of(folder.parent), folder.parent / "said"
    counts: Counter[str] = Counter()
    failures = []
    for start in range(0, trials, A_CHILD):
        numbers = range(start, min(start + A_CHILD, trials))

        def work(numbers: range = numbers) -> None:
            with said.open("w") as output:
                for number in numbers:
                    print(trial(folder, files, number, seed, sound), file=output, flush=True)

        status, error = wait_for_child(work)
        results = said.read_text().splitlines()
        if status or len(results) < len(numbers):
            failures.append(f"trial {start + len(results)}: the process ended with {status}: {error[-1000:]}")
            break
        counts.update(result for result in results if not result.startswith("FAILED"))
        failures += [result for result in results if result.startswith("FAILED")]
    said.unlink()
    return counts, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = full_index(Workshop(Path(root).resolve()))
        start = time.monotonic()
        names = sorted(load_index(folder).manifest.files)
        counts, failures = flips(folder, trials=arguments.trials, seed=arguments.seed)
    figures = {"trials": arguments.trials, **counts, "failures": len(failures), "files": ["manifest.json", *names]}
    print(json.dumps({**figures, "seconds": round(time.monotonic() - start, 1)}))
    print(*failures, sep="\n", file=sys.stderr)
    sys.stdout.flush()
    os._exit(bool(failures))


if __name__ == "__main__":
    main()
