"""One query through a real vLLM server on the CPU: the recall endpoint, the stock protocol, vLLM's own beam search.

The model is that of `recall_bench`, 4 symbols of 256 a level, width 10; the identifiers are synthetic. The endpoint
and the stock protocol are held to the ranking of the model in this process before the clock starts.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from integration.bench.corpus import LEVELS, SYMBOLS, Corpus
from integration.bench.recall_bench import QUERY, WIDTH, model_with_symbols
from integration.bench.timing import Report, interleaved_wall, options
from llama_index_genret.corpus import Record
from llama_index_genret.endpoint.wire import MIDDLEWARE
from llama_index_genret.identifiers import get_scheme
from llama_index_genret.modeling import Mllm, render_prompts
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.scorers.vllm import VllmScorer
from llama_index_genret.serving import CPU_FLAGS, free_port, running_server, serve_environment
from llama_index_genret.store import Index, create_index

BLOCK_SIZES = (128, 32)
"""Tokens of a block of vLLM's prefix cache: its default on a CPU, and the smallest there."""


def main(argv: Sequence[str] | None = None) -> Report:
    """Serve the model with each block size, and measure."""
    args = options(__doc__ or "", sizes=(10_000,), argv=argv)
    report, mllm = Report("serve_bench", args.seed), model_with_symbols(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        mllm.model.save_pretrained(checkpoint)
        mllm.processor.save_pretrained(checkpoint)
        for n in args.sizes:
            index = synthetic_index(Path(folder) / f"index-{n}", mllm, Corpus.sample(n, args.seed))
            for block_size in BLOCK_SIZES:
                report.section(f"one query, {n:,} identifiers, width {WIDTH}, blocks of {block_size}, wall clock")
                with served(index, checkpoint, block_size, Path(folder) / "vllm.log") as server:
                    measure(report, f"N={n}, blocks of {block_size}", index, mllm, server, args.rounds)
    report.write(args.json)
    return report


def synthetic_index(folder: Path, mllm: Mllm, corpus: Corpus) -> Index:
    """An index whose images nobody has: only their names matter here."""
    names = [f"image-{row}" for row in range(len(corpus))]
    identifiers = [tuple(f"<g{level}_{code}>" for level, code in enumerate(row)) for row in corpus.codes.tolist()]
    return create_index(
        folder,
        images=folder,
        records=[Record(name, folder / name, name, "0" * 64) for name in names],
        identifiers=identifiers,
        scheme=get_scheme("structured", levels=LEVELS, sizes=SYMBOLS),
        tokenizer=mllm.tokenizer,
        model=mllm.entry(),
        prompts=render_prompts(mllm),
    )


def served(index: Index, checkpoint: Path, block_size: int, log: Path) -> Any:
    """A vLLM server of the checkpoint, with the endpoint; the context gives its address."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
        *("--served-model-name", "genret", "--host", "127.0.0.1", "--port", str(port), "--max-logprobs", "-1"),
        *("--middleware", MIDDLEWARE, "--block-size", str(block_size), *CPU_FLAGS),
    ]
    return running_server(command, host="127.0.0.1", port=port, log=log, environment=serve_environment([index]))


def measure(report: Report, key: str, index: Index, mllm: Mllm, server: Any, rounds: int) -> None:
    """Check that all recall the same, then time them in turns."""
    prompt = index.prompts.for_query(index.tokenizer, QUERY)
    client, stock = httpx.Client(base_url=server.api_base, timeout=300), VllmScorer(server.api_base)

    def endpoint() -> list[dict[str, Any]]:
        answer = client.post("/recall", json={"query": QUERY, "k": WIDTH, "beam_width": WIDTH})
        return list(answer.raise_for_status().json()["results"][0]["hits"])

    def completion(**chosen: Any) -> Callable[[], Any]:
        body = {"model": "genret", "prompt": list(prompt.token_ids), "max_tokens": LEVELS, "ignore_eos": True, **chosen}
        return lambda: client.post("/completions", json=body).raise_for_status().json()

    (here,) = recall(TransformersScorer(mllm), index.trie, [prompt], k=WIDTH, width=WIDTH)
    (there,) = recall(stock, index.trie, [prompt], k=WIDTH, width=WIDTH)
    expected = [hit.log_prob for hit in here.hits]
    assert np.allclose([hit.log_prob for hit in there.hits], expected, atol=1e-3)
    assert np.allclose([hit["log_prob"] for hit in endpoint()], expected, atol=1e-3)
    times = interleaved_wall(
        {
            "ours": endpoint,
            "stock protocol": lambda: recall(stock, index.trie, [prompt], k=WIDTH, width=WIDTH),
            "vLLM's beam search": completion(use_beam_search=True, n=WIDTH, temperature=0),
            "vLLM, greedy": completion(temperature=0),
        },
        rounds=rounds,
    )
    client.close()
    report.times(f"served recall, {key}", times)


if __name__ == "__main__":
    main()
