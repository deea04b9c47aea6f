"""Options that several commands share, and the parser of `key=value`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_index_genret.errors import FilterError
from llama_index_genret.models.encoder import DEFAULT_ENCODER
from llama_index_genret.search import Mode
from llama_index_genret.store.scoring import RerankBy

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-256M-Instruct"

IndexDir = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of the index.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="Torch device: auto, cpu, cuda, cuda:1, ...")]
Server = Annotated[str | None, typer.Option(help="URL of a vLLM server that serves the index: http://HOST:PORT/v1")]
ApiKey = Annotated[str, typer.Option(envvar="GENRET_API_KEY", help="API key of the server.", show_default=False)]
BaseModel = Annotated[str | None, typer.Option("--model", help="New place of the base model, if it has moved.")]
Model = Annotated[str, typer.Option("--model", help="Folder or hub id of an image-text-to-text model.")]
Filters = Annotated[
    list[str] | None, typer.Option("--filter", help="Metadata filter key=value. Repeat it: all must hold.")
]
NewEncoder = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        help="Embedding model of the index: folder or hub id of sentence-transformers, http://HOST/v1, or none.",
        show_default=DEFAULT_ENCODER,
    ),
]
SchemeOptions = Annotated[
    list[str] | None,
    typer.Option(help="Option key=value of the scheme, the value in JSON: levels=3, sizes=[32,16], method=rq."),
]
Offline = Annotated[bool, typer.Option("--offline", help="Run vllm.LLM in this process.")]
VllmOption = Annotated[
    list[str] | None,
    typer.Option(help="Argument key=value of vllm.LLM, the value in JSON: tensor_parallel_size=2, max_model_len=4096."),
]
SearchMode = Annotated[
    Mode, typer.Option("--mode", help="beam: beam search. exact: search until the best images are proven.")
]
MaxExpansions = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Prefixes that --mode exact expands before it continues as beam search. Default: no limit.",
        show_default=False,
    ),
]
RerankOption = Annotated[
    int | None,
    typer.Option(
        help="Best hits to re-rank by log p(query | image), 0 for none. Default: as tuned.", show_default=False, min=0
    ),
]
RerankByOption = Annotated[
    RerankBy | None,
    typer.Option(
        help="Input of the re-ranking: the identifier of an image, or the image. Default: as tuned.",
        show_default=False,
    ),
]
TopK = Annotated[int, typer.Option("-k", min=1, help="Number of images to recall.")]


def parse_filters(filters: list[str]) -> dict[str, str]:
    """Parse filters of the form `key=value`.

    Raises:
        FilterError: a filter has another form, or two filters contradict each other.
    """
    wanted: dict[str, str] = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise FilterError(f"expected a filter of the form key=value, got {text!r}.")
        if wanted.setdefault(key, value) != value:
            raise FilterError(
                f"the filters {key}={wanted[key]} and {key}={value} contradict each other, because all must hold. "
                "Give one of them."
            )
    return wanted


def parse_options(flag: str, options: list[str]) -> dict[str, Any]:
    """Parse options such as `levels=3` and `sizes=[32,16]`. A value that is not JSON is text, as in `method=rq`."""
    parsed: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not key.isidentifier() or not equals:
            raise typer.BadParameter(f"expected {flag} of the form key=value, got {text!r}")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or deep nesting
            raise typer.BadParameter(f"the value of {flag} {key}=... is too long or too deep: {error}") from error
    return parsed
