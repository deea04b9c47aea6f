"""What every benchmark prints and how it times: interleaved rounds, medians with their spread, ratios of one run.

Knows clocks; nothing of what is measured.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

Case = Callable[[], Any]
SEED = 0


def options(about: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="times that each case runs, after one to warm up")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    return parser


def machine() -> dict[str, Any]:
    """What a number depends on."""
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "seed": SEED,
    }


def interleaved(cases: Mapping[str, Case], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each case: every round runs all of them, so that a busy moment meets all alike.

    Returns:
        By name: median_ms, and low_ms and high_ms, the quartiles.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    held: dict[str, Any] = {}  # a caller of real life still has the last answer when he asks for the next
    for turn in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            held[name] = case()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(seconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median_ms": 1e3 * median, "low_ms": 1e3 * low, "high_ms": 1e3 * high}


def report(times: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """One line a case, with the ratio to the case named `unit`."""
    for name, row in times.items():
        ratio = row["median_ms"] / times[unit]["median_ms"]
        print(f"  {name:44} {row['median_ms']:9.2f} ms ({row['low_ms']:.2f}-{row['high_ms']:.2f})  x{ratio:.2f}")


def write(path: Path | None, content: Mapping[str, Any]) -> None:
    """The numbers as JSON, where a file was asked for."""
    if path:
        path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")
