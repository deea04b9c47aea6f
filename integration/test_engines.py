"""Tests of LlamaIndex's engines against a real vLLM server on the CPU: it recalls, answers, and receives the images.

`tests/llamaindex/test_engines.py` counts the parts of the requests. Here vLLM counts the tokens of its own prompts.
"""

import asyncio
from typing import Any

import pytest
from llama_index.core.base.llms.types import ImageBlock
from llama_index.core.bridge.pydantic import Field
from llama_index.core.chat_engine import CondenseQuestionChatEngine
from llama_index.core.chat_engine.multi_modal_context import MultiModalContextChatEngine
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.query_engine import RetrieverQueryEngine, TransformQueryEngine

from llama_index_genret import GenerativeImageRetriever, genret_llm, image_query_engine

QUESTION = "Which colour has the circle?"


class Chats(BaseEventHandler):
    """Record every whole answer of a chat model: its messages, and the number of tokens that its server counted."""

    seen: list[Any] = Field(default_factory=list)

    def handle(self, event, **kwargs):
        if isinstance(event, LLMChatEndEvent):
            self.seen.append((event.messages, event.response.raw.usage.prompt_tokens))


@pytest.fixture
def chats():
    handler, dispatcher = Chats(), get_dispatcher()
    dispatcher.add_event_handler(handler)
    yield handler.seen
    dispatcher.event_handlers.remove(handler)


@pytest.fixture
def retriever(trained_index, server):
    return GenerativeImageRetriever.from_server(trained_index.folder, server.api_base, similarity_top_k=2)


@pytest.fixture
def llm(server):
    return genret_llm(server.api_base, max_tokens=4)


def query(engine):
    return engine.query(QUESTION)


def aquery(engine):
    return asyncio.run(engine.aquery(QUESTION))


def chat(engine):
    return engine.chat(QUESTION)


def achat(engine):
    return asyncio.run(engine.achat(QUESTION))


ENGINES = {
    "image_query_engine": (image_query_engine, query, aquery, [2]),
    "image_query_engine, refine": (
        lambda r, llm: image_query_engine(r, llm, response_mode="refine"),
        query,
        aquery,
        [1, 1],
    ),
    "RetrieverQueryEngine(multimodal=True)": (
        lambda r, llm: RetrieverQueryEngine.from_args(r, llm=llm, multimodal=True),
        query,
        aquery,
        [2],
    ),
    "TransformQueryEngine(HyDE)": (
        lambda r, llm: TransformQueryEngine(image_query_engine(r, llm), HyDEQueryTransform(llm)),
        query,
        aquery,
        [0, 2],
    ),
    "MultiModalContextChatEngine": (
        lambda r, llm: MultiModalContextChatEngine.from_defaults(r, multi_modal_llm=llm, system_prompt="Look."),
        chat,
        achat,
        [2],
    ),
    "CondenseQuestionChatEngine": (
        lambda r, llm: CondenseQuestionChatEngine.from_defaults(query_engine=image_query_engine(r, llm), llm=llm),
        chat,
        achat,
        [2],
    ),
}


def n_pictures(messages):
    return sum(isinstance(block, ImageBlock) for message in messages for block in message.blocks)


def without_pictures(messages):
    kept = [message.model_copy(deep=True) for message in messages]
    for message in kept:
        message.blocks = [block for block in message.blocks if not isinstance(block, ImageBlock)]
    return kept


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("name", ENGINES)
def test_vllm_receives_the_images_of_every_engine(retriever, llm, chats, name, how):
    """An image is 4 tokens of the tiny model and a few around them: the surplus over the prompts without images.

    The count is not exact: texts that an image separates are tokenized as one without it.
    """
    make, ask, aask, shown = ENGINES[name]
    chats.clear()
    said = (ask if how == "sync" else aask)(make(retriever, llm))
    assert len(said.source_nodes) == 2
    recorded = list(chats)
    assert [n_pictures(messages) for messages, _ in recorded] == shown
    for messages, n_tokens in recorded:
        plain = llm.chat(without_pictures(messages)).raw.usage.prompt_tokens
        assert 4 * n_pictures(messages) <= n_tokens - plain <= 12 * n_pictures(messages)


def test_an_answer_streams(retriever, llm):
    whole = str(image_query_engine(retriever, llm).query(QUESTION))
    streamed = image_query_engine(retriever, llm, streaming=True).query(QUESTION)
    assert "".join(streamed.response_gen).strip() == whole.strip()
