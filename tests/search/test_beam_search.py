"""Test beam and exact search against the definition: score every identifier, then sort."""

import asyncio
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_index_genret.errors import FilterError, SearchError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import arecall, recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import Hit, Normalise, SearchOptions, search
from llama_index_genret.search._reference import rank_all
from llama_index_genret.trie import LeafFilter, build_trie

VOCABULARY = 12
PROMPT = Prompt((1, 2, 3))


@st.composite
def identifier_sets(draw):
    """Draw prefix-free sets of identifiers, with one length or several."""
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


def search_one(*arguments, **options):
    """Return the hits of one query."""
    (ranking,) = recall(*arguments, SearchOptions(**options))
    return ranking.hits


MODES = [{"mode": "beam"}, *({"mode": "exact", "max_expansions": most} for most in (1, 3, 100, None))]


def assert_same(hits, expected):
    assert [hit.token_ids for hit in hits] == [identifier for _, identifier in expected]
    np.testing.assert_allclose([hit.log_prob for hit in hits], [log_prob for log_prob, _ in expected], atol=1e-9)


@settings(max_examples=2 * settings.default.max_examples)
@given(identifier_sets(), st.integers(0, 2**32 - 1), st.sampled_from(Normalise))
def test_full_width_beam_equals_brute_force(identifiers, seed, normalise):
    """A full-width beam prunes nothing, so it must equal the definition."""
    scorer, n = FakeScorer(VOCABULARY, seed=seed), len(identifiers)
    hits = search_one(scorer, build_trie(identifiers)[0], [PROMPT], k=n, width=n, normalise=normalise)
    assert_same(hits, expected_hits(scorer, identifiers, PROMPT, normalise))


@given(identifier_sets(), st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from(Normalise))
def test_batched_queries_equal_single_queries(identifiers, seed, k, normalise):
    scorer, (trie, _) = FakeScorer(VOCABULARY, seed=seed), build_trie(identifiers)
    prompts = [Prompt((7,)), Prompt((8, 8)), Prompt((9,))]
    together = recall(scorer, trie, prompts, SearchOptions(k=k, width=3, normalise=normalise))
    alone = [recall(scorer, trie, [prompt], SearchOptions(k=k, width=3, normalise=normalise))[0] for prompt in prompts]
    assert together == alone


@given(identifier_sets(), st.integers(0, 2**32 - 1), st.integers(1, 8), st.data())
def test_filtered_search_returns_min_k_m_hits_with_same_scores(identifiers, seed, k, data):
    """The search applies the filter at each step: a forbidden leaf never displaces an allowed one."""
    trie, order = build_trie(identifiers)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(order), max_size=len(order))))
    scorer = FakeScorer(VOCABULARY, seed=seed)
    hits = search_one(scorer, trie, [PROMPT], k=k, width=1, leaf_filter=LeafFilter.from_mask(mask))
    assert len({hit.leaf for hit in hits}) == len(hits) == min(k, int(mask.sum()))
    assert all(mask[hit.leaf] for hit in hits)
    scores = {
        identifier: log_prob for log_prob, identifier in expected_hits(scorer, identifiers, PROMPT, Normalise.CHILDREN)
    }
    np.testing.assert_allclose([h.log_prob for h in hits], [scores[h.token_ids] for h in hits], atol=1e-9)


@given(identifier_sets(), st.integers(0, 2**32 - 1), st.sampled_from(Normalise))
def test_async_driver_equals_sync_driver(identifiers, seed, normalise):
    scorer, (trie, _) = FakeScorer(VOCABULARY, seed=seed), build_trie(identifiers)
    prompts = [PROMPT, Prompt((4,))]
    expected = recall(scorer, trie, prompts, SearchOptions(k=3, normalise=normalise))
    assert asyncio.run(arecall(scorer, trie, prompts, SearchOptions(k=3, normalise=normalise))) == expected


@given(identifier_sets(), st.integers(0, 2**32 - 1))
def test_children_probabilities_sum_to_one_over_images(identifiers, seed):
    n = len(identifiers)
    hits = search_one(FakeScorer(VOCABULARY, seed=seed), build_trie(identifiers)[0], [PROMPT], k=n, width=n)
    assert sum(hit.score for hit in hits) == pytest.approx(1.0)


@settings(max_examples=10 * settings.default.max_examples)
@given(identifier_sets(), st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4), st.sampled_from(Normalise))
def test_exact_search_equals_scoring_every_identifier(identifiers, seed, k, width, normalise):
    """Random tries and models, from flat to peaked distributions."""
    scorer, trie = FakeScorer(VOCABULARY, seed=seed, spread=seed % 7), build_trie(identifiers)[0]
    (ranking,) = recall(scorer, trie, [PROMPT], SearchOptions(k=k, width=width, normalise=normalise, mode="exact"))
    assert_same(ranking.hits, expected_hits(scorer, identifiers, PROMPT, normalise)[:k])
    assert ranking.exact
    assert ranking.nodes_expanded <= len({i[:depth] for i in identifiers for depth in range(len(i))})


