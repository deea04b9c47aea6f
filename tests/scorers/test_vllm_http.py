"""Test the HTTP scorer against a small server with vLLM's protocol and a table of scores, and against faults.

`integration/test_vllm.py` tests against a real server. This one also sends responses that only a broken server sends.
"""

import asyncio

import numpy as np
import pytest

from llama_index_genret.errors import QueryError, ServerError, ServerUnreachable
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import arecall, recall
from llama_index_genret.scorers.rerank import Continuation
from llama_index_genret.scorers.vllm_http import MAX_LOGPROB_TOKENS, VllmScorer
from llama_index_genret.search import Normalise, SearchOptions
from llama_index_genret.trie import build_trie
from tests.openai_server import OpenAIServer, running

VOCABULARY = 400
PROMPTS = [Prompt((1, 2)), Prompt((3,))]


@pytest.fixture
def server():
    with running(OpenAIServer(vocabulary=VOCABULARY, prompts=PROMPTS)) as server:
        yield server


def identifiers(n, depth=3, seed=0):
    rng = np.random.default_rng(seed)
    return sorted({tuple(rng.integers(0, VOCABULARY, depth).tolist()) for _ in range(n)})


@pytest.mark.parametrize("normalise", Normalise)
@pytest.mark.parametrize("n", [5, 600])
def test_recall_over_http_equals_recall_from_table(server, normalise, n):
    """With 600 identifiers the root has more children than one request may contain."""
    trie, _ = build_trie(identifiers(n))
    expected = recall(server.table, trie, PROMPTS, SearchOptions(k=5, normalise=normalise))
    scorer = VllmScorer(server.api_base)
    for rankings in (
        recall(scorer, trie, PROMPTS, SearchOptions(k=5, normalise=normalise)),
        asyncio.run(arecall(scorer, trie, PROMPTS, SearchOptions(k=5, normalise=normalise))),
    ):
        for ours, theirs in zip(rankings, expected, strict=True):
            assert [hit.leaf for hit in ours.hits] == [hit.leaf for hit in theirs.hits]
            np.testing.assert_allclose([h.log_prob for h in ours.hits], [h.log_prob for h in theirs.hits], atol=1e-9)
    assert max(len(request["logprob_token_ids"]) for request in server.requests) <= MAX_LOGPROB_TOKENS


def test_step_of_many_beams_with_few_children_is_one_request(server):
    trie, _ = build_trie([(a, b, c) for a in range(5) for b in range(4) for c in range(3)])
    recall(VllmScorer(server.api_base), trie, PROMPTS, SearchOptions(k=5))
    assert [len(request["prompt"]) for request in server.requests] == [2, 10, 20]


CONTINUATIONS = [Continuation(Prompt((7,)), (8, 9)), Continuation(Prompt((6,)), (5, 4, 3))]


def test_log_likelihoods_over_http_equal_those_from_table(server, monkeypatch):
    """This also holds with one prompt in each request."""
    scorer = VllmScorer(server.api_base)
    with server.table.session([], Normalise.CHILDREN) as session:
        expected = session.log_likelihoods(CONTINUATIONS)
    for most in (256, 1):
        monkeypatch.setattr("llama_index_genret.scorers.vllm_http.MAX_PROMPTS", most)
        with scorer.session([], Normalise.CHILDREN) as session:
            np.testing.assert_allclose(session.log_likelihoods(CONTINUATIONS), expected)

    async def run():
        async with scorer.async_session([], Normalise.CHILDREN) as session:
            return await session.log_likelihoods(CONTINUATIONS)

    np.testing.assert_allclose(asyncio.run(run()), expected)


@pytest.mark.parametrize("bad", [None, [], [None], [None, {"8": {"logprob": -1.0}}, {"4": {"logprob": -1.0}}]])
def test_missing_likelihoods_are_an_error(server, bad):
    server.spoil = lambda answer: answer["choices"][-1].update(prompt_logprobs=bad) or answer
    with (
        VllmScorer(server.api_base).session([], Normalise.CHILDREN) as session,
        pytest.raises(ServerError, match="re-ranking"),
    ):
        session.log_likelihoods(CONTINUATIONS)


