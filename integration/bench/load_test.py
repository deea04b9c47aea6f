"""Many clients for many minutes on a server that they do not spare: does it hold?

    python -m integration.bench.load_test [--minutes 20] [--clients 32] [--seed 0] [--json FILE]

A vLLM server on the CPU, with the recall endpoint, serves a tiny model of random weights and an index that is edited
every few seconds. Each client draws at random: recalls of every kind, batches, requests that it leaves, malformed and
mistyped bodies, queries of a megabyte, unknown indexes and routes, chats. It holds if

- every recall is that of the model in this process, for the version of the index that the answer names, and that
  version is no older than the edit before the last `STALE_S` seconds;
- every request has the status that it must have, and none is without an answer;
- memory is flat: after a warm-up of a third of the time, and of WARM_UP_S at least, the median of the last quarter's
  resident memory, of all processes of the server, is at most ALLOWED_GROWTH above that of the first quarter. A shorter
  run judges all but this;
- at the end the server is alive, its engine has nothing left to do, and its own counts are the clients'.

Exit code 0 if it holds, 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from integration.bench.corpus import Corpus
from integration.bench.load_reference import EditedIndex, Question, Reference, metadata
from integration.bench.load_traffic import Traffic
from integration.bench.recall_bench import with_symbols
from integration.bench.served import Site, queries
from integration.bench.timing import Report
from llama_index_genret.modeling import load_mllm
from tests.tiny_model import make_tiny_model

NAME, IMAGES, TEXTS = "pictures", 120, 12
EDIT_EVERY_S, SAMPLE_EVERY_S, TIMEOUT_S = 3.0, 1.0, 120.0
WARM_UP, WARM_UP_S, ALLOWED_GROWTH = 1 / 3, 120.0, 0.02
FEWEST_SAMPLES = 40
"""Of memory, after the warm-up: with fewer it is not judged."""

LAST = Question(10)
"""Asked of every query after the load."""

SHOWN = 10
"""Problems that are printed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the load; 0 if the server held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to add the results to")
    args = parser.parse_args(argv)
    report = Report("load_test", args.seed)
    with tempfile.TemporaryDirectory() as folder:
        mllm = with_symbols(load_mllm(str(make_tiny_model(Path(folder) / "tiny")), device="cpu"), args.seed)
        site = Site.prepare(mllm, {NAME: Corpus.sample(IMAGES, args.seed)}, Path(folder), metadata)
        index, texts = site.indexes[NAME], list(islice(queries(args.seed), TEXTS))
        traffic = Traffic(NAME, Reference(site, index, texts), EditedIndex(index), texts)
        with site.serving() as server:
            memory = Memory(server.pid)
            asyncio.run(_load(traffic, memory, server.api_base.removesuffix("/v1"), args))
            broken = _show(report, traffic, memory)
    report.results["broken"] = broken
    report.write(args.json)
    return 1 if broken else 0


