"""Commands that write pseudo-queries and train the model."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from llama_index_genret.cli.models import prepare_vllm
from llama_index_genret.cli.options import (
    ApiKey,
    Device,
    IndexDir,
    Json,
    Offline,
    VllmOption,
    parse_options,
)
from llama_index_genret.cli.output import (
    counting_bar,
    emit,
    facts_of,
    facts_table,
    log,
    n_pseudo_queries,
    new_table,
    visible,
)
from llama_index_genret.store import Index, drop_update, load_index


def write_queries(
    index_dir: IndexDir,
    per_image: Annotated[int, typer.Option(min=1, help="Queries per image, captions included.")] = 8,
    style: Annotated[
        Path | None,
        typer.Option(help="File of user queries whose style the model imitates: one per line, or QUERIES.jsonl."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.05, max=2.0, help="Sampling temperature.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Random seed of the sampling.")] = 0,
    server: Annotated[
        str | None, typer.Option(help="URL of a vLLM server of the base model: http://HOST:PORT/v1")
    ] = None,
    offline: Offline = False,
    vllm_option: VllmOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    overwrite: Annotated[bool, typer.Option(help="Replace the pseudo-queries of all images.")] = False,
    api_key: ApiKey = "EMPTY",
    model: Annotated[
        str | None,
        typer.Option("--model", help="New place of the base model, if it has moved. With --server: its served name."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write pseudo-queries for images with few captions, with the base model. They are training data.

    Images that have enough queries are skipped. Pseudo-queries are no captions, so the baselines of `genret eval` do
    not read them. After an interruption, the same command resumes.
    """
    from llama_index_genret.training.pseudo_queries import WriteOptions, open_writing, read_samples

    if offline and (server or device != "auto"):
        raise typer.BadParameter("--offline takes no --server or --device: vLLM chooses its own device")
    if vllm_option and not offline:
        raise typer.BadParameter("--vllm-option needs --offline; a server has its own flags")
    vllm_options = parse_options("--vllm-option", vllm_option or [])
    loaded, samples = load_index(index_dir), read_samples(style) if style else ()

    def writer() -> Any:
        if server:
            from llama_index_genret.training.pseudo_queries.vllm_http_writer import ServerWriter

            return ServerWriter(server, model=model, api_key=api_key)
        if offline:
            prepare_vllm()
            from llama_index_genret.training.pseudo_queries.vllm_offline_writer import OfflineWriter

            return OfflineWriter.load(loaded, base=model, **vllm_options)
        from llama_index_genret.store.model_loading import load_base
        from llama_index_genret.training.pseudo_queries.transformers_writer import InProcessWriter

        return InProcessWriter(loaded, load_base(loaded, device=device, base=model))

    kind = "vllm.LLM" if offline else "server" if server else f"transformers on {device}"
    options = WriteOptions(
        per_image=per_image, temperature=temperature, seed=seed, batch_size=batch_size, overwrite=overwrite
    )
    with (
        open_writing(loaded, options, samples=samples, written_by=kind) as run,
        counting_bar("Writing", len(run.records)) as progress,
    ):
        summary = run.finish(writer, progress=progress)
    if summary.short:
        log.print(_shortfall(summary), style="yellow")
    figures = {**dataclasses.asdict(summary), "pseudo_queries": n_pseudo_queries(load_index(index_dir))}
    table = new_table(*figures)
    table.add_row(*map(str, figures.values()))
    emit(as_json, figures, table)


