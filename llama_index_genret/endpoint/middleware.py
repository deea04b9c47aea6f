"""The recall routes, put into vLLM's own app: its API key guards them, its OpenAPI description has them, and its error
handlers answer malformed requests.

A plain ASGI middleware, which is what vLLM lets one add; it does nothing but add the routes when the app starts.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import Counter, Histogram

from llama_index_genret.endpoint.engine_scorer import EngineScorer
from llama_index_genret.endpoint.registry import LoadedIndex, Registry
from llama_index_genret.endpoint.wire import (
    IMPOSSIBLE,
    INDEXES_VARIABLE,
    IndexCard,
    IndexList,
    RecallHit,
    RecallRequest,
    RecallResponse,
    RecallResult,
)
from llama_index_genret.errors import (
    FilterError,
    GenretError,
    ImageError,
    IndexNotFound,
    NotANumber,
    QueryError,
    SearchError,
)
from llama_index_genret.images import from_data_url
from llama_index_genret.prompts import Prompt
from llama_index_genret.scorers.base import arecall
from llama_index_genret.scorers.ranked import ranking_options
from llama_index_genret.scorers.vllm import served_name
from llama_index_genret.search import Ranking
from llama_index_genret.store import Index

CLIENT_CLOSED_REQUEST = 499

REQUESTS = Counter("genret_recall_requests", "Recall requests by outcome.", ["outcome"])
SECONDS = Histogram("genret_recall_seconds", "Seconds from a recall request to its answer.")
STEPS = Counter("genret_recall_steps", "Search steps that the engine has scored.")


def _with_key(raw: Request) -> None:
    """Ask for vLLM's API key again. vLLM guards what begins with /v1, and a `--root-path` that is part of that, as "/"
    is, hides it. Compared in constant time."""
    args = getattr(raw.app.state, "args", None)
    keys = [key for key in (getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]) if key]
    scheme, _, given = raw.headers.get("Authorization", "").partition(" ")
    same = [secrets.compare_digest(_digest(given), _digest(key)) for key in keys]
    if keys and not (scheme.lower() == "bearer" and any(same)):
        raise HTTPException(401, "Unauthorized")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


router = APIRouter(dependencies=[Depends(_with_key)])

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RecallMiddleware:
    """Adds the recall routes to the app when it starts, with the indexes that the environment names."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        app: FastAPI = scope["app"]
        if not hasattr(app.state, "genret"):
            app.state.genret = Registry(_configured(os.environ.get(INDEXES_VARIABLE, "")))
            app.include_router(router)
        await self.app(scope, receive, send)


def _configured(text: str) -> dict[str, Path]:
    pairs = (line.partition("=") for line in text.splitlines() if line.strip())
    return {name: Path(folder) for name, _, folder in pairs}


@router.post("/v1/recall", response_model=RecallResponse)
async def recall_images(request: RecallRequest, raw: Request) -> Response:
    """Rank the images that each query means, by generating their identifiers under a constraint."""
    start = time.perf_counter()
    work = asyncio.create_task(_answer(request, raw.app))
    gone = asyncio.create_task(_disconnected(raw))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
    if not work.done():
        REQUESTS.labels("cancelled").inc()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    try:
        response: Response = JSONResponse(work.result().model_dump())
        REQUESTS.labels("answered").inc()
    except Exception as error:
        response = _error(error)
        REQUESTS.labels("refused" if response.status_code < 500 else "failed").inc()
    SECONDS.observe(time.perf_counter() - start)
    return response


@router.get("/v1/recall/indexes", response_model=IndexList)
async def list_indexes(raw: Request) -> IndexList:
    """The loaded indexes, in the versions that are served now."""
    registry: Registry = raw.app.state.genret
    for loaded in registry.loaded:
        await _current(registry, loaded.name)
    return IndexList(
        data=[
            IndexCard(
                name=loaded.name,
                version=loaded.version,
                scheme=loaded.index.manifest.scheme,
                images=len(loaded.index.records),
                problem=registry.problems[loaded.name],
            )
            for loaded in registry.loaded
        ]
    )