@settings(max_examples=3 * settings.default.max_examples)
@given(identifier_sets(), st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4), st.data())
def test_wrong_ranking_is_never_marked_exact(identifiers, seed, k, width, data):
    """This holds for all modes and limits, with and without a filter."""
    scorer, (trie, order) = FakeScorer(VOCABULARY, seed=seed, spread=3.0), build_trie(identifiers)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(order), max_size=len(order))))
    leaf_filter = data.draw(st.sampled_from([None, LeafFilter.from_mask(mask)]))
    mode = data.draw(st.sampled_from(MODES))
    (ranking,) = recall(scorer, trie, [PROMPT], SearchOptions(k=k, width=width, leaf_filter=leaf_filter, **mode))
    kept = {identifiers[row] for row, passes in zip(order, mask, strict=True) if passes or leaf_filter is None}
    expected = [row for row in expected_hits(scorer, identifiers, PROMPT, Normalise.CHILDREN) if row[1] in kept]
    assert len(ranking.hits) == min(k, len(kept))
    if ranking.exact:
        assert_same(ranking.hits, expected[:k])
    assert ranking.exact or mode in MODES[:3]


@pytest.mark.parametrize(
    ("identifiers", "steps", "best", "exact"),
    [
        ([(0, 7), (1, 2), (1, 3)], [[-2.0, -1.0], [-1.0, -3.0]], (1, 2), False),  # (0, 7) may tie and sorts first
        ([(1, 2), (1, 3), (4, 7)], [[-1.0, -2.0], [-1.0, -3.0]], (1, 2), True),  # (4, 7) may tie but sorts later
        ([(1, 0, 7), (1, 2, 7), (3, 3, 3)], [[-1.0, -2.0], [-1.0, -0.5], [-0.5]], (1, 2, 7), False),
        ([(1, 2, 7), (1, 4, 7), (3, 3, 3)], [[-1.0, -2.0], [-0.5, -1.0], [-0.5]], (1, 2, 7), True),
    ],
)
def test_tied_beam_is_exact_only_if_dropped_prefix_comes_later(identifiers, steps, best, exact):
    searching = search(
        build_trie(identifiers)[0], SearchOptions(k=1, width=1, normalise=Normalise.VOCABULARY), n_queries=1
    )
    next(searching)
    for scores in steps[:-1]:
        searching.send(np.array(scores))
    with pytest.raises(StopIteration) as stop:
        searching.send(np.array(steps[-1]))
    (ranking,) = stop.value.value
    assert (ranking.hits[0].token_ids, ranking.exact) == (best, exact)


def test_beam_that_misses_best_image_is_not_exact():
    """The best image has the less probable first token. A beam of one drops it, exact search finds it."""
    table = {((1, 2, 3), ()): {0: 1.0, 1: 0.9}, ((1, 2, 3), (0,)): {2: 0.0, 3: 0.0, 4: 0.0}, ((1, 2, 3), (1,)): {2: 9}}
    scorer, trie = (
        FakeScorer(VOCABULARY, spread=0.0, table=table),
        build_trie([(0, 2), (0, 3), (0, 4), (1, 2), (1, 3)])[0],
    )
    (beam,) = recall(scorer, trie, [PROMPT], SearchOptions(k=1, width=1))
    (exact,) = recall(scorer, trie, [PROMPT], SearchOptions(k=1, width=1, mode="exact"))
    assert (beam.hits[0].token_ids, beam.exact, beam.nodes_expanded) == ((0, 2), False, 2)
    assert (exact.hits[0].token_ids, exact.exact, exact.nodes_expanded) == ((1, 2), True, 3)


def test_prefix_that_can_only_tie_later_is_not_expanded():
    flat, trie = FakeScorer(VOCABULARY, spread=0.0), build_trie([(0,), (1, 2), (1, 3)])[0]
    (ranking,) = recall(flat, trie, [PROMPT], SearchOptions(k=1, mode="exact"))
    assert (ranking.hits[0].token_ids, ranking.exact, ranking.nodes_expanded) == ((0,), True, 1)


def test_one_symbol_identifiers_are_ranked_exactly_in_one_step():
    scorer, trie = FakeScorer(5000), build_trie(np.arange(5000)[:, None])[0]
    (ranking,) = recall(scorer, trie, [PROMPT], SearchOptions(k=7))
    logits = scorer.logits(PROMPT, ())
    assert [hit.leaf for hit in ranking.hits] == np.argsort(-logits)[:7].tolist()
    assert (ranking.exact, ranking.nodes_expanded) == (True, 1)


class SinglePrecision(FakeScorer):
    """Return the same scores as float32, like a model."""

    @contextmanager
    def session(self, prompts, normalise):
        with super().session(prompts, normalise) as session:
            yield SimpleNamespace(score=lambda rows: session.score(rows).astype(np.float32))


@given(identifier_sets(), st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from(["beam", "exact"]))
def test_float32_scores_rank_like_float64_scores(identifiers, seed, k, mode):
    trie = build_trie(identifiers)[0]
    double, single = (
        search_one(kind(VOCABULARY, seed=seed), trie, [PROMPT], k=k, mode=mode)
        for kind in (FakeScorer, SinglePrecision)
    )
    assert [hit.leaf for hit in single] == [hit.leaf for hit in double]
    np.testing.assert_allclose([h.log_prob for h in single], [h.log_prob for h in double], atol=1e-5)