def test_image_or_too_long_continuations_are_never_sent(server, tmp_path):
    with VllmScorer(server.api_base).session([], Normalise.CHILDREN) as session:
        for one, words in (
            (Continuation(Prompt((1,), tmp_path), (2,)), "in this process"),
            (Continuation(Prompt(tuple(range(60))), tuple(range(40))), "--max-model-len 100"),
        ):
            with pytest.raises(QueryError, match=words):
                session.log_likelihoods([one])
    assert server.requests == []


def spoil_choice(change):
    def spoil(answer):
        change(answer["choices"][0])
        return answer

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer: b"<html>",
        lambda answer: [],
        lambda answer: {"choices": answer["choices"][1:]},
        spoil_choice(lambda choice: choice.update(logprobs=None)),
        spoil_choice(lambda choice: choice["logprobs"].update(top_logprobs=[])),
        spoil_choice(lambda choice: choice["logprobs"]["top_logprobs"][0].popitem()),
        spoil_choice(
            lambda choice: choice["logprobs"]["top_logprobs"][0].update(
                dict.fromkeys([f"token_id:{t}" for t in range(400)], "x")
            )
        ),
    ],
    ids=["html", "list", "too few choices", "no logprobs", "no positions", "a token missing", "no numbers"],
)
def test_malformed_response_is_an_error_with_the_address(server, spoil):
    server.spoil = spoil
    trie, _ = build_trie(identifiers(5))
    with pytest.raises(ServerError, match=f"127.0.0.1:{server.server_port}"):
        recall(VllmScorer(server.api_base), trie, PROMPTS, SearchOptions(k=1))


@pytest.mark.parametrize("status", [400, 500, 503])
def test_error_status_is_in_the_error(server, status):
    server.status = status
    with pytest.raises(ServerError, match=str(status)):
        recall(VllmScorer(server.api_base), build_trie(identifiers(5))[0], PROMPTS, SearchOptions(k=1))


def test_only_model_is_chosen_and_several_need_a_name(server):
    assert VllmScorer(server.api_base).served_model() == "only"
    server.models = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(ServerError, match=r"\['a', 'b'\]"):
        VllmScorer(server.api_base).served_model()
    assert VllmScorer(server.api_base, model="b").served_model() == "b"
    with pytest.raises(ServerError, match=r"serves \['a', 'b'\], not 'c'"):
        VllmScorer(server.api_base, model="c").served_model()


def test_server_with_other_weights_is_rejected(server):
    server.models = [{"id": "genret"}, {"id": "genret-0123456789ab"}]
    assert VllmScorer(server.api_base, weights_id="0123456789ab").served_model() == "genret"
    with pytest.raises(ServerError, match=r"0123456789ab.*the index has ffffffffffff"):
        VllmScorer(server.api_base, weights_id="ffffffffffff").served_model()


def test_prompt_longer_than_served_context_is_never_sent(server):
    with pytest.raises(QueryError, match="--max-model-len 100"):
        recall(
            VllmScorer(server.api_base), build_trie(identifiers(5))[0], [Prompt(tuple(range(99)))], SearchOptions(k=1)
        )
    assert server.requests == []


def test_image_query_error_names_an_alternative(server, tmp_path):
    with pytest.raises(QueryError, match="in this process"):
        recall(VllmScorer(server.api_base), build_trie(identifiers(5))[0], [Prompt((1,), tmp_path)], SearchOptions(k=1))


def test_server_timeout_is_an_error(server):
    server.spoil = lambda answer: __import__("time").sleep(60) or answer
    scorer = VllmScorer(server.api_base, timeout_s=0.2)
    with pytest.raises(ServerUnreachable, match="in time"):
        recall(scorer, build_trie(identifiers(5))[0], PROMPTS, SearchOptions(k=1))


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/v1", "http://[bad/v1", "nonsense"])
def test_unreachable_address_is_in_the_error(address):
    with pytest.raises(ServerUnreachable) as error:
        VllmScorer(address).served_model()
    assert address in str(error.value)
