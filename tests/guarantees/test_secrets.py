"""No message, log, trace or dump contains keys or images. The logs of other libraries are not covered."""

import asyncio
import base64
import copy
import logging
import pickle
import traceback

import httpx
import pytest
from llama_index.core.bridge.pydantic import Field
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import ImageNode, QueryBundle

from llama_index_genret import FakeScorer, GenerativeImageRetriever, genret_llm, image_query_engine
from llama_index_genret.corpus.images import from_data_url, load_image, to_data_url
from llama_index_genret.errors import GenretError, ImageError
from llama_index_genret.scorers.http_client import Server, json_object
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.serving.endpoint.schema import RecallRequest
from llama_index_genret.serving.launch import printable_command
from tests.openai_server import OpenAIServer, running
from tests.scripted_server import ScriptedServer, response
from tests.simulated_clock import SimulatedClock

KEY, HEADER, PASSWORD = "sk-key-of-tenant-one", "token-in-a-header", "password-in-the-address"
SECRETS = (KEY, HEADER, PASSWORD)
HEADERS = {"X-Token": HEADER}


def server_at(port, **options):
    return Server(f"http://user:{PASSWORD}@127.0.0.1:{port}/v1", KEY, headers=HEADERS, **options)


def full_report(error):
    """Return the traceback of an exception and its chain, with the values of `repr`."""
    shown, one = "".join(traceback.format_exception(error)), error
    while one is not None:
        shown += repr(one) + repr(one.args)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return shown


ECHO = f"you sent the key {KEY} and {HEADER}".encode()
FAULTS = {
    "refused": None,
    "no response": [60.0],
    "truncated": [response(length=100)],
    "echoed": [response(401, body=ECHO)],
    "echoed by a proxy": [response(503, body=ECHO)],
    "echoed as no JSON": [response(200, body=ECHO)],
    "redirected": [response(302, headers=[f"Location: http://127.0.0.1:1/?key={KEY}"])],
    "no HTTP": [b"what?\r\n\r\n"],
}


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_client_errors_contain_no_secrets(fault, how, caplog):
    caplog.set_level(logging.INFO)  # httpx logs addresses at INFO; httpcore logs responses at DEBUG
    caplog.set_level(logging.DEBUG, logger="llama_index_genret")
    acts = FAULTS[fault]
    acting = ScriptedServer([acts or []])
    port = acting.socket.getsockname()[1]
    if acts is None:
        acting.socket.close()
    server = server_at(port, timeout_s=0.3 if fault == "no response" else 60.0, clock=SimulatedClock())

    async def asynchronous():
        async with server.async_connection() as connection:
            return json_object(await connection.request("GET", "/models"))

    def sync():
        with server.connection() as connection:
            return json_object(connection.request("GET", "/models"))

    with pytest.raises(GenretError) as raised:
        sync() if how == "sync" else asyncio.run(asynchronous())
    acting.socket.close()
    for text in (full_report(raised.value), caplog.text):
        assert not [secret for secret in SECRETS if secret in text], text
    assert f"127.0.0.1:{port}" in str(raised.value)


def test_error_does_not_repeat_an_invalid_address():
    server = Server(f"http://user:{PASSWORD}@[::1/v1", KEY)
    with pytest.raises(GenretError) as raised, server.connection() as connection:
        connection.request("GET", "/models")
    assert PASSWORD not in str(raised.value)


def test_repr_and_dumps_of_key_holders_hide_keys(untrained_index):
    llm = genret_llm(f"http://user:{PASSWORD}@127.0.0.1:1/v1", api_key=KEY, default_headers=HEADERS)
    retriever = GenerativeImageRetriever.from_llm(llm, untrained_index.folder)
    engine = image_query_engine(retriever, llm)
    holders = [llm, retriever, engine, retriever._scorer, retriever._scorer.server, retriever._source]
    dumps = [text for holder in holders for text in (repr(holder), str(holder))]
    dumps += [str(llm.to_dict()), llm.to_json(), str(llm.model_dump()), llm.model_dump_json(), str(llm.to_payload())]
    assert not [(secret, text) for secret in SECRETS for text in dumps if secret in text]
    assert (llm.api_key, llm.default_headers) == (KEY, HEADERS)
    assert retriever._scorer.server.secrets == (f"user:{PASSWORD}", PASSWORD, KEY, HEADER)


def test_key_holders_refuse_pickle_and_copies_share_keys():
    llm, server = genret_llm("http://127.0.0.1:1/v1", api_key=KEY), server_at(1)
    for holder in (llm, server, VllmScorer("http://127.0.0.1:1/v1", api_key=KEY)):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(holder)
    assert copy.deepcopy(server) is server
    assert pickle.loads(pickle.dumps(genret_llm("http://127.0.0.1:1/v1"))).model == "genret"
    assert copy.deepcopy(llm).api_key == KEY


