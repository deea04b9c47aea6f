"""Run every step on the images in the package: index, recall, train, recall, grounded answer, report.

Every figure is measured on the interfaces of a user: the retriever and the query engine of LlamaIndex. Peers are
measured on the same queries in the same run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.llms import LLM

from llama_index_genret.cli.demo.grounding import answer_cases, grounding_rates, read_cases
from llama_index_genret.corpus import Record, read_corpus
from llama_index_genret.evaluation.baselines import baseline, evaluation_by_score
from llama_index_genret.evaluation.evaluate import Evaluation, evaluate, evaluation_of, recall_in_batches
from llama_index_genret.evaluation.html_page import Cell, ReportAnswer, Table
from llama_index_genret.evaluation.metrics import recall_at
from llama_index_genret.evaluation.parts import parts_of
from llama_index_genret.evaluation.report import report_hit, write_evaluation_report
from llama_index_genret.llamaindex.llms import InProcessLLM, genret_llm
from llama_index_genret.llamaindex.query_engine import image_query_engine
from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever
from llama_index_genret.models.encoder import Encoder
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.scorers.base import Scorer
from llama_index_genret.scorers.blend import Blender
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
from llama_index_genret.store import Index, ScoringChoice
from llama_index_genret.store.build import build_index
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.store.queries import EvaluationQuery, read_queries
from llama_index_genret.training.options import TrainOptions
from llama_index_genret.training.recipe import train

DATA = Path(__file__).parent / "data"
QUESTION = "What kind of thing is the pizza?"
OPTIONS = TrainOptions(
    max_steps=200,
    batch_size=40,
    mix={"retrieve": 8, "memorise": 4, "describe": 1, "answer": 13, "imitate": 14},
)
CASES = 20
"""Number of questions of each split. `integration.recall.answers` measures all."""

DENSE = "encoder, joined captions"

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Figures:
    """The figures of `genret demo`. Rates lie in [0, 1].

    tags: recall@1 and recall@5 on held-out tags by system: `untrained` (the encoder alone), `blend` (trained, what a
        query gets), `model` (the generative model alone) and the peers over the same captions. An index without an
        encoder has `model` and the peers without vectors only.
    answers: share of right answers, end to end, by what was held out of the training.
    top5_agreement, largest_log_prob_difference: of the server and this process. None without a server.
    """

    captions_recall_1: float
    phrasings_recall_1: float
    image_to_identifier: float
    tags: Mapping[str, tuple[float, float]]
    answers: Mapping[str, float]
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
    model: str,
    out: Path,
    *,
    encoder: Encoder | None = None,
    vllm: bool = False,
    options: TrainOptions = OPTIONS,
    progress: Progress = iter,
    say: Say,
) -> DemoResult:
    """Index, recall, train, recall and answer on the demo images. Write `out/index` and `out/report.html`.

    Args:
        model: folder or hub id of the base model.
        out: output folder. An index in it is replaced.
        encoder: encoder of the index. Default: none, so that the index recalls after its training only.
        vllm: start a vLLM server, recall and answer through it, and compare its scores with those of this process.
            Default False.
        options: options of the training, default `OPTIONS`.
        progress: wrapper of iterables that draws a progress bar, default none.
        say: callback for log lines.
    """
    say(f"Indexing {DATA / 'images'}")
    mllm = load_mllm(model)
    corpus = read_corpus(DATA / "images")
    index = build_index(
        corpus, out / "index", mllm, encoder=encoder, scheme="atomic", overwrite=True, progress=progress
    )
    if find_spec("matplotlib") is None:
        say("The report has no charts, because matplotlib is missing: pip install 'llama-index-genret[eval]'")
    held_out = read_queries(DATA / "queries.jsonl", index.records)
    tags = [query for query in held_out if query.kind == "tag"]
    peers = _peers(index, encoder, tags)
    if encoder is not None:
        peers = {"untrained": recalled_by(index, None, encoder, tags)["encoder"], **peers}
        at_1, at_5 = peers["untrained"]
        say(f"Before training, the encoder recalls {at_1:.3f} / {at_5:.3f} (@1 / @5) of {len(tags)} held-out tags")
    say("Training the tasks memorise, retrieve, imitate, describe and answer, interleaved")
    index = train(index, options, encoder=encoder, validation=[], report=say)
    mllm = load_trained(index)
    local = TransformersScorer(mllm)
    queries = _captions(index.records) + held_out
    if not vllm:
        say("Recalling and answering in this process")
        return _measure(index, local, encoder, InProcessLLM(mllm), queries, peers, out)
    say("Starting a vLLM server to recall and answer")
    with _server(index, out / "vllm.log") as (scorer, llm):
        result = _measure(index, scorer, encoder, llm, queries, peers, out, images_by=local)
        ours = _recall(index, _blend(index, local, encoder), queries)
        agreement, difference = agreement_of(ours, result.evaluation.hits)
    figures = replace(result.figures, top5_agreement=agreement, largest_log_prob_difference=difference)
    return _write_report(replace(result, figures=figures))


def _blend(index: Index, model: Scorer, encoder: Encoder | None) -> Scorer:
    return Blender(index, encoder).scorer(model, index.scoring())


def _peers(index: Index, encoder: Encoder | None, queries: Sequence[EvaluationQuery]) -> dict[str, tuple[float, float]]:
    """Return recall@1 and recall@5 of text indexes over the captions."""
    names = ["bm25", "tfidf"] if find_spec("bm25s") else ["tfidf"]
    found = {name: baseline(name, index.records, queries) for name in names}
    if encoder is not None:
        captions = encoder.embed_captions([", ".join(record.captions) for record in index.records])
        cosines = encoder.embed_queries([query.text for query in queries]) @ captions.T
        found = {DENSE: evaluation_by_score(cosines, index.records, queries), **found}
    return {name: _at_1_and_5(evaluation) for name, evaluation in found.items()}


def recalled_by(
    index: Index, model: Scorer | None, encoder: Encoder | None, queries: Sequence[EvaluationQuery]
) -> dict[str, tuple[float, float]]:
    """Return recall@1 and recall@5 of the blend, the model and the encoder alone, of those that there are."""
    parts = parts_of(index, model, encoder, ScoringChoice())
    return {part.name: _at_1_and_5(evaluate(index, part.scorer, queries, scoring=part.choice)) for part in parts}


def _at_1_and_5(evaluation: Evaluation) -> tuple[float, float]:
    figures = evaluation.figures()
    return figures["recall@1"], figures["recall@5"]


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
    model: Scorer,
    encoder: Encoder | None,
    llm: LLM,
    queries: list[EvaluationQuery],
    peers: Mapping[str, tuple[float, float]],
    out: Path,
    *,
    images_by: Scorer | None = None,
) -> DemoResult:
    """Return all figures of one model. images_by: the scorer of image queries, where `model` takes none."""
    scorer = _blend(index, model, encoder)
    evaluation = evaluation_of(index, queries, _recall(index, scorer, queries))
    tags = recalled_by(index, model, encoder, evaluation.of_kind("tag").queries)
    tags.pop("encoder", None)  # it is `untrained`
    retriever = GenerativeImageRetriever(index, scorer, similarity_top_k=1)
    cases = read_cases(DATA / "grounding.jsonl", index.records)
    splits = {case.split: [other for other in cases if other.split == case.split][:CASES] for case in cases}
    grounded = {split: answer_cases(retriever, llm, chosen, images=[1]) for split, chosen in splits.items()}
    every = [result for results in grounded.values() for result in results]
    figures = Figures(
        captions_recall_1=evaluation.of_kind("caption").figures()["recall@1"],
        phrasings_recall_1=evaluation.of_kind("phrasing").figures()["recall@1"],
        image_to_identifier=_image_recall(index, images_by or model),
        tags={**tags, **peers},
        answers={split: grounding_rates(results).right[1] for split, results in grounded.items()},
        answers_follow_the_swapped_picture=grounding_rates(every).follows,
    )
    response = image_query_engine(retriever, llm).query(QUESTION)
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


NOTES = {
    "untrained": "held out; the index before any training",
    "blend": "held out; what a query gets after the training",
    "model": "held out; the generative model alone",
    DENSE: "peer: a dense text index of the same encoder",
    "bm25": "peer",
    "tfidf": "peer: character n-grams",
}
SPLITS = {"wording": "held-out wordings", "image": "colors of held-out images", "both": "both held out"}


def figure_rows(figures: Figures) -> list[tuple[str, str, str]]:
    """Return name, value and note of each figure, for a table."""
    rows = [
        ("recall@1, captions", f"{figures.captions_recall_1:.3f}", "trained on; goal 0.95"),
        ("recall@1, new phrasings", f"{figures.phrasings_recall_1:.3f}", "held out; goal 0.90"),
        ("image to identifier", f"{figures.image_to_identifier:.3f}", "recall@1 of image queries; goal 0.90"),
        *(
            (f"recall@1 / @5, tags, {name}", f"{at_1:.3f} / {at_5:.3f}", NOTES[name])
            for name, (at_1, at_5) in figures.tags.items()
        ),
        *(
            (f"right answers, {SPLITS[split]}", f"{right:.3f}", "from question to recall to answer, by one model")
            for split, right in figures.answers.items()
        ),
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
