"""Run every step on the images in the package: index, train, recall, grounded answer, report.

Every figure is measured on the interfaces of a user: the retriever and the query engine of LlamaIndex.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.llms import LLM

from llama_index_genret.cli.demo.grounding import answer_cases, grounding_rates, read_cases
from llama_index_genret.corpus import Record, read_corpus
from llama_index_genret.evaluation.baselines import baseline
from llama_index_genret.evaluation.evaluate import Evaluation, evaluation_of, recall_in_batches
from llama_index_genret.evaluation.html_page import Cell, ReportAnswer, Table
from llama_index_genret.evaluation.metrics import recall_at
from llama_index_genret.evaluation.report import report_hit, write_evaluation_report
from llama_index_genret.llamaindex.llms import InProcessLLM, genret_llm
from llama_index_genret.llamaindex.query_engine import image_query_engine
from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.scorers.base import Scorer
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.search import Hit, SearchOptions
from llama_index_genret.serving.launch import (
    CPU_FLAGS,
    free_port,
    running_server,
    serve_command,
    serve_environment,
)
from llama_index_genret.store import Index
from llama_index_genret.store.build import build_index
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.store.queries import EvaluationQuery, read_queries
from llama_index_genret.training.options import TrainOptions
from llama_index_genret.training.recipe import train

DATA = Path(__file__).parent / "data"
QUESTION = "What kind of thing is the pizza?"
OPTIONS = TrainOptions(max_steps=260)

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Figures:
    """The figures of `genret demo`. Rates lie in [0, 1]. The last two are None without a server."""

    captions_recall_1: float
    phrasings_recall_1: float
    image_to_identifier: float
    tags_recall_1: float
    tags_recall_5: float
    tags_tfidf_recall_1: float
    tags_tfidf_recall_5: float
    answers_right: float
    answers_follow_the_swapped_picture: float
    top5_agreement: float | None = None
    largest_log_prob_difference: float | None = None


@dataclass(frozen=True)
class DemoAnswer:
    """One question to the query engine, with its answer and the ids of its source images."""

    question: str
    answer: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo, for the terminal and for the report."""

    index: Index
    figures: Figures
    evaluation: Evaluation
    answer: DemoAnswer
    report: Path


def run_demo(
    model: str, out: Path, *, vllm: bool = False, options: TrainOptions = OPTIONS, progress: Progress = iter, say: Say
) -> DemoResult:
    """Index, train, recall and answer on the demo images. Write `out/index` and `out/report.html`.

    Args:
        model: folder or hub id of the base model.
        out: output folder. An index in it is replaced.
        vllm: start a vLLM server, recall and answer through it, and compare its scores with those of this process.
            Default False.
        options: options of the training, default `OPTIONS`.
        progress: wrapper of iterables that draws a progress bar, default none.
        say: callback for log lines.
    """
    say(f"Indexing {DATA / 'images'}")
    mllm = load_mllm(model)
    index = build_index(read_corpus(DATA / "images"), out / "index", mllm, overwrite=True, progress=progress)
    if find_spec("matplotlib") is None:
        say("The report has no charts, because matplotlib is missing: pip install 'llama-index-genret[eval]'")
    say("Training the tasks memorise, retrieve, describe and answer, interleaved")
    index = train(index, options)
    mllm = load_trained(index)
    local = TransformersScorer(mllm)
    queries = _captions(index.records) + read_queries(DATA / "queries.jsonl", index.records)
    if not vllm:
        say("Recalling and answering in this process")
        return _measure(index, local, InProcessLLM(mllm), queries, out)
    say("Starting a vLLM server to recall and answer")
    with _server(index, out / "vllm.log") as (scorer, llm):
        result = _measure(index, scorer, llm, queries, out, images_by=local)
        agreement, difference = agreement_of(_recall(index, local, queries), result.evaluation.hits)
    figures = replace(result.figures, top5_agreement=agreement, largest_log_prob_difference=difference)
    return _write_report(replace(result, figures=figures))


@contextmanager
def _server(index: Index, log: Path) -> Iterator[tuple[Scorer, LLM]]:
    port = free_port()
    command = serve_command([index], host="127.0.0.1", port=port, vllm_flags=CPU_FLAGS)
    environment = serve_environment([index], os.environ)
    with running_server(command, host="127.0.0.1", port=port, log=log, environment=environment) as served:
        yield VllmScorer(served.api_base, weights_id=index.weights_id), genret_llm(served.api_base, model=served.model)


def _captions(records: Sequence[Record]) -> list[EvaluationQuery]:
    return [EvaluationQuery(caption, frozenset([r.image_id]), "caption") for r in records for caption in r.captions]


def _recall(index: Index, scorer: Scorer, queries: Sequence[EvaluationQuery]) -> list[tuple[Hit, ...]]:
    prompts = [index.prompts.for_query(index.tokenizer, query.text) for query in queries]
    return recall_in_batches(index, scorer, prompts)


