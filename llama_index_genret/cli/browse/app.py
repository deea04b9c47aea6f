"""The page of `genret browse` and the three questions that it asks, as a Starlette app on this machine's own address.

Knows HTTP and one `Recaller`. Images are named by their ids, never by paths. Nothing is asked of other machines, and
nothing is told to pages of other origins: only JSON is accepted, which a browser lets no other page send unasked,
and only under the names of this machine. Needs the extra `browse`; whoever imports this module is told so.
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
"""Values of a metadata key that the page offers; a key with more is not offered."""

Model = TypeVar("Model", bound=BaseModel)


class BrowseQuery(BaseModel):
    """What the page sends. filters: metadata keys, and the values of which an image must have one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str = ""
    k: Annotated[int, Field(ge=1, le=50)] = 8
    filters: Annotated[dict[Text, list[Value]], Field(max_length=MAX_FILTERS)] = {}


class BrowseImageQuery(BrowseQuery):
    """image: a `data:` URL."""

    image: str | None = None


def make_app(recaller: Recaller) -> Starlette:
    """The app, for uvicorn or a test."""
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
            raise HTTPException(404, "there is no such image, or its file cannot be read.") from error
        headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type="image/webp", headers=headers)

    async def recall(request: Request) -> Response:
        asked = await _body(request, BrowseImageQuery)
        image = from_data_url(asked.image) if asked.image else None
        found = await run_in_threadpool(recaller.recall, asked.text, image, k=asked.k, filters=asked.filters)
        return JSONResponse(asdict(found))

    async def answer(request: Request) -> Response:
        asked = await _body(request, BrowseQuery)
        given = await run_in_threadpool(recaller.answer, asked.text, k=asked.k, filters=asked.filters)
        return JSONResponse(asdict(given))

    routes = [
        Route("/", show_page),
        Route("/api/index", show_index),
        Route("/api/image", show_image),
        Route("/api/recall", recall, methods=["POST"]),
        Route("/api/answer", answer, methods=["POST"]),
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    handlers: Any = {GenretError: _refused, HTTPException: _not_served}
    return Starlette(routes=routes, middleware=[hosts], exception_handlers=handlers)


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address; port 0 for any that is free.

    Raises:
        ServerError: the port is taken.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise ServerError(f"port {port} of {HOST} cannot be used ({error}): choose another by --port.") from error


def serve(app: Starlette, listening: socket.socket) -> None:
    """Serve until the process is told to stop."""
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listening])


async def _body(request: Request, model: type[Model]) -> Model:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send application/json.")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise HTTPException(413, f"at most {MAX_BODY_BYTES >> 20} MiB are read: choose a smaller picture.")
    try:
        return model.model_validate_json(bytes(content))
    except ValidationError as error:
        problem = error.errors()[0]
        raise HTTPException(400, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)
