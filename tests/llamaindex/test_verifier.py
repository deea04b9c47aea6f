"""`RecallVerifier` matches sums of log-probabilities, in this process and over HTTP, and abstains."""

import asyncio
import math

import numpy as np
import pytest
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode

from llama_index_genret import FakeScorer, GenerativeImageRetriever, RecallVerifier
from llama_index_genret.errors import QueryError, UnknownImage
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.abstention import Abstention, fit_abstention
from llama_index_genret.scorers.rerank import Continuation
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.search import Normalise
from tests.scorers.test_rerank import plain_log_likelihood
from tests.scorers.test_vllm_http import server  # noqa: F401

pytestmark = pytest.mark.torch

QUERY = "red circle"
NEVER = Abstention(weights={"odds": 1.0}, threshold=0.0)
ALWAYS = Abstention(weights={"odds": 1.0}, threshold=1.0)


@pytest.fixture(scope="module")
def retriever(trained_index, trained_mllm):
    return GenerativeImageRetriever(trained_index, TransformersScorer(trained_mllm), similarity_top_k=4)


@pytest.fixture(scope="module")
def fake(trained_index):
    scorer = FakeScorer(trained_index.tokenizer.vocab_size, spread=0.3)
    return GenerativeImageRetriever(trained_index, scorer, similarity_top_k=4)


def by_id(nodes):
    return {found.node.node_id: found for found in nodes}


def references(verifier, index, shown):
    """Return the rows drawn for log p(query), without the images to verify."""
    drawn = np.random.default_rng(0).integers(0, len(index.records), verifier.references)
    return sorted(set(drawn.tolist()) - {index.rows_by_id[image_id] for image_id in shown})


@pytest.mark.parametrize("by", ["identifier", "image"])
def test_scores_add_weighted_information_to_log_odds(retriever, trained_index, trained_mllm, by):
    """The scores equal those of one plain forward pass per image."""
    verifier = RecallVerifier(retriever, by=by, weight=0.5, references=5)
    nodes = retriever.retrieve(QUERY)
    words, tokenizer, prompts = (
        trained_index.tokenizer.encode_text(QUERY),
        trained_index.tokenizer,
        trained_index.prompts,
    )

    def log_p(row):
        if by == "image":
            prompt = prompts.for_caption(tokenizer, trained_index.records[row].path)
        else:
            prompt = prompts.for_identifier(tokenizer, trained_index.token_ids(row))
        return plain_log_likelihood(trained_mllm, Continuation(prompt, tuple(words)))

    others = [log_p(row) for row in references(verifier, trained_index, by_id(nodes))]
    assert others
    background = math.log(np.mean(np.exp(others)))
    found = verifier.postprocess_nodes(nodes, query_str=QUERY)
    for node in nodes:
        information = log_p(trained_index.rows_by_id[node.node.node_id]) - background
        verified = by_id(found)[node.node.node_id]
        assert verified.node.metadata["genret_information"] == pytest.approx(information, abs=4e-3)
        odds = node.score / (1 - node.score) * math.exp(0.5 * information)
        assert verified.score == pytest.approx(odds / (1 + odds), rel=4e-3)
    assert [n.score for n in found] == sorted((n.score for n in found), reverse=True)
    assert len(found) == len(nodes)


def test_signals_match_their_definitions(retriever, trained_index, trained_mllm):
    signals = RecallVerifier(retriever)._signals(retriever, QUERY)
    nodes = retriever.retrieve(QUERY)
    scores = [node.score for node in nodes]
    odds = [math.log(p / (1 - p)) for p in scores]
    prompt = trained_index.prompts.for_query(trained_index.tokenizer, QUERY)
    rows = [trained_index.rows_by_id[node.node.node_id] for node in nodes]
    continuations = [Continuation(Prompt(prompt.token_ids), trained_index.token_ids(row)) for row in rows]
    identifiers = np.logaddexp.reduce([plain_log_likelihood(trained_mllm, one) for one in continuations])
    verified = RecallVerifier(retriever).postprocess_nodes(nodes, query_str=QUERY)
    information = max(node.node.metadata["genret_information"] for node in verified) / len(prompt.words)
    assert signals == pytest.approx((odds[0], odds[0] - odds[1], information, identifiers), abs=4e-3)


