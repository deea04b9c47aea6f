"""Filters as access control: no route returns an image that the filters exclude.

The index has twenty images of two tenants. The scorers are tables, so that only the routes are tested.
`integration/test_endpoint_in_process.py` tests the endpoint.
"""

import asyncio
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Thread

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_index.core.llms import MockLLM
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import ImageNode, QueryBundle
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from llama_index.retrievers.bm25 import BM25Retriever

from llama_index_genret import FakeScorer, GenerativeImageRetriever, RecallVerifier, genret_llm, store
from llama_index_genret.cli.browse.app import make_app
from llama_index_genret.cli.browse.recaller import Recaller
from llama_index_genret.errors import FilterError, ServerError
from llama_index_genret.llamaindex.nodes import node_of
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.serving.endpoint.client import RecallClient
from llama_index_genret.store import ScoringChoice, load_index, remove_images
from tests.openai_server import OpenAIServer, running
from tests.serving.endpoint.test_client import Recalling
from tests.store.test_filters import evaluate_with_llama_index

TENANTS = ["acme", "Müller & Söhne 株式会社"]
LEVELS = [0, 1, 2.5, None]


def metadata_of(row):
    """Return metadata with Unicode, numbers, and keys that some images lack."""
    metadata = {"tenant": TENANTS[row % 2], "level": LEVELS[row % 4], "name": f"picture {row}"}
    return {key: value for key, value in metadata.items() if value is not None}


@pytest.fixture(scope="module")
def index(untrained_index):
    records = [replace(record, metadata=metadata_of(row)) for row, record in enumerate(untrained_index.records)]
    return replace(untrained_index, records=tuple(records))


@pytest.fixture(scope="module")
def scorer(index):
    return FakeScorer(index.tokenizer.vocab_size)


def leaf(key, operator, value):
    return MetadataFilter(key=key, value=value, operator=operator)


ONE, SEVERAL = st.sampled_from([*TENANTS, "a", "picture 3"]), st.lists(st.sampled_from(TENANTS), max_size=2)
COMPARING = ["==", "!=", ">", ">=", "<", "<="]
WITHIN_TEXT = ["contains", "text_match", "text_match_insensitive"]
OF_SEVERAL = ["in", "nin", "any", "all"]
LEAVES = st.one_of(
    st.builds(leaf, st.sampled_from(["tenant", "name"]), st.sampled_from(COMPARING), ONE),
    st.builds(leaf, st.just("name"), st.sampled_from(WITHIN_TEXT), ONE),
    st.builds(leaf, st.sampled_from(["tenant", "name"]), st.sampled_from(OF_SEVERAL), SEVERAL),
    st.builds(leaf, st.just("level"), st.sampled_from(COMPARING), st.sampled_from([0, 1, 2])),
    st.builds(leaf, st.just("level"), st.sampled_from(["in", "nin"]), st.just([0, 1])),
    st.builds(leaf, st.just("level"), st.just("is_empty"), st.none()),
)
assert {*COMPARING, *WITHIN_TEXT, *OF_SEVERAL, "is_empty"} == {operator.value for operator in FilterOperator}
TREES = st.recursive(
    LEAVES,
    lambda parts: st.builds(
        lambda filters, condition: MetadataFilters(filters=filters, condition=condition),
        st.lists(parts, min_size=1, max_size=3),
        st.sampled_from(FilterCondition),
    ),
    max_leaves=6,
).map(lambda tree: MetadataFilters(filters=[tree]))


def allowed_by(filters, index):
    """Return the ids of the images that pass LlamaIndex's own evaluator."""
    passing = evaluate_with_llama_index(filters, [dict(record.metadata) for record in index.records])
    return {record.image_id for record, passes in zip(index.records, passing, strict=True) if passes}


def ids(nodes):
    return [found.node.node_id for found in nodes]


def fused(index, scorer, filters, k):
    ours = GenerativeImageRetriever(index, scorer, filters=filters, similarity_top_k=k)
    nodes = ours.candidate_nodes()
    partners = [BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=20)] if nodes else []
    retrievers = [ours, *partners]
    return QueryFusionRetriever(retrievers, llm=MockLLM(), num_queries=1, mode="reciprocal_rerank", similarity_top_k=50)


