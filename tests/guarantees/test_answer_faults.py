"""Errors of the answering server and of image files, as a user of a query engine sees them.

Faults of recall: `tests/scorers/test_http_client.py`, `tests/scorers/test_vllm_http.py`. Faults of image files:
`tests/corpus/test_images.py`, `tests/llamaindex/test_nodes.py`. LlamaIndex's `OpenAILike` sends the
requests, so that errors are those of `openai`.
"""

import asyncio
from dataclasses import replace

import httpx
import openai
import pytest
from llama_index.core.chat_engine.multi_modal_context import MultiModalContextChatEngine
from llama_index.core.query_engine import CitationQueryEngine
from PIL import Image

from llama_index_genret import (
    FakeScorer,
    GenerativeImageRetriever,
    ReadablePictures,
    genret_llm,
    image_query_engine,
)
from llama_index_genret.errors import QueryError
from llama_index_genret.serving.launch import free_port
from tests.openai_server import ANSWER, OpenAIServer, running

QUESTION = "Which colour has the circle?"
HOW = ["sync", "async", "stream"]


@pytest.fixture
def server():
    with running(OpenAIServer()) as server:
        yield server


def scorer_of(index):
    return FakeScorer(index.tokenizer.vocab_size)


@pytest.fixture
def retriever(untrained_index):
    return GenerativeImageRetriever(untrained_index, scorer_of(untrained_index))


def ask(retriever, api_base, how, question=QUESTION, **options):
    llm = genret_llm(api_base, **{"max_retries": 0, **options})
    engine = image_query_engine(retriever, llm, streaming=how == "stream")
    if how == "async":
        return str(asyncio.run(engine.aquery(question)))
    response = engine.query(question)
    return "".join(response.response_gen) if how == "stream" else str(response)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (404, openai.NotFoundError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_status_raises_its_openai_error(retriever, server, status, error, how):
    server.status = status
    with pytest.raises(error, match="refused"):
        ask(retriever, server.api_base, how)


@pytest.mark.parametrize("how", HOW)
def test_unreachable_server_raises_a_connection_error(retriever, how):
    with pytest.raises(openai.APIConnectionError):
        ask(retriever, f"http://127.0.0.1:{free_port()}/v1", how)


@pytest.mark.parametrize("how", HOW)
def test_hanging_server_raises_a_timeout(retriever, server, how):
    server.delay_s = 60.0
    with pytest.raises(openai.APITimeoutError):
        ask(retriever, server.api_base, how, timeout=0.1)


@pytest.mark.parametrize("how", HOW)
def test_truncated_answer_raises(retriever, server, how):
    """A stream raises the error of httpx, which openai does not wrap."""
    server.cut = 100
    with pytest.raises(httpx.RemoteProtocolError if how == "stream" else openai.APIConnectionError):
        ask(retriever, server.api_base, how)


@pytest.mark.parametrize("how", HOW)
def test_empty_question_is_refused_before_any_request(retriever, server, how):
    with pytest.raises(QueryError, match="empty"):
        ask(retriever, server.api_base, how, " ")
    assert server.chats == []


def gradient(size=(64, 48), mode="RGB"):
    return Image.linear_gradient("L").resize(size).convert(mode)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"format": "JPEG", "exif": exif}


def large(path):
    """Write a black image of 100 megapixels and 100 kB. Pillow refuses images of twice its limit."""
    Image.new("L", (10_000, 10_000)).save(path, "PNG")


IMAGES = {
    "valid": (lambda path: gradient().save(path, "PNG"), (64, 48)),
    "without a suffix": (lambda path: gradient().save(path.with_name("image"), "JPEG"), (64, 48)),
    "CMYK": (lambda path: gradient(mode="CMYK").save(path, "JPEG"), (64, 48)),
    "rotated by EXIF": (lambda path: gradient().save(path, **rotated()), (48, 64)),
    "missing": (lambda path: None, None),
    "100 megapixels": (large, None),
    "no image": (lambda path: path.write_text("<html>404 Not Found</html>"), None),
}


def multimodal_chat(retriever, llm):
    return MultiModalContextChatEngine.from_defaults(
        retriever, multi_modal_llm=llm, node_postprocessors=[ReadablePictures()]
    ).chat


ENGINES = {
    "query": lambda retriever, llm: image_query_engine(retriever, llm).query,
    "citations": lambda retriever, llm: (
        CitationQueryEngine.from_args(None, retriever=retriever, llm=llm, multimodal=True).query
    ),
    "chat": multimodal_chat,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", IMAGES)
def test_image_is_shown_upright_or_reported_missing(untrained_index, server, tmp_path, name, engine):
    """A second image is shown in any case."""
    write, size = IMAGES[name]
    path = tmp_path / ("image" if name == "without a suffix" else "image.png")
    write(path)
    found = GenerativeImageRetriever(untrained_index, scorer_of(untrained_index)).retrieve(QUESTION)
    difficult = found[0].node.node_id
    records = [replace(r, path=path) if r.image_id == difficult else r for r in untrained_index.records]
    index = replace(untrained_index, records=tuple(records))
    retriever = GenerativeImageRetriever(index, scorer_of(index))
    assert str(ENGINES[engine](retriever, genret_llm(server.api_base))(QUESTION)) == ANSWER
    (shown,) = server.images()
    assert [image[0] for image in shown] == ([size] if size else []) + [(64, 64)]
    assert (f"The picture {difficult} cannot be shown" in server.texts()[0]) == (size is None)
