"""A load test: many clients use a server for many minutes, and every answer is checked.

    python -m integration.bench.load_test [--minutes 20] [--clients 32] [--faults] [--kills] [--json FILE]

A vLLM server on the CPU, with the recall endpoint, serves a tiny model of random weights and an index that is edited
every few seconds. Each client draws at random: recalls of every kind, batches, requests from which it disconnects,
malformed and mistyped bodies, queries of a megabyte, unknown indexes and routes, chats. The server passes if

- every recall equals that of the model in this process, for the version of the index in the answer, and that version
  is no older than the edit before the last `STALE_S` seconds;
- every request has its expected status, and none is without an answer;
- memory and open files do not grow: after a warm-up of a third of the time, and of WARM_UP_S at least, the medians of
  the first and the last quarter, of all processes of the server, differ by ALLOWED_GROWTH at most. A shorter run checks
  all but this;
- at the end the server is alive, its engine has nothing left to do, it holds no more connections than at the
  beginning, and its own counts equal those of the clients.

With --faults, the server also accepts fewer recalls at once than the clients send, and refuses others. Clients reach it
through the proxy of `integration/deploy`. FAULTY clients cut their connections, fall silent, read or write a byte a
second, or send too much. The proxy must end them in time, and every other request must be answered. At the end the
server gets SIGTERM while requests are in flight.

With --kills, before that, its engine's process is killed, then its own, and it is restarted when it has ended. Requests
in flight at such a time may be refused, or find no server. They may not hang, or be answered wrongly.

The exit code is 0 if the server passes, 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from integration.bench.corpus import Corpus
from integration.bench.load_faults import Target
from integration.bench.load_kills import KILLS, Supervisor
from integration.bench.load_reference import EditedIndex, Question, Reference, metadata
from integration.bench.load_traffic import Traffic
from integration.bench.load_watch import SAMPLE_EVERY_S
from integration.bench.recall_bench import with_symbols
from integration.bench.served import Site, queries
from integration.bench.timing import Report
from integration.nginx import running_proxy
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.serving.endpoint.limits import LIMITS_VARIABLE
from llama_index_genret.serving.launch import free_port
from tests.tiny_model import make_tiny_model

NAME, IMAGES, TEXTS = "pictures", 120, 12
EDIT_EVERY_S, TIMEOUT_S = 3.0, 300.0
FAULTY = 12
LOAD_S, KILLED_AFTER_S = 8.0, 2.0
"""Seconds of the load around a kill, and the second of the kill."""

BODY_MIB = 4
TIGHT = {
    "client_max_body_size 64m;": f"client_max_body_size {BODY_MIB}m;",
    "client_header_timeout 30s;": "client_header_timeout 4s;",
    "client_body_timeout 30s;": "client_body_timeout 4s;",
    "send_timeout 30s;": "send_timeout 4s;",
}
"""Limits of the proxy before a server with faulty clients."""

RID_S, SLACK_S = 30.0, 40.0
"""Seconds: the proxy must end a faulty client within the first, the server all connections within the second."""

MORE_FILES = 8
"""Connections that a server may hold beyond those before the load: those that it has opened for good."""

LAST = Question(10)
"""The question that is sent with every query after the load."""

SHOWN = 10
"""Number of problems that are printed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the load. Returns 0 if the server passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--faults", action="store_true", help="clients that misuse their connections")
    parser.add_argument("--kills", action="store_true", help="kill and restart the server at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to add the results to")
    args = parser.parse_args(argv)
    report = Report("load_test", args.seed)
    with tempfile.TemporaryDirectory() as folder:
        mllm = with_symbols(load_mllm(str(make_tiny_model(Path(folder) / "tiny")), device="cpu"), args.seed)
        site = Site.prepare(mllm, {NAME: Corpus.sample(IMAGES, args.seed)}, Path(folder), metadata)
        index, texts = site.indexes[NAME], list(islice(queries(args.seed), TEXTS))
        port, environment = free_port(), {LIMITS_VARIABLE: f"queries={args.clients}" if args.faults else ""}
        supervisor = Supervisor(partial(site.serving, port=port, environment=environment))
        traffic = Traffic(NAME, Reference(site, index, texts), EditedIndex(index), texts)
        traffic.excuses, traffic.is_limited = supervisor.excuses, args.faults
        with _reached_by(Path(folder) / "nginx", port, args.faults) as reached:
            target = Target("127.0.0.1", reached, NAME, RID_S, BODY_MIB * 2**20)
            asyncio.run(_load(traffic, supervisor, target, args))
        broken = _show(report, traffic, supervisor)
    report.results["broken"] = broken
    report.write(args.json)
    return 1 if broken else 0


