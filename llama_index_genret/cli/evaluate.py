"""The command that measures recall on held-out queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from llama_index_genret.cli.models import index_encoder, open_trained
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
    """Measure recall on held-out queries, of what a query gets and of the model and the encoder alone."""
    from llama_index_genret.evaluation.baselines import baseline
    from llama_index_genret.evaluation.evaluate import count_pseudo_queries, evaluate
    from llama_index_genret.evaluation.parts import parts_of
    from llama_index_genret.evaluation.report import write_evaluation_report
    from llama_index_genret.store.queries import read_queries

    if report:
        import_module("llama_index_genret.evaluation.charts")  # fails now, not after an hour of recalling

    loaded = load_index(index_dir)
    wanted = read_queries(queries, loaded.records)
    peers = {name: baseline(name, loaded.records, wanted) for name in filter(None, baselines.split(","))}
    seen = count_pseudo_queries(loaded, wanted)
    if seen:
        log.print(f"{seen} queries are pseudo-queries of the index, so they are not held out", style="yellow")
    overlap = {"pseudo_queries": n_pseudo_queries(loaded), "queries_among_them": seen}
    trained = open_trained(loaded, server, api_key, model, device)
    parts = parts_of(loaded, trained, index_encoder(loaded, device), ScoringChoice(rerank=rerank))
    recalled, figures = {}, {}
    for part in parts:
        shown = bar(f"Recalling, {part.name}")
        recalled[part.name] = evaluate(loaded, part.scorer, wanted, progress=shown, scoring=part.choice)
        figures[part.name] = {**recalled[part.name].figures(), "scoring": dataclasses.asdict(part.scoring)}
    first = parts[0].name
    compared = {name: peer.figures() for name, peer in peers.items()}
    value = {**figures[first], **overlap, "parts": figures, "baselines": compared}
    emit(as_json, value, _table(figures | compared, title=f"{len(wanted)} queries; {first}: {parts[0].scoring}"))
    if report:
        others = {name: one for name, one in recalled.items() if name != first}
        write_evaluation_report(report, loaded, recalled[first], name=first, baselines={**others, **peers})
        log.print(f"report: {report}")


def _table(figures: Mapping[str, Mapping[str, Any]], *, title: str) -> Table:
    """Return a row for each part of the index and each baseline, with intervals."""
    columns = ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10")
    table = new_table("", *columns, title=title)
    for name, row in figures.items():
        cells = (f"{row[column]:.3f} [{{:.3f}}, {{:.3f}}]".format(*row["interval"][column]) for column in columns)
        table.add_row(name, *cells)
    return table
