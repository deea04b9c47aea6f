"""Fusion with text retrievers over the same nodes returns an image that several of them find as one hit."""

import asyncio
import hashlib

import numpy as np
import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.retrievers.bm25 import BM25Retriever

from llama_index_genret import FakeScorer, GenerativeImageRetriever, genret_llm, image_query_engine
from llama_index_genret.llamaindex.nodes import node_of
from tests.openai_server import ANSWER, OpenAIServer, pixels, running

QUERY = "red circle"
N = 20


class TrigramEmbedding(BaseEmbedding):
    """A dense embedding without a model: counts of hashed character trigrams."""

    def _get_text_embedding(self, text):
        vector = np.zeros(64)
        padded = f"  {text.lower()} "
        for start in range(len(padded) - 2):
            vector[hashlib.sha256(padded[start : start + 3].encode()).digest()[0] % 64] += 1
        return (vector / np.linalg.norm(vector)).tolist()

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)


@pytest.fixture(scope="module")
def docstore(untrained_index):
    docstore = SimpleDocumentStore()
    docstore.add_documents([node_of(record) for record in untrained_index.records])
    return docstore


@pytest.fixture(scope="module")
def generative(untrained_index, docstore):
    scorer = FakeScorer(untrained_index.tokenizer.vocab_size)
    return GenerativeImageRetriever(untrained_index, scorer, docstore=docstore, similarity_top_k=N)


@pytest.fixture(scope="module")
def bm25(docstore):
    return BM25Retriever.from_defaults(docstore=docstore, similarity_top_k=N)


@pytest.fixture(scope="module")
def dense(docstore):
    index = VectorStoreIndex(
        list(docstore.docs.values()),
        embed_model=TrigramEmbedding(),
        storage_context=StorageContext.from_defaults(docstore=docstore),
    )
    return index.as_retriever(similarity_top_k=N)


def fusion(retrievers, mode, top_k=2 * N):
    return QueryFusionRetriever(retrievers, llm=MockLLM(), num_queries=1, mode=mode, similarity_top_k=top_k)


def ids(nodes):
    return [node.node.node_id for node in nodes]


def hashes(retriever):
    return {found.node.hash for found in retriever.retrieve(QUERY)}


def test_bm25_and_dense_find_the_expected_image(bm25, dense):
    """Otherwise the fusion tests would prove nothing."""
    assert ids(bm25.retrieve(QUERY))[0] == ids(dense.retrieve(QUERY))[0] == "red-circle"


@pytest.mark.parametrize("mode", FUSION_MODES)
@pytest.mark.parametrize("partner", ["bm25", "dense"])
def test_image_found_by_both_retrievers_is_one_hit(request, generative, partner, mode):
    other = request.getfixturevalue(partner)
    fused = fusion([generative, other], mode)
    assert hashes(other) <= hashes(generative)  # LlamaIndex merges by hash
    for nodes in (fused.retrieve(QUERY), asyncio.run(fused.aretrieve(QUERY))):
        assert len(ids(nodes)) == len(set(ids(nodes))) == N
        assert all(node.score is not None for node in nodes)
    if mode is FUSION_MODES.RECIPROCAL_RANK:  # 1 / (60 + place) of each, summed
        ranks = [ids(retriever.retrieve(QUERY)) for retriever in (generative, other)]
        best = min(ranks[0], key=lambda i: -sum(1 / (60 + ranking.index(i)) for ranking in ranks if i in ranking))
        assert nodes[0].node.node_id == best


async def test_three_retrievers_are_fused_in_a_running_loop(generative, bm25, dense):
    fused = fusion([generative, bm25, dense], FUSION_MODES.RECIPROCAL_RANK)
    assert ids(fused.retrieve(QUERY)) == ids(await fused.aretrieve(QUERY))


def test_fusion_keeps_the_scores_of_the_next_query(generative, bm25):
    before = [(n.node.node_id, n.score) for n in generative.retrieve(QUERY)]
    fusion([generative, bm25], FUSION_MODES.RELATIVE_SCORE).retrieve(QUERY)
    assert [(n.node.node_id, n.score) for n in generative.retrieve(QUERY)] == before


@pytest.mark.parametrize("how", ["sync", "async"])
def test_images_of_a_fusion_reach_the_model(generative, bm25, dense, how):
    """Images that only a text retriever found arrive too, as LlamaIndex's own image nodes."""
    fused = fusion([generative, bm25, dense], FUSION_MODES.RECIPROCAL_RANK, top_k=3)
    with running(OpenAIServer()) as server:
        engine = image_query_engine(fused, genret_llm(server.api_base))
        response = engine.query(QUERY) if how == "sync" else asyncio.run(engine.aquery(QUERY))
        assert str(response) == ANSWER
        assert server.images() == [[pixels(node.node.image_path) for node in response.source_nodes]]
    assert len(response.source_nodes) == 3