@contextmanager
def _reached_by(folder: Path, port: int, by_proxy: bool) -> Iterator[int]:
    """Yield the port that clients use: the server's own, or that of a proxy before it."""
    if not by_proxy:
        yield port
        return
    with running_proxy(folder, port, TIGHT) as proxy:
        yield proxy


async def _load(traffic: Traffic, supervisor: Supervisor, target: Target, args: argparse.Namespace) -> None:
    """Run all clients, editor, killer and sampler until the time is over. Then check the server."""
    address = f"http://{target.host}:{target.port}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=args.clients)
    async with supervisor.running(), httpx.AsyncClient(base_url=address, timeout=TIMEOUT_S, limits=limits) as http:
        supervisor.lives[-1].sample()
        end = time.monotonic() + 60 * args.minutes
        besides = [asyncio.create_task(work) for work in (_edit(traffic), _sample(supervisor), _progress(traffic, end))]
        clients = [traffic.client(http, args.seed * 1000 + number, end) for number in range(args.clients)]
        clients += [traffic.faulty(target, number, end) for number in range(FAULTY * args.faults)]
        await asyncio.gather(*clients)
        for task in besides:
            task.cancel()
        for ended in await asyncio.gather(*besides, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                traffic.problems.append(f"the editor, the sampler or the bar ended early: {ended!r}")
        traffic.problems += await _aftermath(http, traffic, supervisor)
        for kind in KILLS if args.kills else KILLS[-1:] if args.faults else ():
            await _killed_while_asked(kind, http, traffic, supervisor, args)


async def _killed_while_asked(
    kind: str, http: httpx.AsyncClient, traffic: Traffic, supervisor: Supervisor, args: argparse.Namespace
) -> None:
    """Perform the KILLS, the last without a restart. Requests in flight are answered or refused."""
    start, again = time.monotonic(), kind != KILLS[-1]
    clients = [traffic.client(http, 10**6 + number, start + LOAD_S) for number in range(args.clients)]

    async def killed() -> None:
        await asyncio.sleep(KILLED_AFTER_S)
        await supervisor.kill(kind, again=again)

    await asyncio.gather(*clients, killed())
    if again:
        answers = [await traffic.recall(http, [text], LAST) for text in traffic.texts]
        traffic.problems += [f"after the kill of the {kind}: {what}" for _, what in answers if what]


async def _edit(traffic: Traffic) -> None:
    while True:
        await asyncio.sleep(EDIT_EVERY_S)
        await asyncio.to_thread(traffic.index.edit)


async def _sample(supervisor: Supervisor) -> None:
    while True:
        supervisor.lives[-1].sample()
        await asyncio.sleep(SAMPLE_EVERY_S)


async def _progress(traffic: Traffic, end: float) -> None:
    """Draw a progress bar on stderr, if it is a terminal."""
    whole = round(end - time.monotonic())
    with tqdm(total=whole, unit="s", disable=None) as bar:
        while True:
            sent = sum(sum(tally.outcomes.values()) for tally in traffic.tallies.values())
            edits, wrong = traffic.index.newest.number, len(traffic.problems)
            bar.set_postfix_str(f"{sent} requests, {edits} edits, {wrong} problems")
            bar.update(whole - max(0, round(end - time.monotonic())) - bar.n)
            await asyncio.sleep(0.5)


async def _aftermath(http: httpx.AsyncClient, traffic: Traffic, supervisor: Supervisor) -> list[str]:
    """List the problems of the server after the load."""
    try:
        if (status := (await http.get("/health")).status_code) != 200:
            return [f"after the load: /health answers {status}"]
        deadline = time.monotonic() + 30
        while (left := await _figure(http, "vllm:num_requests_(?:running|waiting)")) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
        connections = await _connections_left(supervisor)
        problems = [what for text in traffic.texts if (what := (await traffic.recall(http, [text], LAST))[1])]
        failed = await _figure(http, 'genret_recall_requests_total{outcome="failed"}')
        answered = await _figure(http, 'genret_recall_requests_total{outcome="answered"}')
    except httpx.HTTPError as error:
        return [f"after the load: the server does not answer: {error!r}"]
    problems += [f"after the load: {left:.0f} requests are left in the engine"] * bool(left)
    problems += [f"after the load: {connections} more files are open than before"] * (connections > MORE_FILES)
    problems += [f"the server counts {failed:.0f} failed recalls"] * bool(failed)
    here = traffic.answered_recalls + len(traffic.texts)
    if not here <= answered <= here + traffic.tallies["cancelled"].outcomes["cancelled"]:
        problems.append(f"the server counts {answered:.0f} answered recalls, the clients {here}")
    return problems


async def _connections_left(supervisor: Supervisor) -> int:
    """Count the files that the server has open beyond those of its start, after time to close them."""
    life, deadline = supervisor.lives[-1], time.monotonic() + SLACK_S
    while True:
        life.sample()
        more = life.files.pop() - life.files[0]
        life.mib.pop()
        if more <= MORE_FILES or time.monotonic() > deadline:
            return more
        await asyncio.sleep(1.0)


async def _figure(http: httpx.AsyncClient, name: str) -> float:
    """Return the sum of a metric of the server."""
    lines = (await http.get("/metrics")).text.splitlines()
    pattern = re.compile(name.replace("{", r"\{").replace("}", r"\}"))
    return sum(float(line.rpartition(" ")[2]) for line in lines if pattern.match(line))


def _show(report: Report, traffic: Traffic, supervisor: Supervisor) -> list[str]:
    """Print and record all figures. Returns the broken promises."""
    outcomes = ("answered", "refused", "turned away", "cancelled", "ended", "in an outage", "wrong", "unanswered")
    table = Table("kind", "sent", *outcomes, "p50 ms", "p95 ms", "max ms")
    for kind, tally in traffic.tallies.items():
        counts = [tally.outcomes[outcome] for outcome in outcomes]
        times = [float(np.percentile(tally.latencies_s or [0], percent) * 1e3) for percent in (50, 95, 100)]
        if any(counts):
            table.add_row(kind, str(sum(counts)), *map(str, counts), *(f"{ms:.0f}" for ms in times))
        report.results[kind] = {**tally.outcomes, "latency_ms": dict(zip(("p50", "p95", "max"), times, strict=True))}
    Console(width=150).print(table)
    life = supervisor.lives[0]
    broken = [*traffic.problems, *life.problems()]
    broken += [what for outage in supervisor.outages for what in outage.problems()]
    if traffic.index.newest.number < 1 or len(traffic.versions) < 2:
        broken.append("the index was not edited while it was served: run longer")
    report.value("edits of the index", traffic.index.newest.number)
    report.value("versions that answered", len(traffic.versions))
    report.value("longest time from an edit to a request that an older version answered", traffic.stalest_s, "s")
    for outage in supervisor.outages:
        times = {name: round(s, 1) if isinstance(s, float) else s for name, s in outage.record().items()}
        print(f"  {times}", flush=True)
    report.results["outages, seconds since the kill"] = [outage.record() for outage in supervisor.outages]
    report.value("resident memory, median", statistics.median(life.mib), "MiB")
    report.value("open files, median", statistics.median(life.files))
    if not math.isnan(life.growth):
        slope, bound = life.slope
        report.value("resident memory, growth from the first quarter to the last", life.growth * 100, "%")
        report.value("resident memory, slope", slope, "MiB a minute")
        report.value("resident memory, slope, half the width of its 95 % interval", bound, "MiB a minute")
        report.value("open files, growth from the first quarter to the last", life.more_files)
    else:
        report.value("resident memory, growth", "not judged: too short a run")
    report.results["resident memory, MiB"] = [round(mib, 1) for mib in life.mib]
    report.results["open files"] = life.files
    for problem in broken[:SHOWN]:
        print(f"  BROKEN: {problem}", flush=True)
    report.value("held", not broken)
    return broken


if __name__ == "__main__":
    sys.exit(main())
