"""Synthetic indexes for the benchmarks' model, a vLLM server on the CPU that serves them all, and queries for it.

One server serves every size, so that ratios between them come from one process.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from integration.bench.agreement import Ranked, assert_same_ranking
from integration.bench.corpus import Corpus
from integration.bench.recall_bench import WIDTH
from llama_index_genret.corpus import Record, Scalar
from llama_index_genret.identifiers import get_scheme
from llama_index_genret.models.mllm import Mllm, render_prompts
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import Scorer, recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import Hit, Normalise, SearchOptions
from llama_index_genret.serving.endpoint.schema import MIDDLEWARE
from llama_index_genret.serving.launch import (
    CPU_FLAGS,
    ServedModel,
    free_port,
    running_server,
    serve_environment,
    vllm_serve_command,
)
from llama_index_genret.store import Index, create_index

SHAPES = {"balanced": Corpus.balanced, "random": Corpus.sample}
_WORDS = (
    "red green blue yellow black white small large old young wet dry open closed bright dark dog cat horse bird fish "
    "tree flower house bridge boat car train bus road river lake beach snow rain sun moon cloud hill field table chair "
    "window door cup plate apple bread cake child woman man hat coat ball kite book clock lamp street garden"
)
WORDS = _WORDS.split()
WORDS_OF_A_QUERY = 6
Metadata = Callable[[int], Mapping[str, Scalar]]


def index_name(shape: str, n: int) -> str:
    """Return the server's name for the index of n identifiers."""
    return f"{shape}-{n}"


def queries(seed: int) -> Iterator[str]:
    """Yield random words, without end. No two of 60 ** 6 texts are likely to be the same."""
    draw = random.Random(seed)
    while True:
        yield " ".join(draw.choices(WORDS, k=WORDS_OF_A_QUERY))


@dataclass(frozen=True)
class Site:
    """The served checkpoint, and its indexes by name."""

    mllm: Mllm
    scorer: Scorer
    checkpoint: Path
    corpora: Mapping[str, Corpus]
    indexes: Mapping[str, Index]

    @classmethod
    def prepare(
        cls, mllm: Mllm, corpora: Mapping[str, Corpus], folder: Path, metadata: Metadata = lambda row: {}
    ) -> Site:
        """Write the checkpoint and the indexes. `mllm` has the level symbols. metadata: of the image in each row."""
        checkpoint = folder / "checkpoint"
        mllm.model.save_pretrained(checkpoint)
        mllm.processor.save_pretrained(checkpoint)
        indexes = {name: synthetic_index(folder / name, mllm, corpus, metadata) for name, corpus in corpora.items()}
        return cls(mllm, TransformersScorer(mllm), checkpoint, corpora, indexes)

    @contextmanager
    def serving(
        self, *, port: int | None = None, environment: Mapping[str, str] | None = None
    ) -> Iterator[ServedModel]:
        """Run a vLLM server with the recall endpoint. Its output goes into a file beside the checkpoint."""
        port = port or free_port()
        command = [
            *(*vllm_serve_command(), str(self.checkpoint)),
            *("--served-model-name", "genret", "--host", "127.0.0.1", "--port", str(port), "--max-logprobs", "-1"),
            *("--middleware", MIDDLEWARE, *CPU_FLAGS),
        ]
        served = serve_environment([*self.indexes.values()], os.environ)
        # vLLM would leave a core to the API server, while the peers in this process use every core that it may use.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment = {**served, "VLLM_CPU_OMP_THREADS_BIND": cores, **(environment or {})}
        log = self.checkpoint.with_name("vllm.log")
        with running_server(
            command, host="127.0.0.1", port=port, log=log, environment=environment, timeout_s=900
        ) as server:
            yield server

    def prompt(self, text: str) -> Prompt:
        """Return the prompt of a query, which is the same for all indexes."""
        index = next(iter(self.indexes.values()))
        return index.prompts.for_query(index.tokenizer, text)

    def recall_by(self, scorer: Scorer, name: str, text: str, normalise: Normalise = Normalise.CHILDREN) -> list[Hit]:
        """Return the best WIDTH hits of one index, by a search in this process."""
        prompts, trie = [self.prompt(text)], self.indexes[name].trie
        return list(recall(scorer, trie, prompts, SearchOptions(k=WIDTH, width=WIDTH, normalise=normalise))[0].hits)

    def assert_same(self, found: list[Ranked], name: str, text: str, who: str) -> None:
        """Raise AssertionError unless `found` equals the ranking of the model in this process."""
        expected = self.ranked(name, self.recall_by(self.scorer, name, text))
        assert_same_ranking(found, expected, f"{who}, {name}, {text!r}")

    def ranked(self, name: str, hits: list[Hit]) -> list[Ranked]:
        """Return image ids and log-probabilities."""
        return [(self.indexes[name].record_of(hit).image_id, hit.log_prob) for hit in hits]


def synthetic_index(folder: Path, mllm: Mllm, corpus: Corpus, metadata: Metadata) -> Index:
    """Make an index without image files: the benchmarks use only their ids."""
    names = [f"image-{row}" for row in range(len(corpus))]
    identifiers = [tuple(f"<g{level}_{code}>" for level, code in enumerate(row)) for row in corpus.codes.tolist()]
    return create_index(
        folder,
        images=folder,
        records=[Record(name, folder / name, name, "0" * 64, (), metadata(row)) for row, name in enumerate(names)],
        identifiers=identifiers,
        scheme=get_scheme(
            "numeric"
        ),  # would assign identifiers to further images: there are no features to fit codebooks to
        tokenizer=mllm.tokenizer,
        model=mllm.entry(),
        prompts=render_prompts(mllm),
    )


def body(name: str, text: str) -> dict[str, Any]:
    """Return the body of `POST /v1/recall` in every benchmark."""
    return {"index": name, "query": text, "k": WIDTH, "beam_width": WIDTH}


def ranked(answer: httpx.Response) -> list[Ranked]:
    """Return image ids and log-probabilities of an answer to one query."""
    (result,) = answer.raise_for_status().json()["results"]
    return [(hit["image_id"], hit["log_prob"]) for hit in result["hits"]]