@dataclass
class Memory:
    """Resident memory of a process and its children, over time."""

    pid: int
    mib: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """Measure once. A process that has just ended counts nothing."""
        total = 0
        process = psutil.Process(self.pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += each.memory_info().rss
        self.mib.append(total / 2**20)

    @property
    def judged(self) -> list[float]:
        """The samples after the warm-up; none where they are too few."""
        samples = self.mib[int(max(len(self.mib) * WARM_UP, WARM_UP_S / SAMPLE_EVERY_S)) :]
        return samples if len(samples) >= FEWEST_SAMPLES else []

    @property
    def growth(self) -> float:
        """From the first quarter's median to the last's, as a share of the first's. NaN where it is not judged."""
        quarter = len(self.judged) // 4
        if not quarter:
            return math.nan
        return statistics.median(self.judged[-quarter:]) / statistics.median(self.judged[:quarter]) - 1

    @property
    def slope_mib_a_minute(self) -> float:
        """Of the line through the judged samples; NaN without any."""
        if not self.judged:
            return math.nan
        return float(np.polyfit(np.arange(len(self.judged)) * SAMPLE_EVERY_S / 60, self.judged, 1)[0])


async def _load(traffic: Traffic, memory: Memory, address: str, args: argparse.Namespace) -> None:
    """All clients, the editor and the sampler, until the time is over; then the server is asked how it is."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=args.clients)
    async with httpx.AsyncClient(base_url=address, timeout=TIMEOUT_S, limits=limits) as http:
        end = time.monotonic() + 60 * args.minutes
        besides = [asyncio.create_task(work) for work in (_edit(traffic), _sample(memory), _progress(traffic, end))]
        clients = (traffic.client(http, args.seed * 1000 + number, end) for number in range(args.clients))
        await asyncio.gather(*clients)
        for task in besides:
            task.cancel()
        for ended in await asyncio.gather(*besides, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                traffic.problems.append(f"the editor, the sampler or the bar ended early: {ended!r}")
        traffic.problems += await _aftermath(http, traffic)


async def _edit(traffic: Traffic) -> None:
    while True:
        await asyncio.sleep(EDIT_EVERY_S)
        await asyncio.to_thread(traffic.index.edit)


async def _sample(memory: Memory) -> None:
    while True:
        memory.sample()
        await asyncio.sleep(SAMPLE_EVERY_S)


async def _progress(traffic: Traffic, end: float) -> None:
    """A bar on stderr."""
    words = TextColumn("{task.fields[sent]} requests, {task.fields[edits]} edits, {task.fields[wrong]} problems")
    whole = end - time.monotonic()
    with Progress(BarColumn(), words, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=whole, sent=0, edits=0, wrong=0)
        while True:
            sent = sum(sum(tally.outcomes.values()) for tally in traffic.tallies.values())
            done = whole - max(0.0, end - time.monotonic())
            bar.update(task, completed=done, sent=sent, edits=traffic.index.newest.number, wrong=len(traffic.problems))
            await asyncio.sleep(0.5)


async def _aftermath(http: httpx.AsyncClient, traffic: Traffic) -> list[str]:
    """What is wrong with the server after the load."""
    try:
        if (status := (await http.get("/health")).status_code) != 200:
            return [f"after the load: /health answers {status}"]
        deadline = time.monotonic() + 30
        while (left := await _figure(http, "vllm:num_requests_(?:running|waiting)")) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
        problems = [what for text in traffic.texts if (what := (await traffic.recall(http, [text], LAST))[1])]
        failed = await _figure(http, 'genret_recall_requests_total{outcome="failed"}')
        answered = await _figure(http, 'genret_recall_requests_total{outcome="answered"}')
    except httpx.HTTPError as error:
        return [f"after the load: the server does not answer: {error!r}"]
    problems += [f"after the load: {left:.0f} requests are left in the engine"] * bool(left)
    problems += [f"the server counts {failed:.0f} failed recalls"] * bool(failed)
    here = traffic.answered_recalls + len(traffic.texts)
    if not here <= answered <= here + traffic.tallies["cancelled"].outcomes["cancelled"]:
        problems.append(f"the server counts {answered:.0f} answered recalls, the clients {here}")
    return problems


async def _figure(http: httpx.AsyncClient, name: str) -> float:
    """The sum of a metric of the server."""
    lines = (await http.get("/metrics")).text.splitlines()
    pattern = re.compile(name.replace("{", r"\{").replace("}", r"\}"))
    return sum(float(line.rpartition(" ")[2]) for line in lines if pattern.match(line))


def _show(report: Report, traffic: Traffic, memory: Memory) -> list[str]:
    """Print and record all figures. Returns what is broken."""
    table = Table(
        "kind", "sent", "answered", "refused", "cancelled", "wrong", "unanswered", "p50 ms", "p95 ms", "max ms"
    )
    for kind, tally in traffic.tallies.items():
        counts = [tally.outcomes[outcome] for outcome in ("answered", "refused", "cancelled", "wrong", "unanswered")]
        times = [float(np.percentile(tally.latencies_s or [0], percent) * 1e3) for percent in (50, 95, 100)]
        table.add_row(kind, str(sum(counts)), *map(str, counts), *(f"{ms:.0f}" for ms in times))
        report.results[kind] = {**tally.outcomes, "latency_ms": dict(zip(("p50", "p95", "max"), times, strict=True))}
    Console(width=120).print(table)
    broken = list(traffic.problems)
    if memory.growth > ALLOWED_GROWTH:
        broken.append(f"memory grew by {memory.growth:.1%}; {ALLOWED_GROWTH:.0%} are allowed")
    if traffic.index.newest.number < 1 or len(traffic.versions) < 2:
        broken.append("the index was not edited while it was served: run longer")
    report.value("edits of the index", traffic.index.newest.number)
    report.value("versions that answered", len(traffic.versions))
    report.value("longest time from an edit to a request that an older version answered", traffic.stalest_s, "s")
    report.value("resident memory, median", statistics.median(memory.mib), "MiB")
    if memory.judged:
        report.value("resident memory, growth from the first quarter to the last", memory.growth * 100, "%")
        report.value("resident memory, slope", memory.slope_mib_a_minute, "MiB a minute")
    else:
        report.value("resident memory, growth", "not judged: too short a run")
    report.results["resident memory, MiB"] = memory.mib
    for problem in broken[:SHOWN]:
        print(f"  BROKEN: {problem}", flush=True)
    report.value("held", not broken)
    return broken


if __name__ == "__main__":
    sys.exit(main())
