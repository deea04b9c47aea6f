"""One query after another through a real vLLM server on the CPU: the recall endpoint against vLLM's own methods.

The model is that of `recall_bench`, with 4 symbols and width 10. The identifiers are synthetic. Tries have two shapes.
In a balanced one every level branches, so that a search takes 4 steps at any size. In a random one a search skips the
steps that leave no choice. Before the clock starts, the rankings of the endpoint and of the stock protocol are compared
with that of the model in this process. Cold: every query is new to the server. Warm: always the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import httpx

from integration.bench.corpus import LEVELS
from integration.bench.recall_bench import OURS, QUERY, WIDTH, model_with_symbols
from integration.bench.served import SHAPES, Site, body, index_name, queries, ranked
from integration.bench.timing import Report, interleaved_wall, options
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.serving.launch import ServedModel

CHECKED = 3
"""Queries of every index whose answers are compared before anything is timed."""

STOCK, BEAMS, GREEDY = "stock protocol", "vLLM's beam search", "vLLM, greedy"


def main(argv: Sequence[str] | None = None) -> Report:
    """Serve all sizes, and measure."""
    args = options(__doc__ or "", sizes=(1_000, 10_000, 100_000, 1_000_000), argv=argv)
    report, mllm = Report("serve_bench", args.seed), model_with_symbols(args.seed)
    corpora = {index_name(shape, n): make(n, args.seed) for shape, make in SHAPES.items() for n in args.sizes}
    with tempfile.TemporaryDirectory() as folder:
        site = Site.prepare(mllm, corpora, Path(folder))
        for name, index in site.indexes.items():
            report.value(f"identifiers of {name}", len(index.records))
        report.value("tokens of a prompt", len(site.prompt(QUERY).token_ids))
        with site.serving() as server, _client(server) as client:
            check(site, server, client, args.seed)
            for shape in SHAPES:
                report.section(f"one query, {shape} trie, width {WIDTH}, wall clock")
                compare(report, site, server, client, index_name(shape, args.sizes[-1]), args)
                names = [index_name(shape, n) for n in args.sizes]
                grow(report, shape, client, names, queries(args.seed + 2), args.rounds)
    report.write(args.json)
    return report


def _client(server: ServedModel) -> httpx.Client:
    return httpx.Client(base_url=server.api_base, timeout=300)


def check(site: Site, server: ServedModel, client: httpx.Client, seed: int) -> None:
    """Raise AssertionError unless all candidates recall the same from every index."""
    stock = VllmScorer(server.api_base)
    for name in site.indexes:
        for text in [QUERY, *islice(queries(seed), CHECKED - 1)]:
            site.assert_same(ranked(client.post("/recall", json=body(name, text))), name, text, "endpoint")
            site.assert_same(site.ranked(name, site.recall_by(stock, name, text)), name, text, STOCK)


def compare(report: Report, site: Site, server: ServedModel, client: httpx.Client, name: str, args: Any) -> None:
    """Time the endpoint beside the stock protocol and vLLM's own beam search and greedy decoding, cold and warm."""
    stock = VllmScorer(server.api_base)

    def candidates(texts: Iterator[str]) -> dict[str, Callable[[], object]]:
        def completion(**chosen: Any) -> object:
            prompt = list(site.prompt(next(texts)).token_ids)
            fixed = {"model": "genret", "prompt": prompt, "max_tokens": LEVELS, "ignore_eos": True, "temperature": 0}
            return client.post("/completions", json={**fixed, **chosen}).raise_for_status()

        return {
            OURS: _endpoint(client, name, texts),
            STOCK: lambda: site.recall_by(stock, name, next(texts)),
            BEAMS: lambda: completion(use_beam_search=True, n=WIDTH),
            GREEDY: completion,
        }

    for state, texts in (("cold", queries(args.seed + 1)), ("warm", repeat(QUERY))):
        times = interleaved_wall(candidates(texts), rounds=args.rounds)
        times_ours = report.times(f"{name}, {state}", times)
        for peer, most in ((BEAMS, 0.6), (GREEDY, 2.5), (STOCK, 0.8)):
            report.goal(f"ours / {peer}, {name}, {state}", 1 / times_ours[peer], at_most=most)


def grow(
    report: Report, shape: str, client: httpx.Client, names: Sequence[str], texts: Iterator[str], rounds: int
) -> None:
    """Time the endpoint at every size, cold. The sizes take turns."""
    times = interleaved_wall({name: _endpoint(client, name, texts) for name in names}, rounds=rounds)
    report.times(f"sizes, {shape}", times, ours=names[0])
    medians = [time.median for time in times.values()]
    report.goal(f"slowest size / fastest, {shape}", max(medians) / min(medians), at_most=1.1)


def _endpoint(client: httpx.Client, name: str, texts: Iterator[str]) -> Callable[[], object]:
    return lambda: client.post("/recall", json=body(name, next(texts))).raise_for_status()


if __name__ == "__main__":
    main()