class EventRecorder(BaseEventHandler):
    seen: list = Field(default_factory=list)

    def handle(self, event, **kwargs):
        self.seen.append(event)


@pytest.fixture
def traced():
    """Record the callbacks, events and spans of LlamaIndex."""
    root, recorder, spans = get_dispatcher("root"), EventRecorder(), SimpleSpanHandler()
    root.add_event_handler(recorder)
    root.add_span_handler(spans)
    debug = LlamaDebugHandler(print_trace_on_end=False)

    def report():
        texts = [repr(event) + event.model_dump_json(fallback=repr) for event in recorder.seen]
        texts += [repr(span) + repr(span.tags) for span in spans.completed_spans]
        pairs = debug.get_event_pairs()
        assert texts
        assert pairs
        return "\n".join([*texts, *(repr(event.payload) for pair in pairs for event in pair)])

    yield debug, report
    root.event_handlers.remove(recorder)
    root.span_handlers.remove(spans)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_events_spans_and_logs_contain_no_secrets(untrained_index, traced, caplog, how):
    """Only this package's loggers are checked, at DEBUG, not those of `openai` and `httpcore`."""
    caplog.set_level(logging.DEBUG, logger="llama_index_genret")
    debug, report = traced
    content = (untrained_index.records[0].path).read_bytes()
    inline = base64.b64encode(content).decode()
    nodes = [ImageNode(id_=record.image_id, image=inline) for record in untrained_index.records]
    manager = CallbackManager([debug])
    with running(OpenAIServer()) as server:
        llm = genret_llm(server.api_base, api_key=KEY, default_headers=HEADERS, callback_manager=manager)
        retriever = retriever_of_nodes(nodes, untrained_index, manager)
        engine = image_query_engine(retriever, llm)
        asyncio.run(engine.aquery("Which color?")) if how == "async" else engine.query("Which color?")
        images = [image for chat in server.images() for image in chat]
    assert len(images) == 2
    text = report() + "\n".join(record.getMessage() for record in caplog.records if "genret" in record.name)
    assert not [secret for secret in (*SECRETS, inline[:60], inline[100:160]) if secret in text]
    assert "data:image" not in text


def retriever_of_nodes(nodes, index, manager):
    from llama_index.core.storage.docstore import SimpleDocumentStore

    docstore = SimpleDocumentStore()
    docstore.add_documents(nodes)
    scorer = FakeScorer(index.tokenizer.vocab_size)
    return GenerativeImageRetriever(index, scorer, docstore=docstore, callback_manager=manager, similarity_top_k=2)


def test_errors_contain_no_image(untrained_index):
    """An image's content or address is passed in the wrong place, or is broken."""
    url = to_data_url(untrained_index.records[0].path)
    body = url.partition(",")[2]
    signed = f"https://pictures.example/x.png?signature={KEY}"
    scorer = FakeScorer(untrained_index.tokenizer.vocab_size)
    retriever = GenerativeImageRetriever(untrained_index, scorer)
    remote = GenerativeImageRetriever.from_server(untrained_index.folder, "http://127.0.0.1:1/v1")
    attempts = [
        lambda: from_data_url(body),
        lambda: from_data_url(signed),
        lambda: from_data_url(url + "§"),
        lambda: load_image(base64.b64decode(body)[:200]),
        lambda: load_image(url),
        lambda: load_image(signed),
        lambda: to_data_url(b"no image, but the key " + KEY.encode()),
        lambda: remote.retrieve(QueryBundle("", image_path=url)),
        lambda: remote.retrieve(QueryBundle("", image_path=signed)),
        lambda: RecallRequest(query="x", queries=["y"], image=url),
        lambda: RecallRequest(image=url * 2**18),
    ]
    assert retriever.retrieve("x")
    for attempt in attempts:
        with pytest.raises((ImageError, ValueError)) as raised:
            attempt()
        report = full_report(raised.value)
        assert not [part for part in (body[:24], body[50:80], KEY) if part in report], report[:300]


def test_logged_command_contains_no_key():
    command = ["vllm", "serve", "m", "--api-key", KEY, HEADER, "--port", "1", f"--hf-token={PASSWORD}"]
    assert printable_command(command) == [
        "vllm",
        "serve",
        "m",
        "--api-key",
        "***",
        "***",
        "--port",
        "1",
        "--hf-token=***",
    ]


def test_redirects_are_not_followed_with_a_key():
    """A redirect counts as a response. It is not followed, with or without a key."""
    with running(OpenAIServer()) as server:
        assert VllmScorer(server.api_base, api_key=KEY).served_model() == "only"
    assert httpx.Client().follow_redirects is False
