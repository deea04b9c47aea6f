"""The API of `genret browse`: its responses, and the requests that it refuses. `integration/` opens it in a browser."""

import math
from dataclasses import replace
from itertools import pairwise

import httpx
import pytest

from llama_index_genret import FakeScorer
from llama_index_genret.cli.browse.app import MAX_BODY_BYTES, listen, make_app
from llama_index_genret.cli.browse.recaller import Recaller
from llama_index_genret.cli.browse.trace import SHOWN, identifier_levels, leaves_below, probabilities
from llama_index_genret.corpus import read_corpus
from llama_index_genret.corpus.images import to_data_url
from llama_index_genret.errors import ServerError
from llama_index_genret.llamaindex.llms import InProcessLLM
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.recording import RecordingScorer
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.store import RecordFilters, remove_images
from llama_index_genret.store.build import add_to_index, build_index

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def recaller(trained_index, trained_mllm):
    return Recaller(trained_index, TransformersScorer(trained_mllm), InProcessLLM(trained_mllm, max_tokens=4))


@pytest.fixture
async def client(recaller):
    transport = httpx.ASGITransport(make_app(recaller))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


def search(index, scorer, text, **options):
    recorder = RecordingScorer(scorer)
    prompts = [index.prompts.for_query(index.tokenizer, text)]
    (ranking,) = recall(recorder, index.trie, prompts, SearchOptions(k=20, **options))
    return ranking.hits, probabilities(recorder.steps)


@pytest.mark.parametrize("seed", range(3))
def test_levels_show_the_probabilities_of_the_search(untrained_index, seed):
    """The probabilities of the chosen symbols multiply to that of the image. The children of a level sum to one."""
    index, scorer = untrained_index, FakeScorer(untrained_index.tokenizer.vocab_size, seed=seed, spread=2.0)
    hits, expanded = search(index, scorer, "a red circle")
    assert len(hits) == 20
    for hit in hits:
        levels = identifier_levels(index, hit, expanded, None)
        chosen = [[choice for choice in level.choices if choice.chosen] for level in levels]
        assert [len(marked) for marked in chosen] == [1] * len(hit.token_ids)
        product = math.prod(marked.probability for (marked,) in chosen)
        assert product == pytest.approx(math.exp(hit.log_prob))
        assert "".join(marked.symbol for (marked,) in chosen) == index.identifier_of(hit)
        for level in levels:
            assert sum(choice.probability for choice in level.choices) + level.rest == pytest.approx(1)
            shown = [choice.probability for choice in level.choices[:SHOWN]]
            assert all(high >= low for high, low in pairwise(shown))
            assert level.scored == (level.children > 1)


def test_choices_count_images_below_and_allowed_images(untrained_index):
    index, scorer = untrained_index, FakeScorer(untrained_index.tokenizer.vocab_size, spread=2.0)
    allowed = index.leaf_filter(RecordFilters.equal({"color": "red"}))
    hits, expanded = search(index, scorer, "anything", leaf_filter=allowed)
    reds = {record.image_id for record in index.records if record.metadata["color"] == "red"}
    assert {index.record_of(hit).image_id for hit in hits} == reds
    for hit in hits:
        prefix = ()
        for level in identifier_levels(index, hit, expanded, allowed):
            for choice in level.choices:
                below = {
                    record.image_id
                    for record, identifier in zip(index.records, index.identifiers, strict=True)
                    if identifier[: len(prefix) + 1] == (*prefix, choice.symbol)
                }
                assert (choice.images, choice.allowed) == (len(below), len(below & reds))
                assert set(choice.examples) <= below & reds
            prefix += tuple(choice.symbol for choice in level.choices if choice.chosen)


