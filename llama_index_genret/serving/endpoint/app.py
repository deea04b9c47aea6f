"""The recall routes inside vLLM's own app. They share its API key, OpenAPI description and handlers for bad requests.

`RecallMiddleware` is a plain ASGI middleware, the extension point of vLLM. It adds the routes when the app starts and
leaves all other routes unchanged.

Depends on FastAPI and the state of vLLM's app; independent of how the server is started.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_index_genret.corpus.images import from_data_url
from llama_index_genret.errors import (
    EncoderUnavailable,
    FilterError,
    GenretError,
    ImageError,
    IndexNotFound,
    NotANumber,
    QueryError,
    SearchError,
)
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import Scorer, arecall
from llama_index_genret.scorers.rerank import reranking, with_scoring
from llama_index_genret.scorers.vllm_http import served_name
from llama_index_genret.search import Ranking
from llama_index_genret.serving.endpoint.engine_scorer import EngineScorer, EngineStopped
from llama_index_genret.serving.endpoint.limits import LIMITS_VARIABLE, Admission, Limits, TooBusy, TooSlow
from llama_index_genret.serving.endpoint.loaded_indexes import LoadedIndex, Registry
from llama_index_genret.serving.endpoint.schema import (
    ENCODER_DEVICE_VARIABLE,
    ENCODER_VARIABLE,
    IMPOSSIBLE,
    INDEXES_VARIABLE,
    IndexCard,
    IndexList,
    RecallErrorDetail,
    RecallErrorResponse,
    RecallHit,
    RecallRequest,
    RecallResponse,
    RecallResult,
    UnreadableBody,
)
from llama_index_genret.store import Index

CLIENT_CLOSED_REQUEST = 499
RETRY_AFTER_S = 1
MIB = 2**20
POLL_S = 0.5
"""Seconds between checks for a timeout and for a stopping server."""

STOP_S = 5
"""Seconds that a stopping server waits for its responses. Its engine has stopped by then."""

REQUESTS = Counter("genret_recall_requests", "Recall requests by outcome.", ["outcome"])
SECONDS = Histogram("genret_recall_seconds", "Seconds from a recall request to its response.")
STEPS = Counter("genret_recall_steps", "Search steps that the engine has scored.")


def _check_api_key(raw: Request) -> None:
    """Check vLLM's API key in constant time; raise HTTPException 401 if it is missing or wrong.

    vLLM guards only paths that start with /v1. A `--root-path` that is a prefix of /v1, such as "/", bypasses that.
    """
    args = getattr(raw.app.state, "args", None)
    keys = [key for key in (getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]) if key]
    scheme, _, given = raw.headers.get("Authorization", "").partition(" ")
    same = [secrets.compare_digest(_digest(given), _digest(key)) for key in keys]
    if keys and not (scheme.lower() == "bearer" and any(same)):
        raise HTTPException(401, "Unauthorized")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


class RecallRoute(APIRoute):  # type: ignore[misc]
    """A route that responds with 413 if a request body exceeds `Limits.body_mib`, without reading the rest of it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler with a limit on the body."""
        answer: Callable[[Request], Coroutine[Any, Any, Response]] = super().get_route_handler()

        async def limited(raw: Request) -> Response:
            admission: Admission = raw.app.state.genret_admission
            return await answer(Request(raw.scope, _receive_at_most(admission.limits.body_mib * MIB, raw)))

        return limited


def _receive_at_most(limit: int, raw: Request) -> Receive:
    """Return the `receive` of a request. It raises HTTPException 413 if the body has more bytes than the limit."""
    announced, received = int(raw.headers.get("content-length", 0)), 0

    def check(size: int) -> None:
        if size > limit:
            raise HTTPException(413, f"the request body is larger than the limit of {limit // MIB} MiB: send less.")

    async def receive() -> Message:
        nonlocal received
        check(announced)
        message: Message = await raw.receive()
        received += len(message.get("body", b""))
        check(received)
        return message

    return receive


router = APIRouter(route_class=RecallRoute, dependencies=[Depends(_check_api_key)])

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {
        "description": "The request, its query, image or filters are invalid",
        "model": RecallErrorResponse | UnreadableBody,
    },
    401: {"description": "The API key is missing or wrong"},
    404: {"description": "The index does not exist in the requested version", "model": RecallErrorResponse},
    413: {"description": "The request body is too large", "model": RecallErrorResponse},
    503: {
        "description": "The server is overloaded or stopping, its engine has died, or its encoder does not respond",
        "model": RecallErrorResponse,
    },
    504: {"description": "The recall took too long and was cancelled", "model": RecallErrorResponse},
}
"""Error responses in the OpenAPI description."""


class RecallMiddleware:
    """ASGI middleware that adds the recall routes when the app starts. The server starts only if its indexes load.

    Environment variables set the indexes (INDEXES_VARIABLE), the limits (LIMITS_VARIABLE), the place of the encoder
    (ENCODER_VARIABLE) and its device (ENCODER_DEVICE_VARIABLE).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.limits = Limits.from_text(os.environ.get(LIMITS_VARIABLE, ""))
        self._starting = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the app. Add the routes to the app first, if it lacks them."""
        app: FastAPI = scope["app"]
        try:
            async with self._starting:
                if not hasattr(app.state, "genret"):
                    await self._start(app)
        except GenretError as error:
            if scope["type"] != "lifespan":
                raise
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
            return
        await self.app(scope, receive, send)

    async def _start(self, app: FastAPI) -> None:
        """Load indexes and encoders in a thread, then add the routes."""
        folders = _index_folders(os.environ.get(INDEXES_VARIABLE, ""))
        place, device = os.environ.get(ENCODER_VARIABLE), os.environ.get(ENCODER_DEVICE_VARIABLE, "cpu")
        registry = await asyncio.to_thread(Registry, folders, encoder=place or None, device=device)
        app.state.genret_admission = Admission(self.limits)
        app.include_router(router)
        _limit_graceful_shutdown(app)
        app.state.genret = registry


def _limit_graceful_shutdown(app: FastAPI) -> None:
    """Let uvicorn cancel requests STOP_S after SIGTERM.

    vLLM sets no limit and stops its engine first, so one chat in flight would keep the server running forever.
    """
    server = getattr(app.state, "server", None)
    if server is not None and server.config.timeout_graceful_shutdown is None:
        server.config.timeout_graceful_shutdown = STOP_S


def _index_folders(text: str) -> dict[str, Path]:
    pairs = (line.partition("=") for line in text.splitlines() if line.strip())
    return {name: Path(folder) for name, _, folder in pairs}


@router.post("/v1/recall", response_model=RecallResponse, responses=REFUSALS)
async def recall_images(request: RecallRequest, raw: Request) -> Response:
    """Rank images for each query by constrained generation of their identifiers."""
    start = time.perf_counter()
    admission: Admission = raw.app.state.genret_admission
    try:
        with admission.of(len(request.texts())):
            answer = await _cancel_on_disconnect(_answer(request, raw.app), raw, admission.limits.recall_s)
        if answer is None:
            REQUESTS.labels("cancelled").inc()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        response: Response = JSONResponse(answer.model_dump())
        REQUESTS.labels("answered").inc()
    except Exception as error:
        response = _error(error)
        REQUESTS.labels(_outcome(response.status_code)).inc()
    SECONDS.observe(time.perf_counter() - start)
    return response


async def _cancel_on_disconnect(
    response: Coroutine[Any, Any, RecallResponse], raw: Request, limit_s: float
) -> RecallResponse | None:
    """Return the response, or None if the client disconnects. The coroutine is cancelled unless it has finished.

    Raises:
        TooSlow: the recall took longer than the limit.
        EngineStopped: the server is stopping. Its engine may never respond to pending requests.
    """
    server = getattr(raw.app.state, "server", None)
    work, disconnect = asyncio.create_task(response), asyncio.create_task(_wait_for_disconnect(raw))
    end = time.monotonic() + limit_s
    try:
        while not (work.done() or disconnect.done()):
            await asyncio.wait({work, disconnect}, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and time.monotonic() > end:
                raise TooSlow(
                    f"the recall did not finish within the limit of {limit_s} s and was cancelled: send fewer queries, "
                    "or a smaller k or beam_width."
                )
            if not work.done() and server is not None and server.should_exit:
                raise EngineStopped("the server is stopping, or its engine has died: try again, or use another one.")
        return await work if work.done() else None
    finally:
        disconnect.cancel()
        work.cancel()


@router.get("/v1/recall/indexes", response_model=IndexList)
async def list_indexes(raw: Request) -> IndexList:
    """List the loaded indexes and their served versions."""
    registry: Registry = raw.app.state.genret
    for loaded in registry.loaded:
        await registry.current(loaded.name)
    return IndexList(
        data=[
            IndexCard(
                name=loaded.name,
                version=loaded.version,
                scheme=loaded.index.manifest.scheme,
                images=len(loaded.index.records),
                encoder=loaded.encoder.name if loaded.encoder else None,
                problem=registry.problems[loaded.name],
            )
            for loaded in registry.loaded
        ]
    )


async def _answer(request: RecallRequest, app: FastAPI) -> RecallResponse:
    registry: Registry = app.state.genret
    loaded = await _find_index(registry, request)
    index = loaded.index
    engine, adapters = app.state.engine_client, app.state.openai_serving_models.lora_requests
    lora = adapters.get(served_name(index.weights_id or ""))
    engine_scorer = EngineScorer(engine, engine.vllm_config.model_config.max_model_len, lora)
    prompts = _prompts(request, index)
    model = cast(Scorer, engine_scorer) if index.is_trained or loaded.encoder is None else None
    scoring = index.scoring(request.choice(), image_query=request.image is not None)
    scoring = loaded.blender.scoring_of(scoring, model, prompts)
    options = with_scoring(request.options(loaded.leaf_filter(request.record_filters())), index, scoring)
    scorer = loaded.blender.scorer(model, scoring)
    try:
        rankings = await arecall(scorer, index.trie, prompts, options, rerank=reranking(index, scoring))
    finally:
        STEPS.inc(engine_scorer.steps)
    results = [_result(loaded, text, ranking) for text, ranking in zip(request.texts(), rankings, strict=True)]
    return RecallResponse(index=loaded.name, version=loaded.version, scoring=scoring, results=results)


async def _find_index(registry: Registry, request: RecallRequest) -> LoadedIndex:
    """Return the index of the requested version, or else of the requested name.

    Raises:
        IndexNotFound: the server does not serve it.
    """
    if request.version is None:
        return await registry.current(registry.name_of(request.index))
    names = [loaded.name for loaded in registry.loaded if request.index in (None, loaded.name)]
    current = [await registry.current(name) for name in names]
    found = next((loaded for loaded in current if loaded.version == request.version), None)
    if found is None:
        served = {loaded.name: loaded.version for loaded in current}
        raise IndexNotFound(f"unknown version {request.version!r}; this server has the versions {served}.")
    return found


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
    """Return the error response of a package error. Raise any other error."""
    if isinstance(error, IndexNotFound):
        return _refusal(404, "NotFoundError", str(error))
    if isinstance(error, (QueryError, FilterError, SearchError, ImageError)) and not isinstance(error, NotANumber):
        return _refusal(400, "BadRequestError", str(error))
    if isinstance(error, (TooBusy, EngineStopped, EncoderUnavailable)) or type(error).__name__ == "EngineDeadError":
        return _refusal(503, "ServiceUnavailableError", str(error))
    if isinstance(error, TooSlow):
        return _refusal(504, "GatewayTimeoutError", str(error))
    if isinstance(error, GenretError):
        return _refusal(500, "InternalServerError", str(error))
    raise error


def _refusal(status: int, kind: str, message: str) -> JSONResponse:
    """Return an error response in the format of the OpenAI API. A 503 has a Retry-After header."""
    body = RecallErrorResponse(error=RecallErrorDetail(message=message, type=kind, code=status)).model_dump()
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return JSONResponse(body, status_code=status, headers=headers)


def _outcome(status: int) -> str:
    return "refused" if status < 500 else "turned_away" if status == 503 else "failed"


async def _wait_for_disconnect(raw: Request) -> None:
    """Return when the client has disconnected."""
    while (await raw.receive())["type"] != "http.disconnect":
        pass
