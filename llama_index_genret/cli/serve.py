"""Commands that serve an index, or export its checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from llama_index_genret.cli.options import IndexDir, Json
from llama_index_genret.cli.output import emit, log, new_table
from llama_index_genret.serving.endpoint.schema import ENCODER_DEVICE_VARIABLE, ENCODER_VARIABLE
from llama_index_genret.store import load_index


def export(
    index_dir: IndexDir,
    out: Annotated[Path, typer.Option(help="New folder for the checkpoint.")],
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32 or bfloat16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Merge the trained weights into a checkpoint that plain vLLM serves."""
    from llama_index_genret.serving.export import export_checkpoint

    checkpoint = export_checkpoint(load_index(index_dir), out, dtype=dtype)
    table = new_table("checkpoint", "serve with")
    table.add_row(str(checkpoint), f"vllm serve {checkpoint} --max-logprobs -1")
    emit(as_json, {"checkpoint": str(checkpoint)}, table)


def serve(
    context: typer.Context,
    index_dir: IndexDir,
    also: Annotated[
        list[Path] | None, typer.Option(help="Another index of the same model. Repeat it for several.")
    ] = None,
    adapters: Annotated[
        bool,
        typer.Option(
            "--adapters",
            help="Recall with LoRA adapters and answer with the base model. Needs an index of `--alphabet existing`.",
        ),
    ] = False,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Place of the encoder on this machine, if not the one in the index: folder, hub id or address.",
            envvar=ENCODER_VARIABLE,
            show_default=False,
        ),
    ] = None,
    encoder_device: Annotated[
        str, typer.Option(help="Device of the encoder: cpu, cuda, cuda:1, ...", envvar=ENCODER_DEVICE_VARIABLE)
    ] = "cpu",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    dtype: Annotated[str, typer.Option(help="Type of the merged weights: float32 or bfloat16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Serve indexes, their encoder and their model with vLLM. Flags after `--` are passed to vLLM unchanged."""
    from llama_index_genret.serving.launch import printable_command, serve_command, serve_environment

    indexes = [load_index(folder) for folder in (index_dir, *(also or ()))]
    environment = serve_environment(indexes, os.environ, encoder=encoder, encoder_device=encoder_device)
    command = serve_command(indexes, host=host, port=port, dtype=dtype, adapters=adapters, vllm_flags=context.args)
    shown = printable_command(command)
    if as_json:
        print(json.dumps({"api_base": f"http://{host}:{port}/v1", "command": shown}), flush=True)
    log.print(" ".join(shown), style="dim")
    os.execve(command[0], command, environment)
