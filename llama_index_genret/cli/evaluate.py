"""The command that measures recall on held-out queries."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from llama_index_genret.cli.models import open_scorer
from llama_index_genret.cli.options import (
    ApiKey,
    BaseModel,
    Device,
    IndexDir,
    Json,
    RerankOption,
    Server,
)
from llama_index_genret.cli.output import bar, emit, log, n_pseudo_queries, new_table
from llama_index_genret.store import ScoringChoice, load_index


def evaluate(
    index_dir: IndexDir,
    queries: Annotated[
        Path,
        typer.Argument(
            metavar="QUERIES.jsonl", help='One {"query": "...", "file_name" or "image_id": "..."} per line.'
        ),
    ],
    server: Server = None,
    baselines: Annotated[
        str, typer.Option(help="Comma-separated text baselines over the captions: bm25, tfidf. bm25 needs [eval].")
    ] = "",
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML page with figures, charts and images. Needs [eval].")
    ] = None,
    rerank: RerankOption = None,
    api_key: ApiKey = "EMPTY",
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure recall on held-out queries."""
    from llama_index_genret.evaluation.baselines import baseline
    from llama_index_genret.evaluation.evaluate import count_pseudo_queries, evaluate
    from llama_index_genret.evaluation.queries import read_queries
    from llama_index_genret.evaluation.report import write_evaluation_report

    if report:
        import_module("llama_index_genret.evaluation.charts")  # fails now, not after an hour of recalling

    loaded = load_index(index_dir)
    wanted = read_queries(queries, loaded.records)
    peers = {name: baseline(name, loaded.records, wanted) for name in filter(None, baselines.split(","))}
    seen = count_pseudo_queries(loaded, wanted)
    if seen:
        log.print(f"{seen} queries are pseudo-queries of the index, so they are not held out", style="yellow")
    overlap = {"pseudo_queries": n_pseudo_queries(loaded), "queries_among_them": seen}
    scoring = ScoringChoice(rerank=rerank)
    scorer = open_scorer(loaded, server, api_key, model, device)
    evaluation = evaluate(loaded, scorer, wanted, progress=bar("Recalling"), scoring=scoring)
    figures = {**evaluation.figures(), "scoring": dataclasses.asdict(loaded.scoring(scoring))}
    table = new_table("", "recall@1", "recall@5", "recall@10", "mrr", "ndcg@10", title=f"{figures['n']} queries")
    for name, row in {"generative": figures, **{n: p.figures() for n, p in peers.items()}}.items():
        bounds = {column: " [{:.3f}, {:.3f}]".format(*interval) for column, interval in row["interval"].items()}
        columns = ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10")
        table.add_row(name, *(f"{row[column]:.3f}{bounds.get(column, '')}" for column in columns))
    emit(as_json, {**figures, **overlap, "baselines": {name: peer.figures() for name, peer in peers.items()}}, table)
    if report:
        write_evaluation_report(report, loaded, evaluation, baselines=peers)
        log.print(f"report: {report}")
