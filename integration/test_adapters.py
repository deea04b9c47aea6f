"""Tests of two indexes on one vLLM server on the CPU: a LoRA adapter recalls from each, the base model answers."""

import asyncio
import base64
import shutil

import httpx
import numpy as np
import pytest
from llama_index.core.schema import QueryBundle

from integration.conftest import GENRET, genret, genret_json
from llama_index_genret import GenerativeImageRetriever
from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import QueryError
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.scorers.vllm_http import served_name
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.launch import CPU_FLAGS, free_port, running_server
from llama_index_genret.store import load_index, remove_images
from llama_index_genret.store.build import build_index
from llama_index_genret.store.model_loading import load_base, load_trained
from llama_index_genret.training.pseudo_queries import Sampling, WriterRequest
from llama_index_genret.training.pseudo_queries.transformers_writer import InProcessWriter
from llama_index_genret.training.pseudo_queries.vllm_http_writer import ServerWriter
from llama_index_genret.training.recipe import TrainOptions, train
from tests.tiny_model import make_wordy_model

TEXT = "red circle"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_mllm(str(make_wordy_model(tmp_path_factory.mktemp("wordy") / "tiny")), device="cpu")


@pytest.fixture(scope="module")
def indexes(pictures, base, tmp_path_factory):
    """Train two indexes apart: one on existing words, one of caption words. The rates make the adapters matter."""
    folder, corpus = tmp_path_factory.mktemp("indexes"), read_corpus(pictures)
    made = {}
    for name, options in {"codes": {"alphabet": "existing"}, "words": {"scheme": "semantic"}}.items():
        index = build_index(corpus, folder / name, base, **options)
        learn = TrainOptions(max_steps=3, lora_rank=4, learning_rate=3e-2, seed=len(made))
        made[name] = train(index, learn, device="cpu", show_progress=False)
    return made


@pytest.fixture(scope="module")
def server(indexes, tmp_path_factory):
    port, log = free_port(), tmp_path_factory.mktemp("adapters") / "vllm.log"
    first, second = indexes.values()
    command = [*GENRET, "serve", str(first.folder), "--also", str(second.folder), "--adapters", "--port", str(port)]
    with running_server([*command, "--", *CPU_FLAGS], host="127.0.0.1", port=port, log=log) as served:
        yield served


@pytest.fixture(scope="module")
def scorers(indexes):
    return {name: TransformersScorer(load_trained(index, device="cpu")) for name, index in indexes.items()}


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.api_base, timeout=60) as opened:
        yield opened


def in_process(index, scorer, prompt, k=5):
    (ranking,) = recall(scorer, index.trie, [prompt], SearchOptions(k=k))
    return [index.record_of(hit).image_id for hit in ranking.hits], [hit.log_prob for hit in ranking.hits]


def served(client, **body):
    (result,) = client.post("/recall", json={"k": 5, **body}).raise_for_status().json()["results"]
    return [hit["image_id"] for hit in result["hits"]], [hit["log_prob"] for hit in result["hits"]]


def assert_same(found, expected):
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], atol=1e-3)


def test_each_index_is_recalled_by_its_own_adapter(client, indexes, scorers):
    for name, index in indexes.items():
        prompt = index.prompts.for_query(index.tokenizer, TEXT)
        assert_same(served(client, query=TEXT, index=name), in_process(index, scorers[name], prompt))
    swapped = in_process(indexes["words"], scorers["codes"], prompt)
    assert np.abs(np.subtract(swapped[1], served(client, query=TEXT, index="words")[1])).max() > 0.01


def test_an_image_and_an_image_with_a_text_are_queries_too(client, indexes, scorers, pictures):
    path = pictures / "blue-bar.png"
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for name, index in indexes.items():
        for text in ("", "the same, but red <image>"):
            prompt = index.prompts.for_image(index.tokenizer, path, text)
            body = {"image": url, "index": name} | ({"query": text} if text else {})
            assert_same(served(client, **body), in_process(index, scorers[name], prompt))


def test_the_base_model_answers_and_not_the_adapters(client, base, indexes, scorers):
    """The log-probabilities of an answer are those of the untrained model, unless the request selects an adapter."""
    token_ids = indexes["codes"].prompts.for_query(indexes["codes"].tokenizer, TEXT).token_ids
    adapter = served_name(indexes["codes"].weights_id)
    models = {"genret": base, adapter: scorers["codes"].mllm}
    found = {}
    for name, mllm in models.items():
        body = {"model": name, "prompt": list(token_ids), "max_tokens": 1, "temperature": 0, "logprobs": 5}
        answer = client.post("/completions", json={**body, "return_tokens_as_token_ids": True}).json()
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        logits = _logits(mllm, token_ids)
        found[name] = {int(token.removeprefix("token_id:")): value for token, value in top.items()}
        np.testing.assert_allclose([logits[token] for token in found[name]], list(found[name].values()), atol=1e-3)
    assert found["genret"] != found[adapter]