def _measure(
    index: Index,
    scorer: Scorer,
    llm: LLM,
    queries: list[EvaluationQuery],
    out: Path,
    *,
    images_by: Scorer | None = None,
) -> DemoResult:
    """All figures with one scorer. images_by: the scorer of image queries, where `scorer` takes none."""
    evaluation = evaluation_of(index, queries, _recall(index, scorer, queries))
    tags = evaluation.of_kind("tag")
    tfidf = baseline("tfidf", index.records, tags.queries).figures()
    retriever = GenerativeImageRetriever(index, scorer, similarity_top_k=1)
    engine = image_query_engine(retriever, llm)
    cases = read_cases(DATA / "grounding.jsonl", index.records)
    grounding = grounding_rates(answer_cases(retriever, llm, cases, images=[1]))
    figures = Figures(
        captions_recall_1=evaluation.of_kind("caption").figures()["recall@1"],
        phrasings_recall_1=evaluation.of_kind("phrasing").figures()["recall@1"],
        image_to_identifier=_image_recall(index, images_by or scorer),
        tags_recall_1=tags.figures()["recall@1"],
        tags_recall_5=tags.figures()["recall@5"],
        tags_tfidf_recall_1=tfidf["recall@1"],
        tags_tfidf_recall_5=tfidf["recall@5"],
        answers_right=grounding.right[1],
        answers_follow_the_swapped_picture=grounding.follows,
    )
    response = engine.query(QUESTION)
    answer = DemoAnswer(
        QUESTION, str(response), tuple(node.node.metadata["image_id"] for node in response.source_nodes)
    )
    return _write_report(DemoResult(index, figures, evaluation, answer, out / "report.html"))


def _image_recall(index: Index, scorer: Scorer) -> float:
    """Return recall@1 of image queries: the model generates the identifier of the image that it reads."""
    prompts = [index.prompts.for_image(index.tokenizer, record.path) for record in index.records]
    ranked = [
        [index.record_of(hit).image_id for hit in hits]
        for hits in recall_in_batches(index, scorer, prompts, SearchOptions(k=1), batch=16)
    ]
    return recall_at(ranked, [{record.image_id} for record in index.records], 1)


def agreement_of(
    ours: Sequence[Sequence[Hit]], theirs: Sequence[Sequence[Hit]], *, tolerance: float = 1e-3
) -> tuple[float, float]:
    """Return how far two scorers agree on the same queries.

    Returns:
        The share of queries with the same top 5 in the same order, and the largest difference between the natural
        log-probabilities of an image in both lists. Hits within `tolerance` of each other are a tie.
    """
    same, largest = [], 0.0
    for left, right in zip(ours, theirs, strict=True):
        by_leaf = {hit.leaf: hit.log_prob for hit in right}
        largest = max([largest, *(abs(hit.log_prob - by_leaf[hit.leaf]) for hit in left if hit.leaf in by_leaf)])
        same.append(
            all(
                a.leaf == b.leaf or abs(a.log_prob - b.log_prob) <= tolerance
                for a, b in zip(left[:5], right[:5], strict=True)
            )
        )
    return float(np.mean(same)), largest


def _write_report(result: DemoResult) -> DemoResult:
    """Write the report and return the result unchanged. Charts need matplotlib."""
    records = result.index.records
    rows = [result.index.rows_by_id[image_id] for image_id in result.answer.sources]
    figures = tuple(tuple(map(Cell, row)) for row in figure_rows(result.figures))
    sources = tuple(report_hit(records[row], 1.0, result.answer.sources) for row in rows)
    write_evaluation_report(
        result.report,
        result.index,
        result.evaluation,
        tables=[Table("Figures of the demo", ("figure", "value", "note"), figures, words=frozenset({"note"}))],
        charts=find_spec("matplotlib") is not None,
        answers=[ReportAnswer(result.answer.question, result.answer.answer, sources)],
    )
    return result


def figure_rows(figures: Figures) -> list[tuple[str, str, str]]:
    """Return name, value and note of each figure, for a table."""
    rows = [
        ("recall@1, captions", f"{figures.captions_recall_1:.3f}", "trained on; goal 0.95"),
        ("recall@1, new phrasings", f"{figures.phrasings_recall_1:.3f}", "held out; goal 0.90"),
        ("image to identifier", f"{figures.image_to_identifier:.3f}", "recall@1 of image queries; goal 0.90"),
        (
            "recall@1 / @5, held-out tags",
            f"{figures.tags_recall_1:.3f} / {figures.tags_recall_5:.3f}",
            f"char TF-IDF {figures.tags_tfidf_recall_1:.3f} / {figures.tags_tfidf_recall_5:.3f}",
        ),
        ("right answers", f"{figures.answers_right:.3f}", "end to end, held-out wordings or images"),
        (
            "right answers to a swapped image",
            f"{figures.answers_follow_the_swapped_picture:.3f}",
            "about another image in place of the recalled one",
        ),
    ]
    if figures.top5_agreement is not None:
        rows.append(("same top 5 by server and process", f"{figures.top5_agreement:.3f}", "ties within 0.001"))
        rows.append(("largest log-prob difference", f"{figures.largest_log_prob_difference:.1e}", "goal 0.001"))
    return rows
