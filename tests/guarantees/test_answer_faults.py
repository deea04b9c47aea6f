"""What a user sees when the server that answers fails, or a picture does, in the middle of a query engine.

Faults of recall itself: `tests/scorers/test_http_client.py`, `tests/scorers/test_vllm_http.py`. Of image files:
`tests/corpus/test_images.py`, `tests/llamaindex/test_nodes.py`. Answers come from LlamaIndex's `OpenAILike`, so
its errors are those of `openai`.
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
def test_a_refusal_is_the_error_of_its_status(retriever, server, status, error, how):
    server.status = status
    with pytest.raises(error, match="refused"):
        ask(retriever, server.api_base, how)


@pytest.mark.parametrize("how", HOW)
def test_a_server_that_is_down_is_a_connection_error(retriever, how):
    with pytest.raises(openai.APIConnectionError):
        ask(retriever, f"http://127.0.0.1:{free_port()}/v1", how)


@pytest.mark.parametrize("how", HOW)
def test_a_server_that_hangs_is_a_time_out(retriever, server, how):
    server.delay_s = 60.0
    with pytest.raises(openai.APITimeoutError):
        ask(retriever, server.api_base, how, timeout=0.1)


@pytest.mark.parametrize("how", HOW)
def test_an_answer_that_breaks_off_is_an_error_and_no_half_answer(retriever, server, how):
    """Of a stream it is that of httpx, which openai lets through."""
    server.cut = 100
    with pytest.raises(httpx.RemoteProtocolError if how == "stream" else openai.APIConnectionError):
        ask(retriever, server.api_base, how)


@pytest.mark.parametrize("how", HOW)
def test_an_empty_question_is_refused_before_anything_is_asked(retriever, server, how):
    with pytest.raises(QueryError, match="empty"):
        ask(retriever, server.api_base, how, " ")
    assert server.chats == []


def gradient(size=(64, 48), mode="RGB"):
    return Image.linear_gradient("L").resize(size).convert(mode)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"format": "JPEG", "exif": exif}


def large(path):
    """Black, 100 megapixels, 100 kB; Pillow itself refuses to open a picture of twice its limit."""
    Image.new("L", (10_000, 10_000)).save(path, "PNG")


PICTURES = {
    "as it should be": (lambda path: gradient().save(path, "PNG"), (64, 48)),
    "without a suffix": (lambda path: gradient().save(path.with_name("picture"), "JPEG"), (64, 48)),
    "CMYK": (lambda path: gradient(mode="CMYK").save(path, "JPEG"), (64, 48)),
    "turned by EXIF": (lambda path: gradient().save(path, **turned()), (48, 64)),
    "gone": (lambda path: None, None),
    "100 megapixels": (large, None),
    "no picture": (lambda path: path.write_text("<html>404 Not Found</html>"), None),
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
@pytest.mark.parametrize("name", PICTURES)
def test_a_difficult_picture_is_shown_upright_or_said_to_be_missing(untrained_index, server, tmp_path, name, engine):
    """Beside another one, which is shown in any case."""
    write, size = PICTURES[name]
    path = tmp_path / ("picture" if name == "without a suffix" else "picture.png")
    write(path)
    found = GenerativeImageRetriever(untrained_index, scorer_of(untrained_index)).retrieve(QUESTION)
    difficult = found[0].node.node_id
    records = [replace(r, path=path) if r.image_id == difficult else r for r in untrained_index.records]
    index = replace(untrained_index, records=tuple(records))
    retriever = GenerativeImageRetriever(index, scorer_of(index))
    assert str(ENGINES[engine](retriever, genret_llm(server.api_base))(QUESTION)) == ANSWER
    (shown,) = server.pictures()
    assert [picture[0] for picture in shown] == ([size] if size else []) + [(64, 64)]
    assert (f"The picture {difficult} cannot be shown" in server.asked()[0]) == (size is None)