def verified(index, scorer, filters, k):
    retriever = GenerativeImageRetriever(index, scorer, filters=filters, similarity_top_k=k)
    return RecallVerifier(retriever).postprocess_nodes(retriever.retrieve("red circle"), query_str="red circle")


def retrieved(index, scorer, filters, k, bundle="red circle", **options):
    return GenerativeImageRetriever(index, scorer, filters=filters, similarity_top_k=k, **options).retrieve(bundle)


def awaited(index, scorer, filters, k):
    retriever = GenerativeImageRetriever(index, scorer, filters=filters, similarity_top_k=k)
    return asyncio.run(retriever.aretrieve("red circle"))


def from_a_docstore(index, scorer, filters, k):
    docstore = SimpleDocumentStore()
    docstore.add_documents([node_of(record) for record in index.records])
    return retrieved(index, scorer, filters, k, docstore=docstore)


ROUTES = {
    "beam": retrieved,
    "beam, async": awaited,
    "narrow beam": lambda *a: retrieved(*a, beam_width=1),
    "exact": lambda *a: retrieved(*a, mode="exact"),
    "limited exact": lambda *a: retrieved(*a, mode="exact", max_expansions=2),
    "whole vocabulary": lambda *a: retrieved(*a, normalise="vocabulary"),
    "rerank": lambda *a: retrieved(*a, scoring=ScoringChoice(rerank=20)),
    "an image": lambda index, *a: retrieved(index, *a, bundle=QueryBundle("", image_path=str(index.records[0].path))),
    "some images": lambda index, *a: retrieved(index, *a, image_ids=[r.image_id for r in index.records[:9]]),
    "docstore": from_a_docstore,
    "fusion with BM25": lambda *a: fused(*a).retrieve("red circle"),
    "verifier": verified,
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TREES, st.integers(1, 25), st.data())
def test_no_route_returns_an_image_outside_the_filters(index, scorer, filters, k, data):
    allowed = allowed_by(filters, index)
    for name in data.draw(st.permutations(list(ROUTES)))[:4]:
        found = ids(ROUTES[name](index, scorer, filters, k))
        assert set(found) <= allowed, name
        assert len(set(found)) == len(found), name
        if name not in ("fusion with BM25", "some images"):
            assert len(found) == min(k, len(allowed)), name


@pytest.mark.parametrize("name", ROUTES)
def test_each_route_returns_one_tenant_completely(index, scorer, name):
    """The test above samples four routes at a time, this one runs all of them."""
    mine = MetadataFilters(filters=[leaf("tenant", "==", TENANTS[1])])
    searched = index.records[:9] if name == "some images" else index.records
    assert set(ids(ROUTES[name](index, scorer, mine, 20))) == {
        record.image_id for record in searched if record.metadata["tenant"] == TENANTS[1]
    }


def test_edits_and_a_reload_keep_the_filters(untrained_index, scorer, tmp_path):
    """One retriever uses several versions of the index, with removed and restored images."""
    shutil.copytree(untrained_index.folder, tmp_path / "index")
    index = load_index(tmp_path / "index")
    red = MetadataFilters(filters=[leaf("color", "==", "red")])
    retriever = GenerativeImageRetriever(index, scorer, filters=red, similarity_top_k=20)
    by_id = {record.image_id: record for record in index.records}
    kept = dict(zip(by_id, index.identifiers, strict=True))
    index = remove_images(index, ["red-bar", "blue-bar"])
    retriever.use(index, scorer)
    assert set(ids(retriever.retrieve("x"))) == {"red-circle", "red-frame", "red-square"}
    restored = [by_id["red-bar"], by_id["blue-bar"]]
    store.add_images(index, restored, [kept["red-bar"], kept["blue-bar"]], index.scheme())
    retriever.use(load_index(tmp_path / "index"), scorer)
    assert set(ids(retriever.retrieve("x"))) == {"red-bar", "red-circle", "red-frame", "red-square"}
    retriever.use(remove_images(load_index(tmp_path / "index"), [i for i in by_id if i.startswith("red")]), scorer)
    assert retriever.retrieve("x") == []