async def _answer(request: RecallRequest, app: FastAPI) -> RecallResponse:
    registry: Registry = app.state.genret
    loaded = await _asked_for(registry, request)
    index = loaded.index
    engine, adapters = app.state.engine_client, app.state.openai_serving_models.lora_requests
    lora = adapters.get(served_name(index.weights_id or ""))
    scorer = EngineScorer(engine, engine.vllm_config.model_config.max_model_len, lora)
    scoring = index.scoring(request.choice(), pictured=request.image is not None)
    try:
        rankings = await arecall(
            scorer,
            index.trie,
            _prompts(request, index),
            k=request.k,
            width=request.beam_width,
            allowed=loaded.leaf_filter(request.conditions()),
            budget=request.budget if request.mode == "exact" else 0,
            **ranking_options(index, scoring),
        )
    finally:
        STEPS.inc(scorer.steps)
    results = [_result(loaded, text, ranking) for text, ranking in zip(request.texts(), rankings, strict=True)]
    return RecallResponse(index=loaded.name, version=loaded.version, scoring=scoring, results=results)


async def _asked_for(registry: Registry, request: RecallRequest) -> LoadedIndex:
    """By its version, if that is asked for, else by its name."""
    if request.version is None:
        return await _current(registry, registry.name_of(request.index))
    names = [loaded.name for loaded in registry.loaded if request.index in (None, loaded.name)]
    current = [await _current(registry, name) for name in names]
    found = next((loaded for loaded in current if loaded.version == request.version), None)
    if found is None:
        served = {loaded.name: loaded.version for loaded in current}
        raise IndexNotFound(f"no index of the version {request.version!r} is on this server, which has {served}.")
    return found


async def _current(registry: Registry, name: str) -> LoadedIndex:
    """The newest version; a folder that has changed is read in a thread, while others are answered."""
    if registry.is_current(name):
        return registry.get(name)
    return await asyncio.to_thread(registry.get, name)


def _prompts(request: RecallRequest, index: Index) -> list[Prompt]:
    if request.image is not None:
        return [index.prompts.for_image(index.tokenizer, from_data_url(request.image), request.query or "")]
    return [index.prompts.for_query(index.tokenizer, text) for text in request.texts()]


def _result(loaded: LoadedIndex, text: str, ranking: Ranking) -> RecallResult:
    hits = []
    for hit in ranking.hits:
        record = loaded.index.record_of(hit)
        hits.append(
            RecallHit(
                image_id=record.image_id,
                file_name=record.file_name,
                caption=record.captions[0] if record.captions else "",
                identifier=loaded.index.identifier_of(hit),
                score=hit.score,
                log_prob=max(hit.log_prob, IMPOSSIBLE),
                ranked_by=None if hit.ranked_by is None else max(hit.ranked_by, IMPOSSIBLE),
                metadata=dict(record.metadata),
            )
        )
    return RecallResult(query=text, hits=hits, exact=ranking.exact, nodes_expanded=ranking.nodes_expanded)


def _error(error: Exception) -> JSONResponse:
    """In the shape of the OpenAI API's errors."""
    if isinstance(error, IndexNotFound):
        status, kind = 404, "NotFoundError"
    elif isinstance(error, (QueryError, FilterError, SearchError, ImageError)) and not isinstance(error, NotANumber):
        status, kind = 400, "BadRequestError"
    elif type(error).__name__ == "EngineDeadError":
        status, kind = 503, "ServiceUnavailableError"
    elif isinstance(error, GenretError):
        status, kind = 500, "InternalServerError"
    else:
        raise error
    body = {"message": str(error), "type": kind, "param": None, "code": status}
    return JSONResponse({"error": body}, status_code=status)


async def _disconnected(raw: Request) -> None:
    """Return when the client has left."""
    while (await raw.receive())["type"] != "http.disconnect":
        pass
