"""Tests of the encoder inside the recall routes, in this process: the blend, its loading, and a missing encoder.

The engine is a table that answers as vLLM's does. A whole server is in `test_endpoint.py`.
"""

import asyncio
import json
import logging
import shutil
import threading
from dataclasses import asdict

import httpx
import numpy as np
import pytest
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from PIL import Image

from integration.recall_app import TableScorer, recall_app
from llama_index_genret import GenerativeImageRetriever
from llama_index_genret.corpus import read_corpus
from llama_index_genret.corpus.images import to_data_url
from llama_index_genret.errors import EncoderUnavailable
from llama_index_genret.models.encoder import SentenceTransformerEncoder
from llama_index_genret.serving.endpoint import loaded_indexes
from llama_index_genret.serving.endpoint.schema import ENCODER_VARIABLE, INDEXES_VARIABLE
from llama_index_genret.store import Scoring, ScoringChoice, load_index, remove_images
from llama_index_genret.store.build import add_to_index
from llama_index_genret.training.recipe import TrainOptions, train

TEXTS = ["red circle", "the blue bar", "a ring"]


@pytest.fixture(scope="module")
def blended_index(encoded_index, encoder, tiny_mllm, tmp_path_factory):
    """A trained index with three removed images, and with four added images that the model has not learned."""
    folder = tmp_path_factory.mktemp("blended") / "shapes"
    shutil.copytree(encoded_index.folder, folder)
    loaded = SentenceTransformerEncoder(encoder)
    options = TrainOptions(max_steps=1, lora_rank=2)
    index = train(load_index(folder), options, encoder=loaded, device="cpu", show_progress=False)
    more = tmp_path_factory.mktemp("more")
    lines = []
    for number, word in enumerate(("ring", "ball", "thing", "circle ring")):
        Image.new("RGB", (64, 64), (200, 10 * number, 10)).save(more / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": [f"red {word}"], "color": "red"}))
    (more / "metadata.jsonl").write_text("\n".join(lines))
    index = add_to_index(index, read_corpus(more).records, tiny_mllm, encoder=loaded)
    return remove_images(index, ["red-circle", "blue-bar", "black-frame"])


@pytest.fixture
def app_of(monkeypatch):
    def make(*indexes):
        folders = "\n".join(f"index{number}={index.folder}" for number, index in enumerate(indexes))
        monkeypatch.setenv(INDEXES_VARIABLE, folders)
        return recall_app(indexes[0])

    return make


@pytest.fixture
def copied(tmp_path):
    def copy(index, name="copy"):
        shutil.copytree(index.folder, tmp_path / name)
        return load_index(tmp_path / name)

    return copy


async def post(app, **body):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        return await client.post("/v1/recall", json=body)


async def cards(app):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        return (await client.get("/v1/recall/indexes")).json()["data"]


async def start(app):
    """Start the app as a server does, and return its reply."""
    replies, waiting = asyncio.Queue(), asyncio.Queue()
    waiting.put_nowait({"type": "lifespan.startup"})
    running = asyncio.create_task(app({"type": "lifespan", "state": {}}, waiting.get, replies.put))
    reply = await asyncio.wait_for(replies.get(), 120)
    waiting.put_nowait({"type": "lifespan.shutdown"})
    await running
    return reply


def assert_same(hits, nodes):
    assert [hit["image_id"] for hit in hits] == [node.node.node_id for node in nodes]
    log_probs = [node.node.metadata["genret_log_prob"] for node in nodes]
    np.testing.assert_allclose([hit["log_prob"] for hit in hits], log_probs, atol=1e-3)


@pytest.mark.parametrize("mode", ["beam", "exact"])
@pytest.mark.parametrize("color", [None, "red"])
async def test_served_blend_equals_the_one_in_process(app_of, blended_index, encoder, mode, color):
    """Removed images, images added after the training, and filters included."""
    app, loaded = app_of(blended_index), SentenceTransformerEncoder(encoder)
    model = TableScorer(blended_index.tokenizer.vocab_size)
    filters = MetadataFilters(filters=[MetadataFilter(key="color", value=color)]) if color else None
    found = []
    for scoring in ({}, {"model_weight": 0.2, "temperature": 0.2}, {"model_weight": 0.0}, {"model_weight": 1.0}):
        body = {"k": 30, "mode": mode, "scoring": scoring, "filters": {"color": color} if color else None}
        answer = (await post(app, queries=TEXTS, **body)).raise_for_status().json()
        assert answer["scoring"] == asdict(Scoring(**scoring))
        retriever = GenerativeImageRetriever(
            blended_index,
            model,
            encoder=loaded,
            similarity_top_k=30,
            mode=mode,
            filters=filters,
            scoring=ScoringChoice(**scoring),
        )
        for text, result in zip(TEXTS, answer["results"], strict=True):
            assert len(result["hits"]) == (7 if color else 21)
            assert_same(result["hits"], retriever.retrieve(text))
        found.append([hit["log_prob"] for result in answer["results"] for hit in result["hits"]])
    assert min(np.abs(np.subtract(one, found[0])).max() for one in found[1:]) > 0.1


async def test_image_query_is_recalled_by_the_model_alone(app_of, blended_index):
    app, picture = app_of(blended_index), to_data_url(blended_index.records[0].path)
    for scoring in ({}, {"model_weight": 0.0}):
        answer = (await post(app, image=picture, query="red", scoring=scoring)).raise_for_status().json()
        assert answer["scoring"]["model_weight"] == 1.0
    assert app.state.engine_client.calls


async def test_encoder_is_loaded_once_at_the_start_in_a_thread(app_of, blended_index, copied, monkeypatch):
    threads, load = [], loaded_indexes.open_encoder
    monkeypatch.setattr(
        loaded_indexes, "open_encoder", lambda *a, **k: threads.append(threading.current_thread()) or load(*a, **k)
    )
    first, second = copied(blended_index, "one"), copied(blended_index, "two")
    app = app_of(first, second)
    assert (await start(app))["type"] == "lifespan.startup.complete"
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()
    versions = set()
    for edit in ("red-bar", "red-frame"):
        answer = (await post(app, query="red", index="index1")).json()
        versions.add(answer["version"])
        assert answer["scoring"]["model_weight"] == 0.5
        remove_images(load_index(second.folder), [edit])
    assert len(versions) == 2
    assert len(threads) == 1
    assert [card["encoder"] for card in await cards(app)] == [blended_index.manifest.encoder.name] * 2


async def test_missing_encoder_is_logged_once_and_shown(app_of, blended_index, encoder, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv(ENCODER_VARIABLE, "/no/such/encoder")
    app = app_of(blended_index)
    by_model = (await post(app, query="red", scoring={"model_weight": 1.0})).json()
    answer = (await post(app, query="red", scoring={"model_weight": 0.3})).json()
    assert answer["scoring"]["model_weight"] == 1.0
    assert answer["results"] == by_model["results"]
    (card,) = await cards(app)
    assert card["encoder"] is None
    assert "/no/such/encoder" in card["problem"]
    assert sum("/no/such/encoder" in record.getMessage() for record in caplog.records) == 1
    monkeypatch.setenv(ENCODER_VARIABLE, encoder)
    assert (await post(app_of(blended_index), query="red")).json()["scoring"]["model_weight"] == 0.5


async def test_untrained_index_is_recalled_by_its_encoder(app_of, encoded_index):
    app, retriever = (
        app_of(encoded_index),
        GenerativeImageRetriever.from_index_dir(encoded_index.folder, similarity_top_k=5),
    )
    answer = (await post(app, queries=TEXTS)).raise_for_status().json()
    assert answer["scoring"]["model_weight"] == 0.0
    for text, result in zip(TEXTS, answer["results"], strict=True):
        nodes = retriever.retrieve(text)
        assert_same(result["hits"], nodes)
    assert app.state.engine_client.calls == 0
    refused = await post(app, image=to_data_url(encoded_index.records[0].path))
    assert (refused.status_code, "embeds texts only" in refused.text) == (400, True)


async def test_server_without_any_way_to_recall_does_not_start(app_of, encoded_index, monkeypatch):
    monkeypatch.setenv(ENCODER_VARIABLE, "/no/such/encoder")
    reply = await start(app_of(encoded_index))
    assert reply["type"] == "lifespan.startup.failed"
    assert "/no/such/encoder" in reply["message"]


async def test_encoder_that_stops_responding_gives_503(app_of, blended_index, monkeypatch):
    app = app_of(blended_index)
    assert (await post(app, query="red")).is_success

    def fail(*_):
        raise EncoderUnavailable("the encoder does not answer")

    monkeypatch.setattr(SentenceTransformerEncoder, "embed_queries", fail)
    answer = await post(app, query="red")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert (await post(app, query="red", scoring={"model_weight": 1.0})).is_success
