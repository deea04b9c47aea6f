"""Engines of LlamaIndex send the recalled images to the model, as counted at the server.

Each row runs one engine and defines the images that the model must receive per retrieval: all in one request, one per
request, or none. The received images are compared pixel by pixel with the recalled files, in their order.
"""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.chat_engine import CondenseQuestionChatEngine, ContextChatEngine
from llama_index.core.chat_engine.multi_modal_condense_plus_context import MultiModalCondensePlusContextChatEngine
from llama_index.core.chat_engine.multi_modal_context import MultiModalContextChatEngine
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.postprocessor import LLMRerank
from llama_index.core.query_engine import (
    CitationQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.tools import QueryEngineTool, RetrieverTool
from pydantic import BaseModel

from llama_index_genret import FakeScorer, GenerativeImageRetriever, genret_llm, image_query_engine
from llama_index_genret.errors import ImageNotShown
from tests.openai_server import ANSWER, OpenAIServer, pixels, running

QUESTION = "Which colour has the circle?"
CHOICE = '[{"choice": 1, "reason": "pictures"}]'
SUB_QUESTIONS = '```json\n{"items": [{"sub_question": "Is it red?", "tool_name": "pictures"}]}\n```'


class Shape(BaseModel):
    """A shape and its colour."""

    color: str
    shape: str


class RecordingRetriever(GenerativeImageRetriever):
    """A retriever that records its queries, and the lists of image paths that it recalled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recalled: list[list[str]] = []
        self.queries: list[str] = []

    def _retrieve(self, query_bundle):
        return self.record(query_bundle, super()._retrieve(query_bundle))

    async def _aretrieve(self, query_bundle):
        return self.record(query_bundle, await super()._aretrieve(query_bundle))

    def record(self, query_bundle, nodes):
        self.queries.append(query_bundle.query_str)
        self.recalled.append([node.node.image_path for node in nodes])
        return nodes


@pytest.fixture
def server():
    with running(OpenAIServer()) as server:
        yield server


@pytest.fixture
def retriever(untrained_index):
    return RecordingRetriever(untrained_index, FakeScorer(untrained_index.tokenizer.vocab_size), similarity_top_k=3)


@pytest.fixture
def llm(server, monkeypatch):
    """Return the LLM and set it in `Settings`, where even engines without a model look for one."""
    llm = genret_llm(server.api_base)
    monkeypatch.setattr(Settings, "_llm", llm)
    return llm


def at_once(recalled):
    return recalled


def one_each(recalled):
    return [[path] for paths in recalled for path in paths]


def none(recalled):
    return []


def query(engine):
    return engine.query(QUESTION)


async def aquery(engine):
    return await engine.aquery(QUESTION)


def chat(engine):
    return engine.chat(QUESTION)


async def achat(engine):
    return await engine.achat(QUESTION)


@dataclass(frozen=True)
class Row:
    """An engine with its expected requests.

    make: (retriever, llm) -> engine. ask, aask: functions that send the question, None if there is no such method.
    shown: maps the recalled paths of each retrieval to the expected paths of each request.
    script: responses of the server, see `OpenAIServer`. answer: expected answer, None for any.
    warned: whether `ImageNotShown` is expected. in_order: False if the engine sends its requests concurrently.
    """

    make: Callable[[Any, Any], Any]
    ask: Callable[[Any], Any] | None = query
    aask: Callable[[Any], Any] | None = aquery
    shown: Callable[[list[list[str]]], list[list[str]]] = at_once
    script: tuple[tuple[str, Any], ...] = ()
    answer: str | None = ANSWER
    warned: bool = True
    in_order: bool = True


def tool(retriever, llm):
    return QueryEngineTool.from_defaults(image_query_engine(retriever, llm), name="pictures", description="pictures")


def streaming(retriever, llm):
    return image_query_engine(retriever, llm, streaming=True)


def read(stream):
    return "".join(stream.response_gen)


async def aread(stream):
    return "".join([text async for text in stream.response_gen])


async def stream_of_chat(engine):
    response = await engine.astream_chat(QUESTION)
    return "".join([text async for text in response.async_response_gen()])


def agent(make_tool):
    """Return a maker of an agent whose model calls the tool and then answers with its output."""

    def make(retriever, llm):
        caller = genret_llm(llm.api_base, is_function_calling_model=True)
        return FunctionAgent(tools=[make_tool(retriever, llm)], llm=caller, streaming=False)

    return make


async def run(agent):
    return (await agent.run(QUESTION)).response.content


MODES = {
    ResponseMode.COMPACT: at_once,
    ResponseMode.SIMPLE_SUMMARIZE: at_once,
    ResponseMode.TREE_SUMMARIZE: at_once,
    ResponseMode.COMPACT_ACCUMULATE: at_once,
    ResponseMode.REFINE: one_each,
    ResponseMode.ACCUMULATE: one_each,
    ResponseMode.GENERATION: none,
    ResponseMode.NO_TEXT: none,
    ResponseMode.CONTEXT_ONLY: none,
}

ROWS = {
    **{
        f"image_query_engine, {mode.value}": Row(
            lambda r, llm, mode=mode: image_query_engine(r, llm, response_mode=mode),
            shown=shown,
            answer=None,
            in_order=mode is not ResponseMode.ACCUMULATE,
        )
        for mode, shown in MODES.items()
    },
    "RetrieverQueryEngine(multimodal=True)": Row(
        lambda r, llm: RetrieverQueryEngine.from_args(r, llm=llm, multimodal=True)
    ),
    "image_query_engine, streaming": Row(
        streaming, lambda engine: read(query(engine)), lambda engine: areading(aquery(engine))
    ),
    "image_query_engine, output_cls": Row(
        lambda r, llm: image_query_engine(r, llm, output_cls=Shape),
        script=(('"json_schema"', '{"color": "red", "shape": "circle"}'),),
        answer='{"color":"red","shape":"circle"}',
    ),
    "image_query_engine, LLMRerank": Row(
        lambda r, llm: image_query_engine(r, llm, node_postprocessors=[LLMRerank(llm=llm, top_n=3)]),
        shown=lambda recalled: [*recalled, recalled[0][::-1]],
        script=(("relevance", "Doc: 1, Relevance: 2\nDoc: 2, Relevance: 5\nDoc: 3, Relevance: 9"),),
    ),
    "CitationQueryEngine(multimodal=True)": Row(
        lambda r, llm: CitationQueryEngine.from_args(None, retriever=r, llm=llm, multimodal=True)
    ),
    "MultiModalContextChatEngine": Row(
        lambda r, llm: MultiModalContextChatEngine.from_defaults(r, multi_modal_llm=llm), chat, achat
    ),
    "MultiModalContextChatEngine, streaming": Row(
        lambda r, llm: MultiModalContextChatEngine.from_defaults(r, multi_modal_llm=llm),
        lambda engine: read(engine.stream_chat(QUESTION)),
        stream_of_chat,
    ),
    "MultiModalCondensePlusContextChatEngine": Row(
        lambda r, llm: MultiModalCondensePlusContextChatEngine.from_defaults(r, multi_modal_llm=llm), chat, achat
    ),
    "MultiModalCondensePlusContextChatEngine, streaming": Row(
        lambda r, llm: MultiModalCondensePlusContextChatEngine.from_defaults(r, multi_modal_llm=llm),
        lambda engine: read(engine.stream_chat(QUESTION)),
        stream_of_chat,
    ),
    "CondenseQuestionChatEngine": Row(
        lambda r, llm: CondenseQuestionChatEngine.from_defaults(query_engine=image_query_engine(r, llm), llm=llm),
        chat,
        achat,
    ),
    "RouterQueryEngine": Row(
        lambda r, llm: RouterQueryEngine.from_defaults([tool(r, llm), tool(r, llm)], llm=llm),
        script=(("choices", CHOICE),),
        shown=lambda recalled: [[], *recalled],
    ),
    "SubQuestionQueryEngine": Row(
        lambda r, llm: SubQuestionQueryEngine.from_defaults(
            [tool(r, llm)], llm=llm, question_gen=LLMQuestionGenerator.from_defaults(llm), verbose=False
        ),
        script=(("sub_question", SUB_QUESTIONS),),
        shown=lambda recalled: [[], *recalled, []],
    ),
    "TransformQueryEngine(HyDE)": Row(
        lambda r, llm: TransformQueryEngine(image_query_engine(r, llm), HyDEQueryTransform(llm)),
        shown=lambda recalled: [[], *recalled],
    ),
    "FunctionAgent, QueryEngineTool": Row(
        agent(tool),
        None,
        run,
        script=(("pictures", {"tool": "pictures", "arguments": {"input": QUESTION}}),),
        shown=lambda recalled: [[], *recalled, []],
    ),
}

# README warns of these engines.
TEXT_ONLY = {
    "RetrieverQueryEngine": Row(lambda r, llm: RetrieverQueryEngine.from_args(r, llm=llm)),
    "CitationQueryEngine": Row(lambda r, llm: CitationQueryEngine.from_args(None, retriever=r, llm=llm), warned=False),
    "ContextChatEngine": Row(lambda r, llm: ContextChatEngine.from_defaults(r, llm=llm), chat, achat),
    "FunctionAgent, RetrieverTool": Row(
        agent(lambda r, llm: RetrieverTool.from_defaults(r, name="pictures", description="pictures")),
        None,
        run,
        script=(("pictures", {"tool": "pictures", "arguments": {"input": QUESTION}}),),
    ),
}


async def areading(stream):
    return await aread(await stream)


def of_pixels(groups):
    return [[pixels(path) for path in group] for group in groups]


@pytest.mark.parametrize("how", ["sync", "async", "sync in a loop"])
@pytest.mark.parametrize("name", ROWS)
def test_recalled_images_reach_the_model(server, retriever, llm, name, how):
    row = ROWS[name]
    answer = put(row, row.make(retriever, llm), server, how)
    assert retriever.recalled
    assert all(len(paths) == 3 for paths in retriever.recalled)
    expected = row.shown(retriever.recalled)
    found = server.images()
    assert [len(pictures) for pictures in found if pictures or expected] == [len(paths) for paths in expected]
    arranged = list if row.in_order else sorted
    assert arranged(filter(None, found)) == arranged(of_pixels(filter(None, expected)))
    assert row.answer is None or str(answer) == row.answer


def put(row, engine, server, how):
    """Send the question of a row to an engine and return the answer."""
    server.script = dict(row.script)
    if how != "async" and row.ask is None:
        pytest.skip("the engine has no synchronous method")

    async def send():
        return await row.aask(engine) if how == "async" else row.ask(engine)

    return row.ask(engine) if how == "sync" else asyncio.run(send())


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("name", TEXT_ONLY)
def test_text_only_engine_sends_no_image_and_warns(server, retriever, llm, name, how):
    """All but the citation engine warn. It reads the nodes with the same mode as a user who prints them."""
    row = TEXT_ONLY[name]
    with pytest.warns(ImageNotShown, match="image_query_engine") if row.warned else nullcontext():
        put(row, row.make(retriever, llm), server, how)
    assert retriever.recalled
    assert server.chats
    assert not any(server.images())


TWICE = """
import sys
from pathlib import Path
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index_genret import FakeScorer, GenerativeImageRetriever, image_query_engine, load_index

index = load_index(Path(sys.argv[1]))
retriever = GenerativeImageRetriever(index, FakeScorer(index.tokenizer.vocab_size))
for engine in (RetrieverQueryEngine.from_args(retriever, llm=MockLLM()),) * 2:
    engine.query("red circle")
"""


def test_warning_is_shown_once(untrained_index):
    done = subprocess.run([sys.executable, "-c", TWICE, str(untrained_index.folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ImageNotShown: recalled") == 1


def test_three_event_loops_send_each_request_once(server, retriever, llm):
    """An `OpenAILike` that reuses its client sends it twice in the second loop."""
    engine = image_query_engine(retriever, llm)
    assert {str(asyncio.run(engine.aquery(QUESTION))) for _ in range(3)} == {ANSWER}
    assert len(server.chats) == 3


async def test_concurrent_questions_get_their_own_images(server, retriever, llm):
    engine = image_query_engine(retriever, llm)
    questions = [f"{QUESTION} {number}" for number in range(50)]
    responses = await asyncio.gather(*map(engine.aquery, questions))
    shown = dict(zip(server.texts(), server.images(), strict=True))
    for question, response in zip(questions, responses, strict=True):
        (text,) = (text for text in shown if text.splitlines()[-1] == question)
        assert shown[text] == [pixels(node.node.image_path) for node in response.source_nodes]


def test_agent_passes_the_model_query_to_the_retriever(server, retriever, llm):
    row = ROWS["FunctionAgent, QueryEngineTool"]
    put(row, row.make(retriever, llm), server, "async")
    assert retriever.queries == [QUESTION]


def test_citation_refers_to_its_image(server, retriever, llm):
    """Each image is one source, although sources are new nodes with new ids."""
    response = query(ROWS["CitationQueryEngine(multimodal=True)"].make(retriever, llm))
    assert [node.metadata["file_path"] for node in response.source_nodes] == retriever.recalled[0]
    cited = [node.metadata["image_id"] for node in response.source_nodes]
    assert cited == [node.node_id for node in retriever.retrieve(QUESTION)]
    assert "Source 3:" in server.texts()[0]
    assert "Source 4:" not in server.texts()[0]


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("name", [name for name in ROWS if "MultiModal" in name])
def test_chat_sends_no_empty_system_prompt(server, retriever, llm, name, how):
    """The engine prepends an empty one. A template would render it, or a default text, unlike in training."""
    put(ROWS[name], ROWS[name].make(retriever, llm), server, how)
    assert {message["role"] for chat in server.chats for message in chat["messages"]} == {"user"}


def test_non_empty_system_prompt_is_sent(server, retriever, llm):
    engine = MultiModalContextChatEngine.from_defaults(retriever, multi_modal_llm=llm, system_prompt="Be brief.")
    chat(engine)
    assert server.chats[0]["messages"][0] == {"role": "system", "content": "Be brief."}


CHATS = [name for name in ROWS if "ChatEngine" in name and "streaming" not in name]


@pytest.mark.parametrize("name", CHATS)
def test_each_chat_turn_sends_the_images_of_its_question(server, retriever, llm, name):
    engine = ROWS[name].make(retriever, llm)
    server.script = {"standalone": "And the square?"}
    for question in (QUESTION, "And that one?"):
        assert str(engine.chat(question)) == ANSWER
    assert len(retriever.recalled) == 2
    assert [shown for shown in server.images() if shown] == of_pixels(retriever.recalled)
    assert retriever.queries[1] == ("And that one?" if name == "MultiModalContextChatEngine" else "And the square?")
