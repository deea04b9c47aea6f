"""Tests of `POST /v1/recall` inside a real vLLM server on the CPU, against the same model in this process."""

import asyncio
import contextlib
import http.client
import random
import shutil
import time
from dataclasses import asdict
from functools import partial

import httpx
import numpy as np
import psutil
import pytest
from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from integration.conftest import GENRET, genret_json
from llama_index_genret import GenerativeImageRetriever
from llama_index_genret.corpus.images import to_data_url
from llama_index_genret.errors import ServerError
from llama_index_genret.evaluation.tuning import tune
from llama_index_genret.models.encoder import SentenceTransformerEncoder
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.blend import Blender
from llama_index_genret.scorers.rerank import reranking, with_scoring
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.launch import CPU_FLAGS, free_port, running_server
from llama_index_genret.store import Scoring, ScoringChoice, TunedScoring, load_index, remove_images, store_tuning
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.training.recipe import TrainOptions, train
from tests.store.test_filters import evaluate_with_llama_index

TEXTS = ["red circle", "the blue bar", "show me the green frame", "black"]
KEY = "secret-of-the-test"


@pytest.fixture(scope="module")
def loaded_encoder(encoder):
    return SentenceTransformerEncoder(encoder)


@pytest.fixture(scope="module")
def served_index(encoded_index, loaded_encoder, tmp_path_factory):
    """A trained copy of an index with an encoder, so that tests may edit it while it is served."""
    folder = tmp_path_factory.mktemp("served") / "shapes"
    shutil.copytree(encoded_index.folder, folder)
    options = TrainOptions(max_steps=4, lora_rank=2)
    return train(load_index(folder), options, encoder=loaded_encoder, device="cpu", show_progress=False)


@pytest.fixture(scope="module")
def server(served_index, tmp_path_factory):
    port, log = free_port(), tmp_path_factory.mktemp("endpoint") / "vllm.log"
    flags = [*CPU_FLAGS, "--api-key", KEY]
    command = [*GENRET, "serve", str(served_index.folder), "--port", str(port), "--", *flags]
    with running_server(command, host="127.0.0.1", port=port, log=log) as served:
        yield served


@pytest.fixture(scope="module")
def endpoint(server):
    return server.api_base.removesuffix("/v1")


@pytest.fixture
def client(endpoint):
    with httpx.Client(base_url=endpoint, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def local_model(served_index):
    return TransformersScorer(load_trained(served_index, device="cpu"))


@pytest.fixture(scope="module")
def local_scorer_of(served_index, local_model, loaded_encoder):
    """The scorer of this process for a scoring."""
    return partial(Blender(served_index, loaded_encoder).scorer, local_model)


def test_idle_connection_outlives_five_seconds(endpoint):
    """Otherwise a client might send a request on a connection that the server closes at that moment."""
    with contextlib.closing(http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=60)) as connection:
        for pause_s in (0, 7):
            time.sleep(pause_s)
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200


def expected(index, scorer, text, **options):
    prompt = index.prompts.for_query(index.tokenizer, text)
    (ranking,) = recall(scorer, index.trie, [prompt], SearchOptions(**options))
    return (
        [index.record_of(hit).image_id for hit in ranking.hits],
        [hit.log_prob for hit in ranking.hits],
        ranking.exact,
    )


def assert_same(result, ids, log_probs):
    assert [hit["image_id"] for hit in result["hits"]] == ids
    np.testing.assert_allclose([hit["log_prob"] for hit in result["hits"]], log_probs, atol=1e-3)


@pytest.mark.parametrize("model_weight", [0.5, 0.0, 1.0])
def test_one_request_recalls_the_same_as_the_process(client, served_index, local_scorer_of, model_weight):
    scoring = Scoring(model_weight=model_weight)
    local_scorer = local_scorer_of(scoring)
    for mode in ("beam", "exact"):
        request = {"queries": TEXTS, "k": 4, "mode": mode, "scoring": {"model_weight": model_weight}}
        answer = client.post("/v1/recall", json=request).json()
        assert (answer["index"], len(answer["results"])) == ("shapes", 4)
        assert answer["scoring"] == asdict(scoring)
        for text, result in zip(TEXTS, answer["results"], strict=True):
            ids, log_probs, exact = expected(served_index, local_scorer, text, k=4, mode=mode)
            assert_same(result, ids, log_probs)
            assert (result["query"], result["exact"]) == (text, exact)
            record = served_index.records[served_index.rows_by_id[ids[0]]]
            assert result["hits"][0]["metadata"] == dict(record.metadata)
            assert result["hits"][0]["caption"] == record.captions[0]


