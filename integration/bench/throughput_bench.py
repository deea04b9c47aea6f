"""Many queries at once through a real vLLM server on the CPU, against GRACE's way of decoding.

GRACE decodes with `generate` of Hugging Face, beams and a `prefix_allowed_tokens_fn` over a dict trie. It runs in this
process, on two threads, before the server starts: each has the machine for itself. Clients are closed loops: each
sends its next query when it has the answer to the last. The model, width and identifiers are those of `serve_bench`;
what each finds is held to the search in this process before the clock starts. Cold: every query is new to the server.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path

import httpx
import numpy as np
import torch

from integration.bench.agreement import Ranked, assert_same_ranking
from integration.bench.corpus import LEVELS, SYMBOLS
from integration.bench.recall_bench import (
    OURS,
    QUERY,
    THREADS,
    WIDTH,
    Constraint,
    Peer,
    dict_trie_constraint,
    model_with_symbols,
)
from integration.bench.served import SHAPES, Site, body, index_name, queries, ranked
from integration.bench.timing import Report, Time, interleaved_wall, options
from llama_index_genret.search import Normalise

CLIENTS = (1, 8, 32, 128)
BATCH = 32
"""Queries that GRACE decodes in one `generate`, and the number of clients in the comparison."""

FEWEST = 16
"""Minimum number of answers that a round counts."""

BATCHED, ALONE = "GRACE, a batch of queries at once", "GRACE, one query after another"


def main(argv: Sequence[str] | None = None) -> Report:
    """Measure GRACE, then start the server and measure it."""
    args = options(__doc__ or "", sizes=(10_000,), argv=argv)
    torch.set_num_threads(THREADS)
    report, mllm = Report("throughput_bench", args.seed), model_with_symbols(args.seed)
    corpora = {index_name(shape, n): make(n, args.seed) for shape, make in SHAPES.items() for n in args.sizes}
    with tempfile.TemporaryDirectory() as folder:
        site = Site.prepare(mllm, corpora, Path(folder))
        peers = {}
        for name in site.indexes:
            report.section(f"GRACE's decoding, {name}, width {WIDTH}, wall clock, {THREADS} threads")
            peers[name] = grace(report, site, name, args.rounds, args.seed)
        with site.serving() as server:
            for name in site.indexes:
                report.section(f"served, {name}, width {WIDTH}, wall clock")
                serve(report, site, server.api_base, name, peers[name], args.rounds, args.seed)
    report.write(args.json)
    return report


@dataclass(frozen=True)
class Grace:
    """GRACE's decoding of a list of queries."""

    site: Site
    name: str
    constraint: Constraint
    texts: Sequence[str]

    def decode(self, *, output_scores: bool = False) -> list[list[Ranked]]:
        """Return the identifiers of each query, best first. Log-probabilities are computed on demand only."""
        peer = Peer(self.site.mllm, [self.site.prompt(text) for text in self.texts])
        output = peer.beams(
            prefix_allowed_tokens_fn=lambda batch, row: self.constraint(batch, row[peer.length :]),
            output_scores=output_scores,
        )
        names = [str(row) for row in output.sequences[:, peer.length :].tolist()]
        scores = output.sequences_scores.tolist() if output_scores else [0.0] * len(names)
        pairs = list(zip(names, scores, strict=True))
        return [pairs[start : start + WIDTH] for start in range(0, len(pairs), WIDTH)]

    def check(self) -> None:
        """Raise AssertionError unless it finds the results of the search in this process."""
        for text, found in zip(self.texts, self.decode(output_scores=True), strict=True):
            hits = self.site.recall_by(self.site.scorer, self.name, text, Normalise.VOCABULARY)
            assert_same_ranking(found, [(str(list(h.token_ids)), h.log_prob) for h in hits], f"GRACE, {text!r}")


