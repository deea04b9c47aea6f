"""The command that serves a local web page to try a model by hand."""

from __future__ import annotations

from typing import Annotated

import typer

from llama_index_genret.cli.models import open_endpoint, open_llm, open_scorer
from llama_index_genret.cli.options import ApiKey, BaseModel, Device, IndexDir, Json, Server
from llama_index_genret.cli.output import emit, log, new_table
from llama_index_genret.store import load_index


def browse(
    index_dir: IndexDir,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page. 0 selects a free port.")] = 8001,
    server: Server = None,
    api_key: ApiKey = "EMPTY",
    model: BaseModel = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Serve a local web page to recall by text, image and filters, and to see each search. Needs [browse]."""
    from llama_index_genret.cli.browse.app import HOST, listen, make_app, serve
    from llama_index_genret.cli.browse.recaller import Recaller

    loaded = load_index(index_dir)
    with listen(port) as listening:
        scorer = open_scorer(loaded, server, api_key, model, device)
        llm = open_llm(loaded, scorer, server, api_key, model, device)
        endpoint = open_endpoint(loaded, server, api_key) if server else None
        recaller = Recaller(loaded, scorer, llm, endpoint=endpoint)
        url = f"http://{HOST}:{listening.getsockname()[1]}/"
        table = new_table("page")
        table.add_row(url)
        emit(as_json, {"url": url}, table)
        log.print("Press Ctrl-C to stop", style="dim")
        serve(make_app(recaller), listening)