SCORINGS = [
    ({}, Scoring(eta=0.8)),  # as tuned
    ({"eta": 0.0, "model_weight": 0.2}, Scoring(model_weight=0.2)),
    ({"rerank": 8, "rerank_weight": 0.5}, Scoring(eta=0.8, rerank=8, rerank_weight=0.5)),
    ({"eta": 0.3, "rerank": 8, "rerank_by": "image"}, Scoring(eta=0.3, rerank=8, rerank_by="image")),
]


def test_prior_and_reranking_rank_as_in_process(
    client, endpoint, served_index, local_model, local_scorer_of, loaded_encoder
):
    """Tuned values are used while the server runs, from its next request on."""
    index = tune(served_index, local_model).index
    index = store_tuning(index, index.log_prior, TunedScoring(scoring=Scoring(eta=0.8), queries=1))
    for request, scoring in SCORINGS:
        posted = client.post("/v1/recall", json={"queries": TEXTS, "k": 4, "scoring": request})
        assert posted.status_code == 200, posted.text
        answer = posted.json()
        assert answer["scoring"] == asdict(scoring)
        retriever = GenerativeImageRetriever.from_server(
            index.folder, f"{endpoint}/v1", api_key=KEY, similarity_top_k=4, scoring=ScoringChoice(**request)
        )
        stock = GenerativeImageRetriever(
            index, retriever._scorer, encoder=loaded_encoder, similarity_top_k=4, scoring=ScoringChoice(**request)
        )
        for text, result in zip(TEXTS, answer["results"], strict=True):
            prompt = index.prompts.for_query(index.tokenizer, text)
            options, rerank = with_scoring(SearchOptions(k=4), index, scoring), reranking(index, scoring)
            (ranking,) = recall(local_scorer_of(scoring), index.trie, [prompt], options, rerank=rerank)
            assert_same(
                result, [index.record_of(hit).image_id for hit in ranking.hits], [h.log_prob for h in ranking.hits]
            )
            if scoring.eta or scoring.rerank:
                ranked_by = [hit["ranked_by"] for hit in result["hits"]]
                np.testing.assert_allclose(ranked_by, [hit.ranked_by for hit in ranking.hits], atol=1e-2)
            by_server, by_steps = [retriever], [] if scoring.rerank_by == "image" else [stock]
            for one in by_server + by_steps:
                assert [node.node.node_id for node in one.retrieve(text)] == [hit["image_id"] for hit in result["hits"]]
    picture = to_data_url(index.records[0].path)
    refused = client.post("/v1/recall", json={"image": picture, "scoring": {"rerank": 3}})
    assert (refused.status_code, "text queries" in refused.text) == (400, True)
    assert client.post("/v1/recall", json={"image": picture}).json()["scoring"] == asdict(Scoring(model_weight=1.0))
    store_tuning(index, index.log_prior, TunedScoring(scoring=Scoring(), queries=0))


