"""Recall through a server's endpoint: number and content of requests. A `FakeScorer` behind HTTP plays the server."""

import asyncio
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from llama_index.core.llms import MockLLM
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.llms.openai_like import OpenAILike

from llama_index_genret import FakeScorer, GenerativeImageRetriever
from llama_index_genret.errors import NotTrained, ServerError
from llama_index_genret.models.encoder import SentenceTransformerEncoder
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.serving.batch import hit_to_json
from llama_index_genret.serving.endpoint.schema import RecallRequest
from llama_index_genret.store import Index, ScoringChoice, load_index, remove_images


class Recalling(ThreadingHTTPServer):
    """A server of `POST /v1/recall` for an index, or of the stock protocol only. `requests` has paths and headers."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, index, has_endpoint):
        super().__init__(("127.0.0.1", 0), Handler)
        self.index, self.has_endpoint, self.requests = index, has_endpoint, []
        self.table = FakeScorer(index.tokenizer.vocab_size)
        self.api_base = f"http://127.0.0.1:{self.server_port}/v1"

    def paths(self):
        return [path for path, _, _ in self.requests]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.server.requests.append((self.path, self.headers, None))
        self.answer(200, {"data": [{"id": "my-model", "max_model_len": 2000}, {"id": "other", "max_model_len": 2000}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers, body))
        if self.path == "/v1/recall":
            known = self.server.has_endpoint and body["version"] == self.server.index.version
            self.answer(*((200, self.recalled(RecallRequest(**body))) if known else (404, {"detail": "Not Found"})))
        else:
            choices = [self.choice(i, ids, body["logprob_token_ids"]) for i, ids in enumerate(body["prompt"])]
            self.answer(200, {"choices": choices})

    def recalled(self, request):
        index = self.server.index
        prompt = index.prompts.for_query(index.tokenizer, request.query)
        (ranking,) = recall(self.server.table, index.trie, [prompt], request.options(None))
        hits = [
            {**hit_to_json(index, hit), "caption": "", "metadata": {}, "image_id": index.record_of(hit).image_id}
            for hit in ranking.hits
        ]
        result = {"query": request.query, "hits": hits, "exact": ranking.exact, "nodes_expanded": 1}
        scoring = {"model_weight": 1.0, "temperature": 0.05, "eta": 0.0}
        scoring |= {"rerank": 0, "rerank_weight": 1.0, "rerank_by": "identifier"}
        return {"index": "x", "version": index.version, "scoring": scoring, "results": [result]}

    def choice(self, i, ids, scored_ids):
        """Return the log-probabilities of tokens after the prompt of `QUERIES` that `ids` starts with."""
        prompts = [
            tuple(self.server.index.prompts.for_query(self.server.index.tokenizer, q).token_ids) for q in QUERIES
        ]
        prompt = next(p for p in prompts if tuple(ids[: len(p)]) == p)
        logits = self.server.table.logits(Prompt(prompt), tuple(ids[len(prompt) :]))
        log_probs = logits - np.logaddexp.reduce(logits)
        return {"index": i, "logprobs": {"top_logprobs": [{f"token_id:{t}": float(log_probs[t]) for t in scored_ids}]}}


QUERIES = ["red circle", "blue bar"]


@pytest.fixture
def serve(untrained_index):
    servers = []

    def serve(*, has_endpoint=True, index=untrained_index):
        servers.append(Recalling(index, has_endpoint))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def llm_of(server, **options):
    given = {"model": "my-model", "api_base": server.api_base, "api_key": "key", "is_chat_model": True, **options}
    return OpenAILike(**given)


def ids(nodes):
    return [node.node.node_id for node in nodes]


def expected(index, query="red circle"):
    return ids(
        GenerativeImageRetriever(index, FakeScorer(index.tokenizer.vocab_size), similarity_top_k=4).retrieve(query)
    )


def test_every_query_is_one_request_in_any_event_loop(serve, untrained_index):
    server = serve()
    retriever = GenerativeImageRetriever.from_server(untrained_index.folder, server.api_base, similarity_top_k=4)
    for _ in range(3):
        assert ids(asyncio.run(retriever.aretrieve("red circle"))) == expected(untrained_index)
    assert ids(retriever.retrieve("red circle")) == expected(untrained_index)
    assert server.paths() == ["/v1/recall"] * 4


async def test_fifty_concurrent_queries_are_fifty_requests(serve, untrained_index):
    server = serve()
    retriever = GenerativeImageRetriever.from_server(untrained_index.folder, server.api_base, similarity_top_k=4)
    found = await asyncio.gather(*(retriever.aretrieve(QUERIES[i % 2]) for i in range(50)))
    assert server.paths() == ["/v1/recall"] * 50
    assert [ids(nodes) for nodes in found] == [expected(untrained_index, QUERIES[i % 2]) for i in range(50)]


async def test_fusion_in_a_running_loop_sends_one_request_each(serve, untrained_index):
    server = serve()
    retrievers = [
        GenerativeImageRetriever.from_server(untrained_index.folder, server.api_base, similarity_top_k=4)
        for _ in range(2)
    ]
    fusion = QueryFusionRetriever(retrievers, llm=MockLLM(), num_queries=1, similarity_top_k=4)
    assert set(ids(fusion.retrieve("red circle"))) == set(expected(untrained_index))
    assert set(ids(await fusion.aretrieve("red circle"))) == set(expected(untrained_index))
    assert server.paths() == ["/v1/recall"] * 4


def test_url_key_and_headers_of_the_llm_are_used(serve, untrained_index):
    server = serve()
    llm = llm_of(server, default_headers={"X-Tenant": "zoo"}, timeout=7.0)
    retriever = GenerativeImageRetriever.from_llm(llm, untrained_index.folder, similarity_top_k=4)
    assert ids(retriever.retrieve("red circle")) == expected(untrained_index)
    ((_, headers, _),) = server.requests
    assert (headers["Authorization"], headers["X-Tenant"]) == ("Bearer key", "zoo")
    assert retriever._scorer.server.timeout_s == 7.0
    assert "zoo" not in repr(retriever._scorer.server)


def test_stock_server_recalls_with_the_model_of_the_llm(serve, untrained_index):
    server = serve(has_endpoint=False)
    retriever = GenerativeImageRetriever.from_llm(llm_of(server), untrained_index.folder, similarity_top_k=4)
    assert ids(retriever.retrieve("red circle")) == expected(untrained_index)
    assert {body["model"] for path, _, body in server.requests if path == "/v1/completions"} == {"my-model"}
    retriever.retrieve("red circle")
    assert server.paths().count("/v1/recall") == 1  # after a 404 the client does not try the endpoint again
    with pytest.raises(ServerError, match="absent"):
        GenerativeImageRetriever.from_llm(llm_of(server, model="absent"), untrained_index.folder).retrieve("red circle")


def test_other_version_on_the_server_is_not_used(serve, untrained_index, tmp_path):
    shutil.copytree(untrained_index.folder, tmp_path / "older")
    older = load_index(tmp_path / "older")
    newer = remove_images(load_index(tmp_path / "older"), ["red-bar"])
    assert older.version != newer.version
    server = serve(index=newer)
    retriever = GenerativeImageRetriever.from_llm(llm_of(server), untrained_index.folder, similarity_top_k=4)
    assert ids(retriever.retrieve("red circle")) == expected(untrained_index)
    assert "/v1/completions" in server.paths()


def test_client_searches_if_the_server_result_is_not_exact(serve, untrained_index, monkeypatch):
    """The server's default limit is too small. A limit set by the client is kept, without a second search."""
    monkeypatch.setattr("llama_index_genret.serving.endpoint.schema.DEFAULT_MAX_EXPANSIONS", 1)
    server = serve()

    def is_exact(**options):
        retriever = GenerativeImageRetriever.from_llm(
            llm_of(server), untrained_index.folder, similarity_top_k=1, beam_width=1, mode="exact", **options
        )
        return retriever.retrieve("red circle")[0].node.metadata["genret_exact"]

    assert not is_exact(max_expansions=1)
    assert server.paths() == ["/v1/recall"]
    assert is_exact()
    assert "/v1/completions" in server.paths()