def test_pseudo_queries_of_the_server_equal_those_of_the_process(server, indexes, tmp_path):
    index = indexes["codes"]
    requests = [
        WriterRequest(record.path, f"What is {text}?", 3) for record in index.records[::4] for text in ("it", "red")
    ]
    writer, local = ServerWriter(server.api_base), InProcessWriter(index, load_base(index, device="cpu"))
    theirs = writer.write(requests, Sampling(n=1, temperature=0.0, max_tokens=6))
    ours = local.write(requests, Sampling(n=1, temperature=1e-4, max_tokens=6))
    assert [_readable(answer) for (answer,) in theirs] == [_readable(answer) for (answer,) in ours]
    assert len({answers[0] for answers in theirs}) > 2, "the pictures make no difference"
    wild = Sampling(n=8, temperature=2.0, max_tokens=6)
    assert len(set(writer.write(requests[:1], wild)[0])) == 8
    folder = shutil.copytree(index.folder, tmp_path / "index")
    wrote = genret_json("write-queries", folder, "--server", server.api_base, "--temperature", 2)
    assert (wrote["images"], wrote["kept"]) == (20, 0)
    lines = load_index(folder).pseudo_queries.values()
    assert {(line.wanted, line.provenance.model, line.provenance.fingerprint) for line in lines} == {
        (7, "genret", None)
    }
    assert genret_json("write-queries", folder, "--server", server.api_base)["images"] == 0


def _readable(answer):
    """Its texts end within a character. vLLM then shows nothing, and transformers a replacement character."""
    return answer.text.replace("\ufffd", "").strip(), answer.ended


def _logits(mllm, token_ids):
    import torch

    with torch.inference_mode():
        return mllm.model(input_ids=torch.tensor([token_ids])).logits[0, -1].log_softmax(-1).tolist()


def test_endpoint_and_stock_protocol_give_the_same_nodes(server, indexes, monkeypatch):
    posted = []
    send = httpx.Client.send
    monkeypatch.setattr(httpx.Client, "send", lambda *a, **k: posted.append(a[1].url.path) or send(*a, **k))
    for index in indexes.values():
        ours = GenerativeImageRetriever.from_server(index.folder, server.api_base, similarity_top_k=3)
        stock = GenerativeImageRetriever(index, ours._scorer, similarity_top_k=3)
        ours.retrieve(TEXT)
        posted.clear()
        nodes, expected = ours.retrieve(TEXT), stock.retrieve(TEXT)
        assert posted[0] == "/v1/recall"
        assert "/v1/completions" in posted[1:]
        assert [n.node.node_id for n in nodes] == [n.node.node_id for n in expected]
        np.testing.assert_allclose([n.score for n in nodes], [n.score for n in expected], rtol=1e-3)
        assert ours._scorer.served_model() == "genret"


def test_image_queries_use_the_endpoint_sync_and_async(server, indexes, scorers, pictures):
    index, scorer = indexes["codes"], scorers["codes"]
    here = GenerativeImageRetriever(index, scorer, similarity_top_k=4)
    there = GenerativeImageRetriever.from_server(index.folder, server.api_base, similarity_top_k=4)
    for text in ("", "the same, but red"):
        query = QueryBundle(text, image_path=str(pictures / "blue-bar.png"))
        expected = [(n.node.node_id, n.score) for n in here.retrieve(query)]
        for nodes in (there.retrieve(query), asyncio.run(there.aretrieve(query))):
            assert [n.node.node_id for n in nodes] == [node_id for node_id, _ in expected]
            np.testing.assert_allclose([n.score for n in nodes], [score for _, score in expected], rtol=1e-3)
    stock = GenerativeImageRetriever(index, there._scorer)
    with pytest.raises(QueryError, match="genret serve"):
        stock.retrieve(query)


def test_indexes_are_listed_selected_and_edited_separately(client, indexes):
    cards = {card["name"]: card for card in client.get("/recall/indexes").json()["data"]}
    assert {name: (card["scheme"], card["images"]) for name, card in cards.items()} == {
        "codes": ("structured", 20),
        "words": ("semantic", 20),
    }
    answer = client.post("/recall", json={"query": TEXT})
    assert answer.status_code == 404
    assert "['codes', 'words']" in answer.json()["error"]["message"]
    remove_images(load_index(indexes["words"].folder), ["red-circle"])
    assert len(served(client, query=TEXT, index="words", k=20)[0]) == 19
    assert len(served(client, query=TEXT, index="codes", k=20)[0]) == 20


@pytest.mark.parametrize("image", ["no url", "data:image/png;base64,AAAA", "http://127.0.0.1:1/x.png", "file:///x"])
def test_invalid_images_are_refused_and_nothing_is_fetched(client, image):
    answer = client.post("/recall", json={"image": image, "index": "codes"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "BadRequestError"


def test_incompatible_indexes_are_refused_before_the_start(indexes, trained_index):
    words, codes = indexes["words"].folder, indexes["codes"].folder
    for arguments, reason in [
        ((codes, "--also", words), "one checkpoint cannot hold both"),
        ((codes, "--also", trained_index.folder, "--adapters"), "symbols of its own"),
        ((codes, "--also", codes, "--adapters"), "have the same name"),
    ]:
        done = genret("serve", *arguments)
        assert done.returncode == 1
        assert reason in " ".join(done.stderr.split())