def test_server_applies_the_filter_to_every_query(client, served_index):
    """Every operator, nested at random: each result passes LlamaIndex's own evaluator, and none is missing."""
    random_ = random.Random(0)

    def condition(depth):
        if depth and random_.random() < 0.6:
            parts = [condition(depth - 1) for _ in range(random_.randrange(1, 4))]
            return MetadataFilters(filters=parts, condition=random_.choice(list(FilterCondition)))
        key, value = random_.choice([("color", "red"), ("color", "r"), ("shape", "bar"), ("shape", "zz")])
        operator = random_.choice(list(FilterOperator))
        several = operator in (FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL)
        return MetadataFilter(key=key, value=[value, "blue"] if several else value, operator=operator)

    sizes = set()
    for _ in range(60):
        filters = MetadataFilters(filters=[condition(2)])
        passing = evaluate_with_llama_index(filters, [dict(record.metadata) for record in served_index.records])
        allowed = {record.image_id for record, passes in zip(served_index.records, passing, strict=True) if passes}
        request = {
            "query": random_.choice(TEXTS),
            "k": random_.randrange(1, 30),
            "mode": random_.choice(["beam", "exact"]),
            "filters": filters.model_dump(mode="json"),
        }
        (result,) = client.post("/v1/recall", json=request).raise_for_status().json()["results"]
        assert {hit["image_id"] for hit in result["hits"]} <= allowed
        assert len(result["hits"]) == min(request["k"], len(allowed))
        sizes.add(len(allowed))
    assert len(sizes) > 5
    request = {"query": "red", "filters": {"color": "red", "shape": ["bar", "frame"]}}
    (result,) = client.post("/v1/recall", json=request).json()["results"]
    assert {hit["image_id"] for hit in result["hits"]} == {"red-bar", "red-frame"}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "either 'query' or 'queries'"),
        ({"query": "a", "queries": ["b"]}, 400, "either"),
        ({"query": "a", "k": 0}, 400, "k"),
        ({"query": "a", "unknown": 1}, 400, "unknown"),
        ({"query": " "}, 400, "empty"),
        ({"query": "x" * 1_000_000}, 400, "tokens"),
        ({"query": "a", "index": "nowhere"}, 404, "shapes"),
        ({"query": "a", "filters": {"size": 1}}, 400, "color"),
        ({"query": "a", "scoring": {"eta": -1}}, 400, "eta"),
        ({"query": "a", "scoring": {"rerank_by": "colour"}}, 400, "rerank_by"),
        ({"query": "a", "max_expansions": 9}, 400, "mode='exact'"),
    ],
)
def test_invalid_requests_get_openai_errors(client, body, status, words):
    answer = client.post("/v1/recall", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["code"] == status


def test_routes_need_the_api_key_and_are_in_openapi(endpoint, client):
    assert httpx.post(f"{endpoint}/v1/recall", json={"query": "a"}).status_code == 401
    assert httpx.get(f"{endpoint}/v1/recall/indexes").status_code == 401
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/recall", "/v1/recall/indexes", "/v1/chat/completions"} <= paths.keys()


def test_an_edited_index_is_served_without_a_restart(client, served_index):
    before = client.get("/v1/recall/indexes").json()["data"][0]
    assert (before["name"], before["images"], before["problem"]) == ("shapes", 20, "")
    assert before["encoder"] == served_index.manifest.encoder.name
    everything = {"query": "red circle", "k": 20}
    assert len(client.post("/v1/recall", json=everything).json()["results"][0]["hits"]) == 20
    genret_json("remove", served_index.folder, "red-circle", "blue-bar")
    answer = client.post("/v1/recall", json=everything).json()
    found = {hit["image_id"] for hit in answer["results"][0]["hits"]}
    assert len(found) == 18
    assert not found & {"red-circle", "blue-bar"}
    assert answer["version"] != before["version"]
    manifest = served_index.folder / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[:-20])
    assert client.post("/v1/recall", json=everything).json()["version"] == answer["version"]
    assert "damaged" in client.get("/v1/recall/indexes").json()["data"][0]["problem"]
    manifest.write_bytes(content)
    assert client.post("/v1/recall", json=everything).json()["version"] == answer["version"]


def test_concurrent_and_disconnecting_clients_get_equal_results(endpoint, client):
    alone = {text: client.post("/v1/recall", json={"query": text, "k": 3}).json()["results"][0] for text in TEXTS}

    async def ask(opened, number):
        text = TEXTS[number % len(TEXTS)]
        if number % 5 == 4:
            with pytest.raises(httpx.TimeoutException):
                await opened.post("/v1/recall", json={"query": text, "k": 3}, timeout=0.01)
            return
        answer = await opened.post("/v1/recall", json={"query": text, "k": 3})
        assert_same(answer.json()["results"][0], *_ranked(alone[text]))

    async def all_at_once():
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=endpoint, headers=headers, timeout=120) as opened:
            await asyncio.gather(*(ask(opened, number) for number in range(60)))

    asyncio.run(all_at_once())
    figures = client.get("/metrics").text
    assert 'genret_recall_requests_total{outcome="answered"}' in figures
    assert "genret_recall_seconds_bucket" in figures
    assert "genret_recall_steps_total" in figures


def _ranked(result):
    return [hit["image_id"] for hit in result["hits"]], [hit["log_prob"] for hit in result["hits"]]