@pytest.fixture
def counted_as_trained(encoded_index, monkeypatch):
    """An index with an encoder, whose base model counts as trained: a table has no weights to train."""
    monkeypatch.setattr(Index, "is_trained", True)
    return encoded_index


@pytest.mark.torch
def test_client_with_an_encoder_blends_over_the_stock_protocol(serve, counted_as_trained, encoder):
    index, server = counted_as_trained, serve(has_endpoint=False, index=counted_as_trained)
    loaded, model = SentenceTransformerEncoder(encoder), FakeScorer(index.tokenizer.vocab_size)
    in_process = GenerativeImageRetriever(index, model, encoder=loaded, similarity_top_k=4)
    by_model = GenerativeImageRetriever(index, model, similarity_top_k=4)
    for chosen in (encoder, loaded):
        served = GenerativeImageRetriever.from_llm(llm_of(server), index.folder, encoder=chosen, similarity_top_k=4)
        for found in (served.retrieve("red circle"), asyncio.run(served.aretrieve("red circle"))):
            assert scores_by_id(found) == pytest.approx(scores_by_id(in_process.retrieve("red circle")), rel=1e-6)
    assert scores_by_id(found) != pytest.approx(scores_by_id(by_model.retrieve("red circle")), rel=1e-2)


def scores_by_id(nodes):
    return {node.node.node_id: node.score for node in nodes}


@pytest.mark.torch
@pytest.mark.parametrize("has_endpoint", [True, False])
def test_recall_without_the_encoder_is_logged_once(serve, counted_as_trained, has_endpoint, caplog):
    server = serve(has_endpoint=has_endpoint, index=counted_as_trained)
    folder = counted_as_trained.folder

    wanted = expected(counted_as_trained)

    def warnings_of(**options):
        caplog.clear()
        retriever = GenerativeImageRetriever.from_llm(llm_of(server), folder, similarity_top_k=4, **options)
        assert ids(retriever.retrieve("red circle")) == ids(retriever.retrieve("red circle")) == wanted
        return ["trained model alone" in record.getMessage() for record in caplog.records].count(True)

    assert warnings_of() == 1
    assert warnings_of(scoring=ScoringChoice(model_weight=1.0)) == 0


@pytest.mark.torch
def test_stock_server_of_an_untrained_index_needs_the_encoder(serve, encoded_index, encoder):
    server = serve(has_endpoint=False, index=encoded_index)
    served = GenerativeImageRetriever.from_llm(llm_of(server), encoded_index.folder, encoder=encoder)
    alone = GenerativeImageRetriever.from_index_dir(encoded_index.folder)
    assert ids(served.retrieve("red circle")) == ids(alone.retrieve("red circle"))
    assert "/v1/completions" not in server.paths()
    with pytest.raises(NotTrained, match="give the encoder of the index"):
        GenerativeImageRetriever.from_llm(llm_of(server), encoded_index.folder).retrieve("red circle")
