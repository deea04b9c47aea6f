"""Ranking hits anew by log p(query | image): the likelihoods against plain forward passes, the order by hand."""

import asyncio

import numpy as np
import pytest
import torch

from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import QueryError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import arecall, recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.scorers.rerank import Continuation, Rerank, rescored
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
    """By one forward pass of the one text, token by token."""
    prompt, n = one.prompt, len(one.token_ids)
    if prompt.image is None:
        inputs = {"input_ids": torch.tensor([[*prompt.token_ids, *one.token_ids]])}
    else:
        inputs = mllm.process([prompt.text], [load_image(prompt.image)], [(*prompt.rest, *one.token_ids)])
    with torch.no_grad():
        log_probs = mllm.model(**inputs).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[-n - 1 + place, token]) for place, token in enumerate(one.token_ids))


def test_log_likelihoods_equal_plain_forward_passes_whatever_shares_the_batch(scorer, tiny_mllm):
    """Prompts and targets of all lengths, more than fit into one batch."""
    rng = np.random.default_rng(0)
    drawn = [[tuple(rng.integers(40, 300, rng.integers(1, 9)).tolist()) for _ in range(2)] for _ in range(21)]
    asked = [Continuation(Prompt(prompt), target) for prompt, target in drawn]
    with scorer.session([], Normalise.CHILDREN) as session:
        found = session.log_likelihoods(asked)
    np.testing.assert_allclose(found, [plain_log_likelihood(tiny_mllm, one) for one in asked], atol=2e-3)
    assert np.ptp(found) > 1.0


def test_a_query_is_scored_after_the_picture_itself(scorer, tiny_mllm, untrained_index):
    index = untrained_index
    words = [tuple(index.tokenizer.encode_text(text)) for text in ("red circle", "a bus")]
    pictures = [index.prompts.for_caption(index.tokenizer, record.path) for record in index.records[:3]]
    asked = [Continuation(picture, target) for picture in pictures for target in words]
    asked.insert(3, Continuation(Prompt((90, 91)), words[0]))  # pictures and texts in any order
    with scorer.session([], Normalise.CHILDREN) as session:
        found = session.log_likelihoods(asked)
    np.testing.assert_allclose(found, [plain_log_likelihood(tiny_mllm, one) for one in asked], atol=2e-3)
    assert len(set(found[[0, 2, 5]].round(4))) == 3


def test_candidates_are_ranked_by_the_search_and_by_how_probable_they_make_the_query():
    """Against the definition, over all images: none is lost where all are candidates."""
    scorer, trie = FakeScorer(100, seed=3), build_trie(IDENTIFIERS)[0]
    rerank = Rerank(len(IDENTIFIERS), 0.7, describe)
    rankings = recall(scorer, trie, QUERIES, SearchOptions(k=5), rerank=rerank)
    assert asyncio.run(arecall(scorer, trie, QUERIES, SearchOptions(k=5), rerank=rerank)) == rankings
    for prompt, ranking in zip(QUERIES, rankings, strict=True):
        (everything,) = recall(scorer, trie, [prompt], SearchOptions(k=len(IDENTIFIERS)))
        with scorer.session([], Normalise.CHILDREN) as session:
            asked = [Continuation(describe(hit), prompt.words) for hit in everything.hits]
            likelihoods = session.log_likelihoods(asked)
        combined = np.array([hit.log_prob for hit in everything.hits]) + 0.7 * likelihoods
        expected = [everything.hits[row].leaf for row in np.argsort(-combined)[:5]]
        assert [hit.leaf for hit in ranking.hits] == expected
        assert expected != [hit.leaf for hit in everything.hits[:5]]
        centre = 0.7 * np.log(np.exp(likelihoods).mean())
        np.testing.assert_allclose([h.ranked_by for h in ranking.hits], np.sort(combined)[::-1][:5] - centre)
        assert {hit.log_prob for hit in ranking.hits} <= {hit.log_prob for hit in everything.hits}
        assert [h.score for h in ranking.hits] == sorted((h.score for h in ranking.hits), reverse=True)


def test_only_the_candidates_are_looked_at_and_never_fewer_than_are_wanted():
    scorer, trie = FakeScorer(100, seed=3), build_trie(IDENTIFIERS)[0]
    for candidates, looked_at in ((3, 4), (6, 6)):
        seen = []
        rerank = Rerank(candidates, 1.0, lambda hit, seen=seen: seen.append(hit.leaf) or describe(hit))
        (ranking,) = recall(scorer, trie, QUERIES[:1], SearchOptions(k=4), rerank=rerank)
        (plain,) = recall(scorer, trie, QUERIES[:1], SearchOptions(k=looked_at))
        assert sorted(seen) == sorted(hit.leaf for hit in plain.hits)
        assert len(ranking.hits) == 4


def test_equal_ones_stay_in_the_order_of_the_search():
    hits = [Hit(leaf, leaf, (leaf,), -1.0) for leaf in (7, 3, 5)]
    assert [hit.leaf for hit in rescored(hits, np.zeros(3), 1.0)] == [7, 3, 5]
    assert [hit.leaf for hit in rescored(hits, np.full(3, -np.inf), 1.0)] == [7, 3, 5]


def test_a_query_without_words_cannot_be_ranked_anew():
    with pytest.raises(QueryError, match="text queries"):
        recall(
            FakeScorer(100),
            build_trie(IDENTIFIERS)[0],
            [Prompt((1,))],
            SearchOptions(k=1),
            rerank=Rerank(3, 1.0, describe),
        )


def test_a_search_that_finds_nothing_is_not_ranked_anew():
    from llama_index_genret.trie import LeafFilter

    nothing = LeafFilter.from_mask(np.zeros(len(IDENTIFIERS), bool))
    trie = build_trie(IDENTIFIERS)[0]
    (ranking,) = recall(
        FakeScorer(100), trie, QUERIES[:1], SearchOptions(k=1, leaf_filter=nothing), rerank=Rerank(3, 1.0, describe)
    )
    assert ranking.hits == ()