def test_counts_exclude_removed_and_include_added_images(pictures, tiny_mllm, tmp_path, monkeypatch):
    """Added images are in a second trie, which a larger index keeps until a tenth of the images has changed."""
    monkeypatch.setattr("llama_index_genret.store.edits.COMPACT_FROM", 1.0)
    corpus = read_corpus(pictures)
    whole = build_index(corpus, tmp_path / "whole", tiny_mllm)
    fewer = remove_images(whole, [corpus.records[0].image_id])
    part = build_index(replace(corpus, records=corpus.records[5:]), tmp_path / "part", tiny_mllm)
    more = add_to_index(part, corpus.records[:5], tiny_mllm)
    assert fewer.trie.live is not None
    assert more.trie.added is not None
    assert more.trie.added.n_leaves >= 5
    for index in (whole, fewer, part, more):
        below = index.trie.key(leaves_below(index.trie, index.trie.roots(1)))
        assert sorted(below.tolist()) == list(range(len(index.records)))
    hits, expanded = search(more, FakeScorer(more.tokenizer.vocab_size, spread=2.0), "a red circle")
    assert {more.record_of(hit).image_id for hit in hits} >= {record.image_id for record in corpus.records[:5]}
    for hit in hits:
        (first, *_) = identifier_levels(more, hit, expanded, None)
        for choice in first.choices:
            assert choice.images == sum(identifier[0] == choice.symbol for identifier in more.identifiers)


async def test_recall_by_text_by_image_and_with_filters(client, pictures):
    found = (await client.post("/api/recall", json={"text": "red circle", "k": 3})).json()
    assert len(found["hits"]) == 3
    assert all(hit["levels"] for hit in found["hits"])
    red = {"text": "a circle", "k": 20, "filters": {"color": ["red", "blue"], "shape": ["circle"]}}
    found = (await client.post("/api/recall", json=red)).json()
    assert sorted(hit["file_name"] for hit in found["hits"]) == ["blue-circle.png", "red-circle.png"]
    picture = to_data_url(pictures / "red-circle.png")
    by_image = (await client.post("/api/recall", json={"image": picture, "k": 2})).json()
    assert [len(hit["levels"]) > 0 for hit in by_image["hits"]] == [True, True]


async def test_answer_has_its_source_images(client):
    body = {"text": "What is it?", "k": 2, "filters": {"color": ["green"]}}
    response = (await client.post("/api/answer", json=body)).json()
    assert len(response["sources"]) == 2
    assert all(source["file_name"].startswith("green-") for source in response["sources"])
    assert isinstance(response["answer"], str)


async def test_images_are_served_by_id_only(client, trained_index, pictures):
    record = trained_index.records[0]
    served = await client.get("/api/image", params={"id": record.image_id})
    assert served.headers["content-type"] == "image/webp"
    for name in ("", "nobody", str(record.path), f"../{record.file_name}", "../../../../etc/passwd"):
        if name != record.image_id:
            assert (await client.get("/api/image", params={"id": name})).status_code == 404
    assert (await client.get(f"/{record.file_name}")).status_code == 404


async def test_requests_of_other_origins_are_refused(client, recaller):
    """A page of another origin can send a form or text, but no JSON. Another host name is refused."""
    plain = {"Content-Type": "text/plain"}
    assert (await client.post("/api/recall", content='{"text": "x"}', headers=plain)).status_code == 415
    assert (await client.get("/", headers={"Host": "evil.example"})).status_code == 400
    page = await client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert page.text.count(f'<script nonce="{nonce}">') == page.text.count("<script") == 1
    assert not [
        word for word in ("http", "//", "innerHTML", "insertAdjacentHTML", "document.write") if word in page.text
    ]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": " "}, "the query is empty"),
        ({"text": "x", "filters": {"size": [1]}}, "no image has metadata 'size'"),
        ({"text": "x", "k": 0}, "k: "),
        ({"text": "x", "colour": 1}, "colour: "),
        ({"image": "data:text/plain;base64,eA=="}, "image"),
    ],
)
async def test_invalid_request_is_refused_with_the_reason(client, body, words):
    refused = await client.post("/api/recall", json=body)
    assert refused.status_code == 400
    assert words in refused.json()["error"]


async def test_body_over_the_limit_is_refused(client):
    async def endless():
        while True:
            yield b" " * (1 << 20)

    headers = {"Content-Type": "application/json"}
    refused = await client.post("/api/recall", content=endless(), headers=headers)
    assert refused.status_code == 413
    assert str(MAX_BODY_BYTES >> 20) in refused.json()["error"]


def test_taken_port_error_has_the_port():
    with listen(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port}.*--port"):
            listen(port)
