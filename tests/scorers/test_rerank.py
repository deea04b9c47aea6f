"""Test re-ranking by log p(query | image): likelihoods against plain forward passes, the order by its definition."""

import asyncio

import numpy as np
import pytest
import torch

from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import QueryError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import arecall, recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.scorers.rerank import Continuation, Rerank, rescore
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import Hit, Normalise, SearchOptions
from llama_index_genret.trie import build_trie

pytestmark = pytest.mark.torch

IDENTIFIERS = [(a, b) for a in range(4) for b in range(5, 9)]
QUERIES = [Prompt((1, 2), words=(30, 31)), Prompt((3,), words=(32,))]


def describe(hit):
    return Prompt((90, *hit.token_ids))


@pytest.fixture(scope="module")
def scorer(tiny_mllm):
    return TransformersScorer(tiny_mllm)


def plain_log_likelihood(mllm, one):
    """Score one continuation alone with one forward pass without a cache."""
    prompt, n = one.prompt, len(one.token_ids)
    if prompt.image is None:
        inputs = {"input_ids": torch.tensor([[*prompt.token_ids, *one.token_ids]])}
    else:
        inputs = mllm.process([prompt.text], [load_image(prompt.image)], [(*prompt.rest, *one.token_ids)])
    with torch.no_grad():
        log_probs = mllm.model(**inputs).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[-n - 1 + place, token]) for place, token in enumerate(one.token_ids))


def test_batched_log_likelihoods_equal_plain_forward_passes(scorer, tiny_mllm):
    """Prompts and targets have random lengths, and there are more than fit into one batch."""
    rng = np.random.default_rng(0)
    drawn = [[tuple(rng.integers(40, 300, rng.integers(1, 9)).tolist()) for _ in range(2)] for _ in range(21)]
    continuations = [Continuation(Prompt(prompt), target) for prompt, target in drawn]
    with scorer.session([], Normalise.CHILDREN) as session:
        likelihoods = session.log_likelihoods(continuations)
    np.testing.assert_allclose(likelihoods, [plain_log_likelihood(tiny_mllm, one) for one in continuations], atol=2e-3)
    assert np.ptp(likelihoods) > 1.0


def test_log_likelihoods_after_image_prompts_equal_plain_passes(scorer, tiny_mllm, untrained_index):
    index = untrained_index
    words = [tuple(index.tokenizer.encode_text(text)) for text in ("red circle", "a bus")]
    prompts = [index.prompts.for_caption(index.tokenizer, record.path) for record in index.records[:3]]
    continuations = [Continuation(prompt, target) for prompt in prompts for target in words]
    continuations.insert(3, Continuation(Prompt((90, 91)), words[0]))  # images and texts in any order
    with scorer.session([], Normalise.CHILDREN) as session:
        likelihoods = session.log_likelihoods(continuations)
    np.testing.assert_allclose(likelihoods, [plain_log_likelihood(tiny_mllm, one) for one in continuations], atol=2e-3)
    assert len(set(likelihoods[[0, 2, 5]].round(4))) == 3


def test_reranking_equals_the_definition_over_all_images():
    """If all images are candidates, the ranking must equal the definition over all images."""
    scorer, trie = FakeScorer(100, seed=3), build_trie(IDENTIFIERS)[0]
    rerank = Rerank(len(IDENTIFIERS), 0.7, describe)
    rankings = recall(scorer, trie, QUERIES, SearchOptions(k=5), rerank=rerank)
    assert asyncio.run(arecall(scorer, trie, QUERIES, SearchOptions(k=5), rerank=rerank)) == rankings
    for prompt, ranking in zip(QUERIES, rankings, strict=True):
        (everything,) = recall(scorer, trie, [prompt], SearchOptions(k=len(IDENTIFIERS)))
        with scorer.session([], Normalise.CHILDREN) as session:
            continuations = [Continuation(describe(hit), prompt.words) for hit in everything.hits]
            likelihoods = session.log_likelihoods(continuations)
        combined = np.array([hit.log_prob for hit in everything.hits]) + 0.7 * likelihoods
        expected = [everything.hits[row].leaf for row in np.argsort(-combined)[:5]]
        assert [hit.leaf for hit in ranking.hits] == expected
        assert expected != [hit.leaf for hit in everything.hits[:5]]
        centre = 0.7 * np.log(np.exp(likelihoods).mean())
        np.testing.assert_allclose([h.ranked_by for h in ranking.hits], np.sort(combined)[::-1][:5] - centre)
        assert {hit.log_prob for hit in ranking.hits} <= {hit.log_prob for hit in everything.hits}
        assert [h.score for h in ranking.hits] == sorted((h.score for h in ranking.hits), reverse=True)


def test_only_candidates_are_reranked_and_at_least_k():
    scorer, trie = FakeScorer(100, seed=3), build_trie(IDENTIFIERS)[0]
    for candidates, reranked in ((3, 4), (6, 6)):
        leaves = []
        rerank = Rerank(candidates, 1.0, lambda hit, leaves=leaves: leaves.append(hit.leaf) or describe(hit))
        (ranking,) = recall(scorer, trie, QUERIES[:1], SearchOptions(k=4), rerank=rerank)
        (plain,) = recall(scorer, trie, QUERIES[:1], SearchOptions(k=reranked))
        assert sorted(leaves) == sorted(hit.leaf for hit in plain.hits)
        assert len(ranking.hits) == 4


def test_hits_with_equal_values_keep_the_search_order():
    hits = [Hit(leaf, leaf, (leaf,), -1.0) for leaf in (7, 3, 5)]
    assert [hit.leaf for hit in rescore(hits, np.zeros(3), 1.0)] == [7, 3, 5]
    assert [hit.leaf for hit in rescore(hits, np.full(3, -np.inf), 1.0)] == [7, 3, 5]


def test_query_without_words_is_rejected():
    with pytest.raises(QueryError, match="text queries"):
        recall(
            FakeScorer(100),
            build_trie(IDENTIFIERS)[0],
            [Prompt((1,))],
            SearchOptions(k=1),
            rerank=Rerank(3, 1.0, describe),
        )


def test_empty_ranking_stays_empty():
    from llama_index_genret.trie import LeafFilter

    nothing = LeafFilter.from_mask(np.zeros(len(IDENTIFIERS), bool))
    trie = build_trie(IDENTIFIERS)[0]
    (ranking,) = recall(
        FakeScorer(100), trie, QUERIES[:1], SearchOptions(k=1, leaf_filter=nothing), rerank=Rerank(3, 1.0, describe)
    )
    assert ranking.hits == ()