def test_retriever_with_one_request_equals_the_stock_protocol(endpoint, served_index, loaded_encoder, monkeypatch):
    index = load_index(served_index.folder)
    filters = MetadataFilters(filters=[MetadataFilter(key="color", value="black")])
    other = MetadataFilter(key="shape", value=["bar", "frame"], operator=FilterOperator.NIN)
    nested = MetadataFilters(filters=[other, MetadataFilters(filters=filters.filters, condition=FilterCondition.NOT)])
    posted = []
    send = httpx.Client.send
    monkeypatch.setattr(httpx.Client, "send", lambda *a, **k: posted.append(a[1].url.path) or send(*a, **k))
    for options in ({}, {"filters": filters}, {"mode": "exact"}, {"filters": nested}):
        retriever = GenerativeImageRetriever.from_server(
            served_index.folder, f"{endpoint}/v1", api_key=KEY, similarity_top_k=3, **options
        )
        stock = GenerativeImageRetriever(
            index, retriever._scorer, encoder=loaded_encoder, similarity_top_k=3, **options
        )
        posted.clear()
        nodes = retriever.retrieve("red circle")
        assert posted == ["/v1/recall"]
        for found in (nodes, asyncio.run(retriever.aretrieve("red circle"))):
            expected = stock.retrieve("red circle")
            assert [n.node.node_id for n in found] == [n.node.node_id for n in expected]
            np.testing.assert_allclose([n.score for n in found], [n.score for n in expected], rtol=1e-3)


def test_client_of_an_older_version_never_sees_the_newer_one(endpoint, served_index, tmp_path):
    shutil.copytree(served_index.folder, tmp_path / "older")
    retriever = GenerativeImageRetriever.from_server(
        tmp_path / "older", f"{endpoint}/v1", api_key=KEY, similarity_top_k=99
    )
    before = {node.node.node_id for node in retriever.retrieve("black")}
    genret_json("remove", served_index.folder, "black-bar")
    assert {node.node.node_id for node in retriever.retrieve("black")} == before
    newer = GenerativeImageRetriever.from_server(
        served_index.folder, f"{endpoint}/v1", api_key=KEY, similarity_top_k=99
    )
    assert {node.node.node_id for node in newer.retrieve("black")} == before - {"black-bar"}


def test_reload_during_requests_never_mixes_two_versions(endpoint, client, served_index):
    """Every answer is of one version: all of its images are there, and all images removed before are gone."""
    images = {client.get("/v1/recall/indexes").json()["data"][0]["version"]: 17}

    async def clients():
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=endpoint, headers=headers, timeout=120) as opened:
            asking = [asyncio.create_task(opened.post("/v1/recall", json={"query": "red", "k": 20})) for _ in range(12)]
            for image_id in ("green-bar", "green-frame", "green-square"):
                await asyncio.sleep(0.2)
                await asyncio.to_thread(_remove, served_index.folder, image_id)
                asking += [opened.post("/v1/recall", json={"query": "red", "k": 20}) for _ in range(6)]
            return await asyncio.gather(*asking)

    for answer in asyncio.run(clients()):
        body = answer.json()
        n_images = images.setdefault(body["version"], len(body["results"][0]["hits"]))
        assert len(body["results"][0]["hits"]) == n_images
    assert client.get("/v1/recall/indexes").json()["data"][0]["images"] == 14


def _remove(folder, image_id):
    remove_images(load_index(folder), [image_id])


def test_dead_engine_gives_503_and_a_client_error(server, endpoint, served_index):
    """Run as the last test of this server, since the engine dies."""
    (engine,) = [
        p for p in psutil.Process(server.pid).children(recursive=True) if "EngineCore" in " ".join(p.cmdline())
    ]
    retriever = GenerativeImageRetriever.from_server(served_index.folder, f"{endpoint}/v1", api_key=KEY)

    async def asked_while_it_dies():
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=endpoint, headers=headers, timeout=60) as opened:
            engine.suspend()  # otherwise it could answer before the engine dies
            asking = [asyncio.create_task(opened.post("/v1/recall", json={"queries": TEXTS})) for _ in range(4)]
            await asyncio.sleep(0.5)
            engine.kill()
            return await asyncio.gather(*asking)

    for answer in asyncio.run(asked_while_it_dies()):
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["type"] == "ServiceUnavailableError"
    with pytest.raises(ServerError, match=r"engine has died|no server answers"):
        retriever.retrieve("red circle")
