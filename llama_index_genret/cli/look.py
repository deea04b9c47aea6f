"""Commands to look at what a model recalls: measured, or on the images in the package."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from llama_index_genret.cli.models import open_scorer
from llama_index_genret.cli.options import (
    DEFAULT_MODEL,
    ApiKey,
    BaseModel,
    Device,
    Eta,
    IndexDir,
    Json,
    Model,
    Reranked,
    RerankedBy,
    RerankWeight,
    Server,
    scoring_choice,
)
from llama_index_genret.cli.output import bar, console, emit, log, n_pseudo_queries, new_table, visible
from llama_index_genret.store import load_index


def evaluate(
    index_dir: IndexDir,
    queries: Annotated[Path, typer.Argument(metavar="QUERIES.jsonl")],
    server: Server = None,
    baselines: Annotated[str, typer.Option(help="Comma-separated, of: bm25, tfidf.")] = "",
    report: Annotated[
        Path | None, typer.Option(help="Write one HTML page: figures, charts, pictures. Needs [eval].")
    ] = None,
    eta: Eta = None,
    rerank: Reranked = None,
    rerank_weight: RerankWeight = None,
    rerank_by: RerankedBy = None,
    api_key: ApiKey = "EMPTY",
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure recall on held-out queries."""
    from llama_index_genret.evaluation import (
        baseline,
        evaluate,
        n_written_by_a_model,
        read_queries,
    )
    from llama_index_genret.evaluation_report import write_evaluation_report

    if report:
        import_module("llama_index_genret.charts")  # refuses now, not after an hour of recalling

    loaded = load_index(index_dir)
    wanted = read_queries(queries, loaded.records)
    peers = {name: baseline(name, loaded.records, wanted) for name in filter(None, baselines.split(","))}
    seen = n_written_by_a_model(loaded, wanted)
    if seen:
        log.print(f"{seen} of the queries are pseudo-queries of the index, and not held out", style="yellow")
    written = {"pseudo_queries": n_pseudo_queries(loaded), "queries_among_them": seen}
    scoring = loaded.scoring(scoring_choice(eta, rerank, rerank_weight, rerank_by))
    scorer = open_scorer(loaded, server, api_key, model, device)
    evaluation = evaluate(loaded, scorer, wanted, progress=bar("Recalling"), scoring=scoring)
    figures = {**evaluation.figures(), "scoring": dataclasses.asdict(scoring)}
    table = new_table("", "recall@1", "recall@5", "recall@10", "mrr", "ndcg@10", title=f"{figures['n']} queries")
    for name, row in {"generative": figures, **{n: p.figures() for n, p in peers.items()}}.items():
        bounds = {column: " [{:.3f}, {:.3f}]".format(*interval) for column, interval in row["interval"].items()}
        columns = ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10")
        table.add_row(name, *(f"{row[column]:.3f}{bounds.get(column, '')}" for column in columns))
    emit(as_json, {**figures, **written, "baselines": {name: peer.figures() for name, peer in peers.items()}}, table)
    if report:
        write_evaluation_report(report, loaded, evaluation, baselines=peers)
        log.print(f"report: {report}")


def demo(
    model: Model = DEFAULT_MODEL,
    vllm: Annotated[bool, typer.Option("--vllm", help="Recall and answer through a vLLM server.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the index and report.html.")] = Path("demo-out"),
    as_json: Json = False,
) -> None:
    """The whole path on the images in the package: index, train, recall, grounded answer, report."""
    from llama_index_genret.demo import figure_rows, run_demo

    result = run_demo(model, out, vllm=vllm, progress=bar("Encoding"), say=log.print)
    evaluation = result.evaluation
    shown = new_table("kind", "query", "recalled images, best first", "")
    for kind in ("caption", "phrasing", "tag"):
        part = evaluation.of_kind(kind)
        for wanted, ranked in list(zip(part.queries, part.ranked, strict=True))[:: max(1, len(part.queries) // 6)][:6]:
            shown.add_row(kind, wanted.text, ", ".join(ranked[:3]), "✓" if ranked[0] in wanted.image_ids else "")
    figures = new_table("figure", "value", "note")
    for row in figure_rows(result.figures):
        figures.add_row(*row)
    answer = dataclasses.asdict(result.answer)
    if not as_json:
        console().print(shown)
        said = visible(f"  {result.answer.answer}  ← {answer['sources']}")
        console().print(Text.assemble((result.answer.question, "bold"), said))
    emit(as_json, {**dataclasses.asdict(result.figures), "answer": answer, "report": str(result.report)}, figures)
    log.print(f"report: {result.report}")
