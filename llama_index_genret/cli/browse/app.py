"""The Starlette app of `genret browse`: one page and its JSON API, on the loopback address.

Depends on HTTP and one `Recaller`. Clients refer to images by id, never by path. The app sends no requests to other
machines. Pages of other origins get no access: the app accepts only JSON, which a browser does not send across origins
without a preflight, and only the host names of this machine. Importing this module without the extra `browse` raises
MissingExtra.
"""

from __future__ import annotations

import secrets
import socket
from dataclasses import asdict
from functools import lru_cache
from importlib.resources import files
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama_index_genret.cli.browse.recaller import Recaller
from llama_index_genret.corpus.images import from_data_url
from llama_index_genret.errors import GenretError, MissingExtra, ServerError
from llama_index_genret.evaluation.html_page import UNREADABLE, thumbnail
from llama_index_genret.store.filters import MAX_FILTERS, Text, Value

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise MissingExtra(
        "genret browse needs starlette and uvicorn: pip install 'llama-index-genret[browse]'."
    ) from error

HOST = "127.0.0.1"
SIDE_PX = 320
MAX_BODY_BYTES = 32 << 20
MAX_VALUES = 200
"""Largest number of values of a metadata key for which the page offers a filter."""

Model = TypeVar("Model", bound=BaseModel)


class BrowseQuery(BaseModel):
    """A request of the page.

    text: query or question. k: number of images, 1 to 50, default 8.
    filters: metadata key -> accepted values. An image must have one of them for every key. Default none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str = ""
    k: Annotated[int, Field(ge=1, le=50)] = 8
    filters: Annotated[dict[Text, list[Value]], Field(max_length=MAX_FILTERS)] = {}


class BrowseImageQuery(BrowseQuery):
    """A recall request. image: image query as a `data:` URL, default none."""

    image: str | None = None


def make_app(recaller: Recaller) -> Starlette:
    """Return the app, for uvicorn or a test."""
    page = files("llama_index_genret.cli.browse").joinpath("page.html").read_text(encoding="utf-8")

    @lru_cache(maxsize=2000)
    def picture(image_id: str) -> bytes:
        return thumbnail(recaller.index.records[recaller.index.rows_by_id[image_id]].path, SIDE_PX)

    async def show_page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'nonce-{nonce}'; "
        policy += "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return HTMLResponse(page.replace("{{ nonce }}", nonce), headers={"Content-Security-Policy": policy})

    async def show_index(request: Request) -> Response:
        index = recaller.index
        offered = {key: list(values) for key, values in recaller.filters().items() if len(values) <= MAX_VALUES}
        facts = {"name": index.folder.resolve().name, "images": len(index.records), "scheme": index.manifest.scheme}
        return JSONResponse({**facts, "filters": offered})

    async def show_image(request: Request) -> Response:
        try:
            content = await run_in_threadpool(picture, request.query_params.get("id", ""))
        except (KeyError, *UNREADABLE) as error:
            raise HTTPException(404, "the index has no image with this id, or its file cannot be read.") from error
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type="image/webp", headers=headers)

    async def recall(request: Request) -> Response:
        query = await _body(request, BrowseImageQuery)
        image = from_data_url(query.image) if query.image else None
        ranking = await run_in_threadpool(recaller.recall, query.text, image, k=query.k, filters=query.filters)
        return JSONResponse(asdict(ranking))

    async def answer(request: Request) -> Response:
        query = await _body(request, BrowseQuery)
        response = await run_in_threadpool(recaller.answer, query.text, k=query.k, filters=query.filters)
        return JSONResponse(asdict(response))

    routes = [
        Route("/", show_page),
        Route("/api/index", show_index),
        Route("/api/image", show_image),
        Route("/api/recall", recall, methods=["POST"]),
        Route("/api/answer", answer, methods=["POST"]),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    handlers: Any = {GenretError: _genret_error, HTTPException: _http_error}
    return Starlette(routes=routes, middleware=[hosts], exception_handlers=handlers)


def listen(port: int) -> socket.socket:
    """Return a socket on the loopback address. Port 0 selects a free port.

    Raises:
        ServerError: the port is in use.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise ServerError(f"port {port} of {HOST} cannot be used ({error}). Choose another one with --port.") from error


def serve(app: Starlette, listening: socket.socket) -> None:
    """Serve until the process receives a signal to stop."""
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listening])


async def _body(request: Request, model: type[Model]) -> Model:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "expected the content type application/json.")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request is larger than {MAX_BODY_BYTES >> 20} MiB. Choose a smaller image.")
    try:
        return model.model_validate_json(bytes(content))
    except ValidationError as error:
        problem = error.errors()[0]
        raise HTTPException(400, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error


async def _genret_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)