WRONG = {
    "text with numbers": {"key": "level", "value": "1", "operator": "!="},
    "number with texts": {"key": "tenant", "value": 5, "operator": "!="},
    "numbers with texts": {"key": "tenant", "value": [5], "operator": "nin"},
    "one for several": {"key": "tenant", "value": "acme", "operator": "in"},
    "one for any": {"key": "tenant", "value": "acme", "operator": "any"},
    "several for one": {"key": "tenant", "value": ["acme"], "operator": "!="},
    "no value": {"key": "tenant", "value": None, "operator": "!="},
    "no such key": {"key": "tenants", "value": "acme", "operator": "!="},
    "NaN": {"key": "level", "value": math.nan, "operator": "!="},
    "infinity": {"key": "level", "value": math.inf, "operator": "!="},
    "half a character": {"key": "tenant", "value": "\ud800", "operator": "!="},
    "or of nothing": {"filters": [], "condition": "or"},
    "not of nothing": {"filters": [], "condition": "not"},
    "nothing inside": {"filters": [{"filters": [], "condition": "or"}], "condition": "not"},
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_filter_is_refused_never_ignored(index, scorer, name):
    """LlamaIndex reads each of these as "everything", or `in` as a substring. So did this package once."""
    filters = MetadataFilters.model_validate({"filters": [WRONG[name]]})
    with pytest.raises(FilterError):
        GenerativeImageRetriever(index, scorer, filters=filters)
    retriever = GenerativeImageRetriever(index, scorer, similarity_top_k=20)
    with pytest.raises(FilterError):
        retriever.filters = filters
    assert retriever.filters is None


@pytest.mark.parametrize("filters", [{"tenant": "acme"}, [leaf("tenant", "==", "acme")], "acme"])
def test_filters_must_be_those_of_llama_index(index, scorer, filters):
    with pytest.raises(FilterError):
        GenerativeImageRetriever(index, scorer, filters=filters)


def test_filters_are_copied_and_can_be_replaced(index, scorer):
    given = MetadataFilters(filters=[leaf("tenant", "==", "acme")])
    retriever = GenerativeImageRetriever(index, scorer, filters=given, similarity_top_k=20)
    mine = {record.image_id for record in index.records if record.metadata["tenant"] == "acme"}
    given.filters.clear()
    retriever.filters.filters.clear()
    assert set(ids(retriever.retrieve("x"))) == mine
    retriever.filters = MetadataFilters(filters=[leaf("tenant", "!=", "acme")])
    assert not set(ids(retriever.retrieve("x"))) & mine
    assert not set(ids(asyncio.run(retriever.aretrieve("x")))) & mine


def test_docstore_metadata_overrides_the_index(index, scorer, caplog):
    """A node that moved to another tenant in the docstore is not returned to the old one."""
    docstore = SimpleDocumentStore()
    docstore.add_documents([node_of(record) for record in index.records])
    mine = [record.image_id for record in index.records if record.metadata["tenant"] == "acme"]
    moved, odd, silent = mine[:3]
    for image_id, metadata in ((moved, {"tenant": TENANTS[1]}), (odd, {"tenant": ["acme"]}), (silent, {})):
        docstore.add_documents([ImageNode(id_=image_id, image_path="x.png", metadata=metadata)], allow_update=True)
    filters = MetadataFilters(filters=[leaf("tenant", "==", "acme")])
    found = retrieved(index, scorer, filters, 20, docstore=docstore)
    assert set(ids(found)) == set(mine) - {moved, odd}
    assert [one.node.metadata["genret_rank"] for one in found] == list(range(1, len(mine) - 1))
    assert moved in caplog.text


def test_concurrent_tenants_see_only_their_images(index, scorer):
    """Two filters share one index and scorer, in threads and in one event loop."""
    retrievers = [
        GenerativeImageRetriever(
            index, scorer, similarity_top_k=20, filters=MetadataFilters(filters=[leaf("tenant", "==", tenant)])
        )
        for tenant in TENANTS
    ]
    mine = [{r.image_id for r in index.records if r.metadata["tenant"] == tenant} for tenant in TENANTS]
    tenants = [number % 2 for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda who: ids(retrievers[who].retrieve("red circle")), tenants))
    assert [set(one) for one in found] == [mine[who] for who in tenants]

    async def both():
        return await asyncio.gather(*(retrievers[who].aretrieve("red circle") for who in tenants))

    assert [set(ids(one)) for one in asyncio.run(both())] == [mine[who] for who in tenants]