def test_impossible_children_are_ranked_last():
    """The search returns k images even if some have probability zero."""
    trie, _ = build_trie([(0, 1), (0, 2), (3, 4), (3, 5)])
    steps = search(trie, SearchOptions(k=4), n_queries=1)
    next(steps)
    steps.send(np.array([0.0, -np.inf]))
    with pytest.raises(StopIteration) as stop:
        steps.send(np.array([0.0, 1.0, -np.inf, -np.inf]))
    hits = stop.value.value[0].hits
    assert [hit.token_ids for hit in hits] == [(0, 2), (0, 1), (3, 4), (3, 5)]
    assert [hit.log_prob for hit in hits[2:]] == [-np.inf] * 2


def test_filter_without_matches_gives_exact_empty_ranking():
    trie, _ = build_trie([(0, 1), (0, 2)])
    (ranking,) = recall(
        FakeScorer(VOCABULARY), trie, [PROMPT], SearchOptions(k=1, leaf_filter=LeafFilter.from_mask(np.zeros(2, bool)))
    )
    assert (ranking.hits, ranking.exact) == ((), True)


def test_ties_are_ordered_by_token_ids():
    identifiers = [(2, 1), (0, 5), (2, 0), (1, 1)]
    flat = FakeScorer(VOCABULARY, spread=0.0)
    hits = search_one(flat, build_trie(identifiers)[0], [PROMPT], k=4, normalise=Normalise.VOCABULARY)
    assert [hit.token_ids for hit in hits] == [(0, 5), (1, 1), (2, 0), (2, 1)]


def test_step_with_one_choice_is_not_scored_under_children():
    trie, _ = build_trie([(0, 1, 2, 3), (4, 5, 6, 7)])
    steps = search(trie, SearchOptions(k=2), n_queries=1)
    rows = next(steps)
    assert [row.prefix for row in rows] == [()]
    with pytest.raises(StopIteration) as stop:
        steps.send(np.array([0.0, 0.0]))
    assert [hit.token_ids for hit in stop.value.value[0].hits] == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_search_stops_when_no_unfinished_prefix_can_win():
    """One short identifier is nearly certain, so the search does not expand the long ones."""
    trie, _ = build_trie([(0,), (1, 0, 0), (1, 0, 1), (1, 1, 0)])
    steps = search(trie, SearchOptions(k=1, normalise=Normalise.VOCABULARY), n_queries=1)
    next(steps)
    with pytest.raises(StopIteration):
        steps.send(np.log(np.array([0.9, 0.05])))


def test_underflowing_probability_gives_score_above_zero():
    assert Hit(0, 0, (1,), -1e6).score > 0.0
    assert Hit(0, 0, (1,), 0.0).score == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_or_infinite_score_is_rejected(bad):
    trie, _ = build_trie([(0,), (1,)])
    steps = search(trie, SearchOptions(k=1), n_queries=1)
    next(steps)
    with pytest.raises(SearchError, match="NaN"):
        steps.send(np.array([0.0, bad]))


def test_too_few_scores_are_rejected():
    trie, _ = build_trie([(0,), (1,)])
    steps = search(trie, SearchOptions(k=1), n_queries=1)
    next(steps)
    with pytest.raises(SearchError, match="scores"):
        steps.send(np.array([0.0]))


@pytest.mark.parametrize(("k", "width"), [(0, 1), (1, 0)])
def test_sizes_below_one_are_rejected(k, width):
    with pytest.raises(SearchError, match="at least 1"):
        SearchOptions(k=k, width=width)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "Exact"}, "unknown mode 'Exact'; choose from: beam, exact"),
        ({"mode": "exact", "max_expansions": 0}, "max_expansions=0 must be at least 1"),
        ({"max_expansions": 5}, "max_expansions=5 is for mode='exact'"),
    ],
)
def test_invalid_mode_or_limit_is_rejected(options, message):
    with pytest.raises(SearchError, match=message):
        SearchOptions(k=1, **options)


def test_small_max_expansions_equal_a_beam():
    flat = FakeScorer(VOCABULARY, spread=0.0)
    trie, _ = build_trie([(row, other) for row in range(4) for other in range(4)])
    modes = (MODES[0], MODES[1], MODES[4])
    beam, limited, exact = (recall(flat, trie, [PROMPT], SearchOptions(k=1, width=1, **mode))[0] for mode in modes)
    assert limited == beam
    assert (limited.exact, exact.exact) == (False, True)


def test_filter_of_another_trie_is_rejected():
    with pytest.raises(FilterError, match="3 identifiers, the trie 1"):
        recall(
            FakeScorer(VOCABULARY),
            build_trie([(0,)])[0],
            [PROMPT],
            SearchOptions(k=1, leaf_filter=LeafFilter.from_mask(np.ones(3, bool))),
        )
