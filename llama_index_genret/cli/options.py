"""The options that several commands share, and how `key=value` is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_index_genret.errors import FilterError
from llama_index_genret.search import Mode
from llama_index_genret.store.scoring import RerankBy

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-256M-Instruct"

IndexDir = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of the index.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Server = Annotated[str | None, typer.Option(help="Address of a vLLM server that serves the index: http://HOST:PORT/v1")]
ApiKey = Annotated[str, typer.Option(envvar="GENRET_API_KEY", help="Of the server.", show_default=False)]
BaseModel = Annotated[str | None, typer.Option("--model", help="The base model, if it has moved.")]
Model = Annotated[str, typer.Option("--model", help="Local folder or hub id of an image-text-to-text model.")]
Filters = Annotated[list[str] | None, typer.Option("--filter", help="key=value; repeat for several, all must hold.")]
SchemeOptions = Annotated[
    list[str] | None,
    typer.Option(help="key=value of the scheme, the value in JSON: levels=3, sizes=[32,16], method=rq."),
]
Offline = Annotated[bool, typer.Option("--offline", help="With vllm.LLM in this process.")]
VllmOption = Annotated[
    list[str] | None,
    typer.Option(help="key=value of vllm.LLM, the value in JSON: tensor_parallel_size=2, max_model_len=4096."),
]
SearchMode = Annotated[
    Mode, typer.Option("--mode", help="exact: search until the best are certain, instead of with a beam.")
]
MaxExpansions = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Prefixes that --mode exact expands before it continues as a beam; no limit if not given.",
        show_default=False,
    ),
]
Reranked = Annotated[
    int | None,
    typer.Option(
        help="Best hits ranked anew by log p(query | image); as tuned if not given.", show_default=False, min=0
    ),
]
RerankedBy = Annotated[
    RerankBy | None,
    typer.Option(help="What the model is given of an image: its identifier, or the image.", show_default=False),
]
TopK = Annotated[int, typer.Option("-k", min=1, help="Images wanted.")]


def parse_filters(filters: list[str]) -> dict[str, str]:
    """`key=value` each; FilterError names one that is not, and two that contradict each other."""
    wanted: dict[str, str] = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise FilterError(f"the filter {text!r} must read key=value.")
        if wanted.setdefault(key, value) != value:
            raise FilterError(
                f"no image has both {key}={wanted[key]} and {key}={value}, and all filters must hold: give one of them."
            )
    return wanted


def parse_options(flag: str, options: list[str]) -> dict[str, Any]:
    """`levels=3`, `sizes=[32,16]`; what is no JSON is a text, as in `method=rq`."""
    parsed: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not key.isidentifier() or not equals:
            raise typer.BadParameter(f"{flag} {text!r} must read key=value")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, nesting without end
            raise typer.BadParameter(f"the value of {flag} {key}=... is too much: {error}") from error
    return parsed