def test_concurrent_filter_changes_and_edits_are_kept(index, scorer):
    """`use` and `filters` each replace a part of the same state."""
    retriever = GenerativeImageRetriever(index, scorer, similarity_top_k=20)
    stop = False

    def edit():
        while not stop:
            retriever.use(index, scorer)

    editing = Thread(target=edit)
    editing.start()
    try:
        for number in range(300):
            retriever.filters = MetadataFilters(filters=[leaf("tenant", "==", TENANTS[number % 2])])
            assert retriever._source.filters.filters[0].value == TENANTS[number % 2]
    finally:
        stop = True
        editing.join()


def test_stock_protocol_keeps_the_filters(index):
    """The server only scores tokens. The client's search applies the filters."""
    filters = MetadataFilters(filters=[leaf("tenant", "==", "acme")])
    mine = {record.image_id for record in index.records if record.metadata["tenant"] == "acme"}
    with running(OpenAIServer(vocabulary=index.tokenizer.vocab_size)) as server:
        server.models = [{"id": "only", "max_model_len": 2000}]
        remote = VllmScorer(server.api_base)
        for options in ({}, {"mode": "exact"}, {"scoring": ScoringChoice(rerank=5)}):
            assert set(ids(retrieved(index, remote, filters, 20, **options))) == mine
        assert set(ids(awaited(index, remote, filters, 20))) == mine


@pytest.fixture
def ignoring_server(index):
    """A server whose endpoint ignores the filters of a request."""
    server = Recalling(index, has_endpoint=True)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_endpoint_gets_the_filters_and_is_checked(index, scorer, ignoring_server):
    filters = MetadataFilters(filters=[leaf("tenant", "==", "acme")])
    remote = VllmScorer(ignoring_server.api_base)
    endpoint = RecallClient(index, remote.server)
    for retrieve in (
        lambda r: r.retrieve("red circle"),
        lambda r: asyncio.run(r.aretrieve("red circle")),
    ):
        retriever = GenerativeImageRetriever(index, remote, filters=filters, similarity_top_k=20, endpoint=endpoint)
        with pytest.raises(ServerError, match="does not pass the filters"):
            retrieve(retriever)
    (_, _, body), *_ = ignoring_server.requests
    assert body["filters"]["filters"][0] == {"key": "tenant", "value": "acme", "operator": "=="}
    everything = GenerativeImageRetriever(index, remote, similarity_top_k=20, endpoint=endpoint)
    assert len(everything.retrieve("red circle")) == 20


async def test_browse_page_keeps_the_filters(index, scorer, pictures):
    """So do the examples below a child. `/api/image` serves any image, because the page belongs to its owner."""
    mine = {record.image_id for record in index.records if record.metadata["tenant"] == TENANTS[1]}
    app = make_app(Recaller(index, scorer, MockLLM()))
    transport = httpx.ASGITransport(app)
    body = {"text": "red circle", "k": 20, "filters": {"tenant": [TENANTS[1]]}}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        hits = (await client.post("/api/recall", json=body)).json()["hits"]
        choices = [choice for hit in hits for level in hit["levels"] for choice in level["choices"]]
        nothing = (await client.post("/api/recall", json={**body, "filters": {"tenant": []}})).json()["hits"]
        wrong = await client.post("/api/recall", json={**body, "filters": {"level": ["1"]}})
        misspelt = await client.post("/api/recall", json={"text": "x", "filter": {"tenant": ["acme"]}})
    assert {hit["image_id"] for hit in hits} == mine
    assert {example for choice in choices for example in choice["examples"]} == mine
    assert nothing == []
    assert (wrong.status_code, misspelt.status_code) == (400, 400)


def test_browse_answer_uses_only_allowed_images(index, scorer):
    with running(OpenAIServer()) as server:
        recaller = Recaller(index, scorer, genret_llm(server.api_base))
        answered = recaller.answer("red circle", k=20, filters={"tenant": ["acme"]})
        assert len(server.images()[0]) == 10
    assert {source.image_id for source in answered.sources} == {
        record.image_id for record in index.records if record.metadata["tenant"] == "acme"
    }