def grace(report: Report, site: Site, name: str, rounds: int, seed: int) -> dict[str, Time]:
    """Return the seconds a query of GRACE's decoding, alone and batched."""
    first_token = site.mllm.model.get_input_embeddings().weight.shape[0] - LEVELS * SYMBOLS
    constraint, texts = dict_trie_constraint(site.corpora[name], first_token, 0), queries(seed)

    def of(n: int) -> Grace:
        return Grace(site, name, constraint, list(islice(texts, n)))

    of(1).check()
    of(BATCH).check()
    times = interleaved_wall(
        {ALONE: lambda: [of(1).decode() for _ in range(FEWEST)], BATCHED: lambda: of(BATCH).decode()}, rounds=rounds
    )
    a_query = {ALONE: times[ALONE].divided(FEWEST), BATCHED: times[BATCHED].divided(BATCH)}
    report.times(f"a query, {name}", a_query, ours=BATCHED)
    return a_query


@dataclass
class Load:
    """Clients of one index, and their measurements. `seconds` and `latencies` are those of the counted answers."""

    name: str
    clients: int
    counted: int
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    async def run(self, api_base: str, texts: Iterator[str]) -> None:
        """Count answers while all clients are busy: after each has its first, until `counted` more have arrived."""
        answers, start, finished = 0, 0.0, asyncio.Event()

        async def client(opened: httpx.AsyncClient) -> None:
            nonlocal answers, start
            while not finished.is_set():
                sent = time.perf_counter()
                (await opened.post("/recall", json=body(self.name, next(texts)))).raise_for_status()
                now, answers = time.perf_counter(), answers + 1
                if answers == self.clients:
                    start = now
                elif answers > self.clients and not finished.is_set():
                    self.latencies.append(now - sent)
                    if len(self.latencies) == self.counted:
                        self.seconds = now - start
                        finished.set()

        limits = httpx.Limits(max_connections=self.clients, max_keepalive_connections=self.clients)
        async with httpx.AsyncClient(base_url=api_base, timeout=600, limits=limits) as opened:
            await asyncio.gather(*(client(opened) for _ in range(self.clients)))


def serve(report: Report, site: Site, api_base: str, name: str, peers: dict[str, Time], rounds: int, seed: int) -> None:
    """Measure queries a second and latencies for each number of clients, cold.

    At BATCH clients also warm, and beside GRACE.
    """
    with httpx.Client(base_url=api_base, timeout=600) as client:
        for text in [QUERY, *islice(queries(seed), 2)]:
            site.assert_same(ranked(client.post("/recall", json=body(name, text))), name, text, "endpoint")
    texts = queries(seed + 1)
    kinds = {f"{n} clients, cold": (n, texts) for n in CLIENTS} | {f"{BATCH} clients, warm": (BATCH, repeat(QUERY))}
    loads: dict[str, list[Load]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, (n, bodies) in kinds.items():
            load = Load(name, n, max(FEWEST, 2 * n))
            asyncio.run(load.run(api_base, bodies))
            loads[kind].append(load)
    qps = {kind: statistics.median(load.counted / load.seconds for load in runs) for kind, runs in loads.items()}
    for kind, runs in loads.items():
        latencies = np.concatenate([load.latencies for load in runs])
        report.value(f"{name}, {kind}: queries a second", qps[kind])
        for percent in (50, 95):
            report.value(f"{name}, {kind}: latency p{percent}", float(np.percentile(latencies, percent) * 1e3), "ms")
    together, alone = qps[f"{BATCH} clients, cold"], qps["1 clients, cold"]
    report.goal(f"{name}: queries a second at {BATCH} clients / at 1", together / alone, at_least=6)
    ours = Time.of([load.seconds / load.counted for load in loads[f"{BATCH} clients, cold"]])
    report.times(f"a query at {BATCH} clients, {name}", {OURS: ours, **peers})
    fastest = min(peer.median for peer in peers.values())
    report.goal(f"{name}: queries a second at {BATCH} clients / GRACE's fastest", fastest * together, at_least=5)


if __name__ == "__main__":
    main()
