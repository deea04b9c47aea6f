"""The command that chooses the scoring of an index on validation queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llama_index_genret.cli.models import open_trained
from llama_index_genret.cli.options import ApiKey, BaseModel, Device, IndexDir, Json, RerankByOption, Server
from llama_index_genret.cli.output import bar, emit, log, new_table
from llama_index_genret.store import load_index
from llama_index_genret.store.vectors import resolve_encoder

if TYPE_CHECKING:
    from llama_index_genret.evaluation.trials import Trial

FIGURES = ("recall@1", "recall@5", "recall@10", "mrr")


def tune(
    index_dir: IndexDir,
    queries: Annotated[
        Path | None,
        typer.Argument(metavar="VALIDATION.jsonl", help="Validation queries, in the format of `genret eval`."),
    ] = None,
    model_weights: Annotated[
        list[float] | None,
        typer.Option(
            "--model-weight",
            min=0,
            max=1,
            help="Share of the model to evaluate; the rest is the encoder's. Repeat it for several. "
            "Default: a grid from 0 to 1.",
            show_default=False,
        ),
    ] = None,
    temperatures: Annotated[
        list[float] | None,
        typer.Option(
            "--temperature",
            help="Temperature of the encoder to evaluate. Repeat it for several. Default: a grid from 0.02 to 0.1.",
            show_default=False,
        ),
    ] = None,
    rerank: Annotated[
        int, typer.Option(min=0, help="Best hits per query to re-rank by log p(query | image), 0 for none.")
    ] = 0,
    rerank_by: RerankByOption = None,
    etas: Annotated[
        list[float] | None,
        typer.Option(
            "--eta",
            min=0,
            help="Weight of the prior to evaluate. Repeat it for several. Default: a grid from 0 to 1.5.",
            show_default=False,
        ),
    ] = None,
    rerank_weights: Annotated[
        list[float] | None,
        typer.Option(
            "--rerank-weight",
            min=0,
            help="Weight of --rerank to evaluate. Repeat it for several. Default: a grid from 0 to 4.",
            show_default=False,
        ),
    ] = None,
    server: Server = None,
    api_key: ApiKey = "EMPTY",
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Choose the share of the model in the blend, and the weights of prior and re-ranking, on validation queries."""
    from llama_index_genret.evaluation.tuning import ETAS, MODEL_WEIGHTS, RERANK_WEIGHTS, TEMPERATURES, tune
    from llama_index_genret.store.queries import read_queries

    loaded = load_index(index_dir)
    wanted = read_queries(queries, loaded.records) if queries else []
    tuning = tune(
        loaded,
        open_trained(loaded, server, api_key, model, device),
        wanted,
        encoder=resolve_encoder(loaded.manifest.encoder, device="cpu" if device == "auto" else device),
        model_weights=model_weights or MODEL_WEIGHTS,
        temperatures=temperatures or TEMPERATURES,
        etas=etas or ETAS,
        rerank=rerank,
        rerank_by=rerank_by or loaded.scoring().rerank_by,
        rerank_weights=rerank_weights or RERANK_WEIGHTS,
        progress=bar("Tuning"),
    )
    chosen = tuning.index.scoring()
    if not loaded.is_trained:
        log.print("nothing to choose: without a trained model, the encoder alone ranks the images", style="yellow")
    title = f"{len(wanted)} queries; {'chosen' if tuning.trials else 'unchanged'}: {chosen}"
    value: dict[str, Any] = {"index": str(tuning.index.folder), "n": len(wanted)}
    value |= {"scoring": dataclasses.asdict(chosen)}
    value |= {"compared": {name: trial.to_json() for name, trial in tuning.compared.items()}}
    rows = [("", trial) for trial in _best_of_each(tuning.trials)] + list(tuning.compared.items())
    emit(as_json, {**value, "trials": [trial.to_json() for trial in tuning.trials]}, _table(rows, title))


def _best_of_each(trials: Sequence[Trial]) -> list[Trial]:
    """Return the best trial of each pair of a model weight and an eta, in their order."""
    best: dict[tuple[float, float], Trial] = {}
    for trial in trials:
        pair = (trial.scoring.model_weight, trial.scoring.eta)
        if pair not in best or trial.figures["mrr"] > best[pair].figures["mrr"]:
            best[pair] = trial
    return list(best.values())


def _table(rows: Sequence[tuple[str, Trial]], title: str) -> Table:
    table = new_table("", "model weight", "temperature", "eta", "rerank weight", *FIGURES, title=title)
    for name, trial in rows:
        scoring = trial.scoring
        weights = [f"{value:g}" for value in (scoring.model_weight, scoring.temperature, scoring.eta)]
        figures = (f"{trial.figures[figure]:.3f}" for figure in FIGURES)
        table.add_row(name, *weights, f"{scoring.rerank_weight:g}" if scoring.rerank else "", *figures)
    return table