def train(
    index_dir: IndexDir,
    update: Annotated[
        bool,
        typer.Option("--update", help="Train an adapter on top for images added since. Old images are replayed."),
    ] = False,
    drop: Annotated[
        bool, typer.Option("--drop-update", help="Restore the weights before the update. Trains nothing.")
    ] = False,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the captions, for an update those of the new images. Default: 3."),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps, instead of --epochs. Default: as many as --epochs needs.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Examples per step, over all processes. Default: 20.")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(min=1, help="Parts per step, to save memory. Default: 1.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations, to save memory.")
    ] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the LoRA matrices. Default: 0.002, for 0.1 B parameters. Larger models need less."
        ),
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Rank of the LoRA matrices. Default: 32.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Train only this many of the last layers. Default: all.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="The index's encoder, if it has moved.", show_default=False)
    ] = None,
    imitate: Annotated[
        Path | None,
        typer.Option(help="More queries to imitate the encoder on, one per line.", exists=True, dir_okay=False),
    ] = None,
    redrawn: Annotated[
        int | None,
        typer.Option(min=0, help="Augmented versions of each image to memorise, in other styles. Default: 0."),
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(help="Examples per task. Default: retrieve=8,memorise=3,describe=1,answer=8,imitate=20."),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Validation queries, in the format of `genret eval`. Default: captions, which the run holds out.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Budget of wall time from the first step to the last. Default: no limit.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed of the training.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train the model to generate the identifiers of the index.

    Recall on validation queries is measured about 8 times, the best weights are kept, and a run whose recall no longer
    rises ends early.
    After an interruption, the same command resumes from its last checkpoint. With --update, the defaults derive from
    the options of the training before. On several GPUs, run one process per GPU:
    accelerate launch --num_processes 4 -m llama_index_genret.cli train INDEX
    """
    if epochs is not None and max_steps is not None:
        raise typer.BadParameter("give --epochs or --max-steps, not both")
    given: dict[str, Any] = {"epochs": epochs, "max_steps": max_steps, "batch_size": batch_size}
    given |= {"gradient_accumulation_steps": gradient_accumulation_steps}
    given |= {"gradient_checkpointing": gradient_checkpointing or None}
    given |= {"learning_rate": learning_rate, "lora_rank": lora_rank, "layers": layers}
    given |= {"redrawn": redrawn, "mix": mix, "imitated": imitate, "minutes": minutes}
    given = {name: value for name, value in given.items() if value is not None}
    if drop and (update or given or encoder or validation):
        raise typer.BadParameter("--drop-update trains nothing and takes no other training options: give it alone")
    if drop:
        trained = drop_update(load_index(index_dir))
    else:
        given |= {"seed": seed}
        trained = _trained(load_index(index_dir), given, validation, update=update, encoder=encoder, device=device)
    if os.environ.get("RANK", "0") == "0":  # only one of several processes prints
        emit(as_json, facts_of(trained), facts_table(trained))


def _trained(
    loaded: Index, given: dict[str, Any], validation: Path | None, *, update: bool, encoder: str | None, device: str
) -> Index:
    from llama_index_genret.corpus.jsonl import read_lines
    from llama_index_genret.store.queries import read_queries
    from llama_index_genret.training.options import TrainOptions
    from llama_index_genret.training.recipe import train
    from llama_index_genret.training.schedule import update_options
    from llama_index_genret.training.tasks import read_mix

    if "mix" in given:
        given["mix"] = read_mix(given["mix"])
    if "imitated" in given:
        given["imitated"] = tuple(line.strip() for line in read_lines(given["imitated"]) if line.strip())
    if "epochs" in given:
        given["max_steps"] = None  # an update inherits max_steps from the training
    options = dataclasses.replace(update_options(loaded) if update else TrainOptions(), **given)
    return train(
        loaded,
        options,
        update=update,
        encoder=encoder,
        validation=read_queries(validation, loaded.records) if validation else None,
        device=device,
        show_progress=sys.stderr.isatty(),
        report=lambda line: tqdm.write(visible(line), file=sys.stderr),
    )


def _shortfall(summary: Any) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.refused.items())
    return (
        f"{summary.short} of {summary.images} images have fewer queries than --per-image, {summary.none} of them none. "
        f"Rejected outputs of the model: {reasons or 'none'}. Use a larger or trained model for better queries, or "
        "--seed N --overwrite for other ones."
    )