def test_async_verifies_the_same_in_three_event_loops(retriever):
    verifier = RecallVerifier(retriever)
    nodes = retriever.retrieve(QUERY)
    expected = [(n.node.node_id, n.score) for n in verifier.postprocess_nodes(nodes, query_str=QUERY)]
    for _ in range(3):
        found = asyncio.run(verifier.apostprocess_nodes(nodes, query_str=QUERY))
        assert [n.node.node_id for n in found] == [name for name, _ in expected]
        assert [n.score for n in found] == pytest.approx([score for _, score in expected])


async def test_server_verifies_like_its_fake_scorer(server, trained_index, monkeypatch):  # noqa: F811
    """The verifier sends one request for all identifiers, and one for all likelihoods."""
    prompt = trained_index.prompts.for_query(trained_index.tokenizer, QUERY)
    monkeypatch.setattr("tests.scorers.test_vllm_http.PROMPTS", [Prompt(prompt.token_ids)])
    server.table = FakeScorer(trained_index.tokenizer.vocab_size)
    server.models = [{"id": "only", "max_model_len": 500}]
    nodes = GenerativeImageRetriever(trained_index, server.table, similarity_top_k=4).retrieve(QUERY)
    remote = RecallVerifier(GenerativeImageRetriever(trained_index, VllmScorer(server.api_base)))
    once = remote.postprocess_nodes(nodes, query_str=QUERY)
    again = await remote.apostprocess_nodes(nodes, QueryBundle(QUERY))
    assert [node.node.metadata for node in again] == [node.node.metadata for node in once]
    others = references(remote, trained_index, by_id(nodes))
    batch_sizes = [len(request["prompt"]) for request in server.requests if "prompt_logprobs" in request]
    assert batch_sizes == [len(nodes) + len(others)] * 2
    assert len(server.requests) == 4
    words = tuple(trained_index.tokenizer.encode_text(QUERY))

    def log_p(row):
        first, *rest = trained_index.prompts.for_identifier(
            trained_index.tokenizer, trained_index.token_ids(row)
        ).token_ids
        text, values = (*rest, *words), []
        for place in range(len(rest), len(text)):
            logits = server.table.logits(Prompt((first,)), text[:place])
            values.append(logits[text[place]] - np.logaddexp.reduce(logits))
        return sum(values)

    background = math.log(np.mean(np.exp([log_p(row) for row in others])))
    for node in once:
        expected = log_p(trained_index.rows_by_id[node.node.node_id]) - background
        assert node.node.metadata["genret_information"] == pytest.approx(expected)


def test_verifier_abstains_or_adds_confidence(fake):
    nodes = fake.retrieve(QUERY)
    assert RecallVerifier(fake, abstention=ALWAYS).postprocess_nodes(nodes, query_str=QUERY) == []
    found = RecallVerifier(fake, abstention=NEVER).postprocess_nodes(nodes, query_str=QUERY)
    assert len(found) == 4
    surest = max(node.score for node in nodes)
    assert [node.node.metadata["genret_confidence"] for node in found] == pytest.approx([surest] * 4)


def test_top_n_keeps_the_best(fake):
    nodes = fake.retrieve(QUERY)
    everything = RecallVerifier(fake).postprocess_nodes(nodes, query_str=QUERY)
    best = RecallVerifier(fake, top_n=2).postprocess_nodes(nodes, query_str=QUERY)
    assert [n.node.node_id for n in best] == [n.node.node_id for n in everything[:2]]


def test_weight_zero_keeps_order_and_scores(fake):
    nodes = fake.retrieve(QUERY)
    found = RecallVerifier(fake, weight=0.0).postprocess_nodes(nodes, query_str=QUERY)
    assert [n.node.node_id for n in found] == [n.node.node_id for n in nodes]
    assert [n.score for n in found] == pytest.approx([n.score for n in nodes])


