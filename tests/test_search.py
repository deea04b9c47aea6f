"""Beam search against its definition: sum every path, then sort."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_index_genret._reference import rank_all
from llama_index_genret.errors import FilterError, SearchError
from llama_index_genret.prompts import Prompt
from llama_index_genret.scorers.base import arecall, recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import Hit, Normalise, search
from llama_index_genret.trie import LeafFilter, build_trie

VOCABULARY = 12
PROMPT = Prompt((1, 2, 3))


@st.composite
def identifier_sets(draw):
    """Prefix-free sets: of one length, or of many."""
    drawn = draw(st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4), min_size=1, max_size=25))
    kept = []
    for identifier in sorted(set(map(tuple, drawn)), key=len):
        if not any(identifier[: len(other)] == other for other in kept):
            kept.append(identifier)
    return kept


def expected_hits(scorer, identifiers, prompt, normalise):
    def logits(prefix):
        return scorer.logits(prompt, prefix).tolist()

    return rank_all(identifiers, logits, over_children=normalise is Normalise.CHILDREN)


def hits_of(*arguments, **options):
    """Of one query."""
    (ranking,) = recall(*arguments, **options)
    return ranking.hits


def assert_same(hits, expected):
    assert [hit.token_ids for hit in hits] == [identifier for _, identifier in expected]
    np.testing.assert_allclose([hit.log_prob for hit in hits], [log_prob for log_prob, _ in expected], atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(identifier_sets(), st.integers(0, 2**32 - 1), st.sampled_from(Normalise))
def test_a_beam_as_wide_as_the_corpus_ranks_like_brute_force(identifiers, seed, normalise):
    """Nothing can be pruned, so search must equal the definition."""
    scorer, n = FakeScorer(VOCABULARY, seed=seed), len(identifiers)
    hits = hits_of(scorer, build_trie(identifiers)[0], [PROMPT], k=n, width=n, normalise=normalise)
    assert_same(hits, expected_hits(scorer, identifiers, PROMPT, normalise))


@settings(max_examples=60, deadline=None)
@given(identifier_sets(), st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from(Normalise))
def test_queries_in_one_batch_get_what_each_gets_alone(identifiers, seed, k, normalise):
    scorer, (trie, _) = FakeScorer(VOCABULARY, seed=seed), build_trie(identifiers)
    prompts = [Prompt((7,)), Prompt((8, 8)), Prompt((9,))]
    together = recall(scorer, trie, prompts, k=k, width=3, normalise=normalise)
    alone = [recall(scorer, trie, [prompt], k=k, width=3, normalise=normalise)[0] for prompt in prompts]
    assert together == alone


@settings(max_examples=100, deadline=None)
@given(identifier_sets(), st.integers(0, 2**32 - 1), st.integers(1, 8), st.data())
def test_a_filter_that_leaves_m_images_gives_min_k_m_of_them_with_their_own_scores(identifiers, seed, k, data):
    """The filter is a strict part of the search: no hit is lost to one that it forbids."""
    trie, order = build_trie(identifiers)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(order), max_size=len(order))))
    scorer = FakeScorer(VOCABULARY, seed=seed)
    hits = hits_of(scorer, trie, [PROMPT], k=k, width=1, allowed=LeafFilter.from_mask(mask))
    assert len({hit.leaf for hit in hits}) == len(hits) == min(k, int(mask.sum()))
    assert all(mask[hit.leaf] for hit in hits)
    scores = {
        identifier: log_prob for log_prob, identifier in expected_hits(scorer, identifiers, PROMPT, Normalise.CHILDREN)
    }
    np.testing.assert_allclose([h.log_prob for h in hits], [scores[h.token_ids] for h in hits], atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(identifier_sets(), st.integers(0, 2**32 - 1), st.sampled_from(Normalise))
def test_the_async_driver_finds_what_the_sync_one_finds(identifiers, seed, normalise):
    scorer, (trie, _) = FakeScorer(VOCABULARY, seed=seed), build_trie(identifiers)
    prompts = [PROMPT, Prompt((4,))]
    expected = recall(scorer, trie, prompts, k=3, normalise=normalise)
    assert asyncio.run(arecall(scorer, trie, prompts, k=3, normalise=normalise)) == expected


@settings(max_examples=60, deadline=None)
@given(identifier_sets(), st.integers(0, 2**32 - 1))
def test_probabilities_over_the_children_sum_to_one_over_the_images(identifiers, seed):
    n = len(identifiers)
    hits = hits_of(FakeScorer(VOCABULARY, seed=seed), build_trie(identifiers)[0], [PROMPT], k=n, width=n)
    assert sum(hit.score for hit in hits) == pytest.approx(1.0)


def test_ties_come_in_the_order_of_the_token_ids():
    identifiers = [(2, 1), (0, 5), (2, 0), (1, 1)]
    flat = FakeScorer(VOCABULARY, spread=0.0)
    hits = hits_of(flat, build_trie(identifiers)[0], [PROMPT], k=4, normalise=Normalise.VOCABULARY)
    assert [hit.token_ids for hit in hits] == [(0, 5), (1, 1), (2, 0), (2, 1)]


def test_a_step_with_one_choice_is_not_scored_over_the_children():
    trie, _ = build_trie([(0, 1, 2, 3), (4, 5, 6, 7)])
    steps = search(trie, n_queries=1, k=2)
    rows = next(steps)
    assert [row.prefix for row in rows] == [()]
    with pytest.raises(StopIteration) as stop:
        steps.send(np.array([0.0, 0.0]))
    assert [hit.token_ids for hit in stop.value.value[0].hits] == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_the_search_stops_when_no_unfinished_prefix_can_win():
    """One short identifier is nearly certain: the long ones are not followed."""
    trie, _ = build_trie([(0,), (1, 0, 0), (1, 0, 1), (1, 1, 0)])
    steps = search(trie, n_queries=1, k=1, normalise=Normalise.VOCABULARY)
    next(steps)
    with pytest.raises(StopIteration):
        steps.send(np.log(np.array([0.9, 0.05])))


def test_a_probability_too_small_for_a_float_is_still_a_score_above_zero():
    assert Hit(0, 0, (1,), -1e6).score > 0.0
    assert Hit(0, 0, (1,), 0.0).score == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_an_error(bad):
    trie, _ = build_trie([(0,), (1,)])
    steps = search(trie, n_queries=1, k=1)
    next(steps)
    with pytest.raises(SearchError, match="NaN"):
        steps.send(np.array([0.0, bad]))


def test_a_scorer_that_answers_too_few_scores_is_an_error():
    trie, _ = build_trie([(0,), (1,)])
    steps = search(trie, n_queries=1, k=1)
    next(steps)
    with pytest.raises(SearchError, match="scores"):
        steps.send(np.array([0.0]))


@pytest.mark.parametrize(("k", "width"), [(0, 1), (1, 0)])
def test_nonsense_sizes_are_errors(k, width):
    with pytest.raises(SearchError, match="at least 1"):
        recall(FakeScorer(VOCABULARY), build_trie([(0,)])[0], [PROMPT], k=k, width=width)


def test_a_filter_of_another_trie_is_an_error():
    with pytest.raises(FilterError, match="3 identifiers, the trie 1"):
        recall(
            FakeScorer(VOCABULARY), build_trie([(0,)])[0], [PROMPT], k=1, allowed=LeafFilter.from_mask(np.ones(3, bool))
        )
