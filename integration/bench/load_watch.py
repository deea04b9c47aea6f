"""The resources of a server over time: resident memory and open files of all its processes, and their growth.

Depends on processes and numbers only.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

SAMPLE_EVERY_S = 1.0
WARM_UP, WARM_UP_S = 1 / 3, 120.0
ALLOWED_GROWTH, ALLOWED_FILES = 0.02, 16
"""Allowed growth from the first quarter to the last: of memory as a share, of open files in number."""

FEWEST_SAMPLES = 40
"""Samples after the warm-up below which nothing is judged."""

BLOCK = 30
"""Samples whose median is one point of the line, since neighbouring samples are not independent."""


@dataclass
class Watch:
    """Samples of a process and its children, one a second."""

    pid: int
    mib: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def sample(self) -> None:
        """Take one sample. A process that has just ended counts as nothing."""
        memory, files = 0, 0
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    memory += each.memory_info().rss
                    files += each.num_fds()
        self.mib.append(memory / 2**20)
        self.files.append(files)

    @property
    def growth(self) -> float:
        """Return the growth of memory, from the first quarter's median to the last's, as a share. NaN: not judged."""
        first, last = _quarters(self.mib)
        return last / first - 1

    @property
    def more_files(self) -> float:
        """Return the same growth of open files, in number."""
        first, last = _quarters(self.files)
        return last - first

    @property
    def slope(self) -> tuple[float, float]:
        """Return the slope of memory in MiB a minute, and the half-width of its 95 % bound. NaN: not judged."""
        samples = judged(self.mib)
        points = [statistics.median(samples[at : at + BLOCK]) for at in range(0, len(samples) - BLOCK + 1, BLOCK)]
        if len(points) < 5:
            return math.nan, math.nan
        minutes = np.arange(len(points)) * BLOCK * SAMPLE_EVERY_S / 60
        line, covariance = np.polyfit(minutes, points, 1, cov=True)
        return float(line[0]), 2 * float(np.sqrt(covariance[0, 0]))

    def problems(self) -> list[str]:
        """List the resources that grew by more than is allowed."""
        found = []
        if self.growth > ALLOWED_GROWTH:
            found.append(f"memory grew by {self.growth:.1%}; {ALLOWED_GROWTH:.0%} are allowed")
        if self.more_files > ALLOWED_FILES:
            found.append(f"{self.more_files:.0f} more files are open; {ALLOWED_FILES} are allowed")
        return found


def judged(samples: Sequence[float]) -> Sequence[float]:
    """Return the samples after the warm-up, or none if they are too few."""
    samples = samples[int(max(len(samples) * WARM_UP, WARM_UP_S / SAMPLE_EVERY_S)) :]
    return samples if len(samples) >= FEWEST_SAMPLES else []


def _quarters(samples: Sequence[float]) -> tuple[float, float]:
    """Return the medians of the first and the last quarter of the judged samples."""
    quarter = len(judged(samples)) // 4
    if not quarter:
        return math.nan, math.nan
    return statistics.median(judged(samples)[:quarter]), statistics.median(judged(samples)[-quarter:])