def test_verifier_keeps_its_input_nodes_unchanged(fake):
    nodes = fake.retrieve(QUERY)
    before = [node.to_dict() for node in nodes]
    (first, *_) = RecallVerifier(fake, abstention=NEVER).postprocess_nodes(nodes, query_str=QUERY)
    assert [node.to_dict() for node in nodes] == before
    assert type(first.node) is type(nodes[0].node)
    assert first.node.get_metadata_str(MetadataMode.LLM) == nodes[0].node.get_metadata_str(MetadataMode.LLM)


@pytest.mark.filterwarnings("ignore::llama_index_genret.errors.ImageNotShown")  # no answer is checked
def test_verifier_works_in_a_query_engine_sync_and_async(fake):
    def engine(abstention):
        verifier = RecallVerifier(fake, abstention=abstention)
        return RetrieverQueryEngine.from_args(fake, llm=MockLLM(), node_postprocessors=[verifier])

    assert len(engine(NEVER).query(QUERY).source_nodes) == 4
    assert engine(ALWAYS).query(QUERY).source_nodes == []
    assert asyncio.run(engine(ALWAYS).aquery(QUERY)).source_nodes == []


def test_calibration_limits_the_lost_known_queries(fake):
    known, unknown = ([f"{word} number {i}" for i in range(20)] for word in ("red", "nothing"))
    verifier = RecallVerifier(fake).calibrated(known, unknown, lost=0.1)
    lost = sum(not verifier.postprocess_nodes(fake.retrieve(query), query_str=query) for query in known)
    assert lost == 2
    plain = RecallVerifier(fake)
    signals = [[plain._signals(fake, query) for query in kind] for kind in (known, unknown)]
    assert verifier.abstention == fit_abstention(*signals, lost=0.1)
    assert plain.abstention is None


def test_nodes_of_another_retriever_are_matched_by_image_id(fake, trained_index):
    node = TextNode(text="a caption", id_="chunk 7", metadata={"image_id": trained_index.records[3].image_id})
    (found,) = RecallVerifier(fake, weight=0.3).postprocess_nodes(
        [NodeWithScore(node=node, score=None)], query_str=QUERY
    )
    information = found.node.metadata["genret_information"]
    assert found.score == pytest.approx(1 / (1 + math.exp(-0.3 * information)))
    assert found.node.text == "a caption"


def test_invalid_verification_is_refused(fake, trained_index):
    verifier, nodes = RecallVerifier(fake), fake.retrieve(QUERY)
    assert verifier.postprocess_nodes([]) == []
    with pytest.raises(QueryError, match="query_str"):
        verifier.postprocess_nodes(nodes)
    with pytest.raises(QueryError, match="image_path"):
        verifier.postprocess_nodes(nodes, QueryBundle("", image_path=str(trained_index.records[0].path)))
    with pytest.raises(UnknownImage, match="elsewhere"):
        verifier.postprocess_nodes([NodeWithScore(node=TextNode(id_="elsewhere"))], query_str=QUERY)


def test_recalled_images_are_the_references_if_all_recalled(fake, trained_index):
    everything = GenerativeImageRetriever(trained_index, fake._scorer, similarity_top_k=20)
    found = RecallVerifier(everything).postprocess_nodes(everything.retrieve(QUERY), query_str=QUERY)
    information = [node.node.metadata["genret_information"] for node in found]
    assert len(found) == 20
    assert np.mean(np.exp(information)) == pytest.approx(1.0)


def test_verifier_is_a_llama_index_postprocessor(fake):
    assert issubclass(RecallVerifier, BaseNodePostprocessor)
    assert RecallVerifier.class_name() == "genret_recall_verifier"
    assert RecallVerifier(fake, by="image").to_dict()["by"] == "image"


def test_verifier_opens_one_session(fake, monkeypatch):
    sessions = []
    original = fake._scorer.session

    def session(self, prompts, normalise):
        sessions.append(normalise)
        return original(prompts, normalise)

    monkeypatch.setattr(FakeScorer, "session", session)
    nodes = fake.retrieve(QUERY)
    sessions.clear()
    RecallVerifier(fake).postprocess_nodes(nodes, query_str=QUERY)
    assert sessions == [Normalise.VOCABULARY]
