"""Test the prior of every prefix against its definition, and debiased searches against scoring every identifier."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_index_genret.errors import SearchError
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import Hit, Normalise, SearchOptions
from llama_index_genret.search._reference import rank_all
from llama_index_genret.trie import LeafFilter, LiveTrie, TriePrior, add_identifiers, build_trie, remove_identifiers
from llama_index_genret.trie._reference import prior_below
from tests.search.test_beam_search import PROMPT, VOCABULARY, identifier_sets

ETAS = st.sampled_from([0.1, 0.5, 1.0, 1.5])


@st.composite
def edited_tries(draw):
    """Draw (live trie, {identifier: log prior, None if unknown}, the priors in leaf order)."""
    identifiers = draw(identifier_sets())
    base, order = build_trie(identifiers)
    live = LiveTrie(base, keys=order)
    more = [(20 + i, *draw(st.lists(st.integers(0, 3), max_size=2))) for i in range(draw(st.integers(0, 3)))]
    more += [(*identifier[:-1], 15 + i) for i, identifier in enumerate(identifiers[: draw(st.integers(0, 4))])]
    if more := list(dict.fromkeys(more)):
        live = add_identifiers(live, more, range(len(identifiers), len(identifiers) + len(more)))
    everything = [*identifiers, *more]
    if len(identifiers) > 1 and draw(st.booleans()):
        removed = draw(st.lists(st.sampled_from(identifiers), max_size=len(identifiers) - 1, unique=True))
        live = remove_identifiers(live, removed) if removed else live
        kept = [identifier for identifier in everything if identifier not in removed]
    else:
        kept = everything
    value = st.floats(-300, 0, width=32) if draw(st.booleans()) else st.floats(-4, 0, width=32)
    drawn = draw(st.lists(value, min_size=len(everything), max_size=len(everything)))
    unknown = draw(st.sets(st.sampled_from(everything)))
    priors = {identifier: None if identifier in unknown else p for identifier, p in zip(everything, drawn, strict=True)}
    if all(priors[identifier] is None for identifier in kept):
        priors[kept[0]] = drawn[0]
    by_key = np.array(
        [np.nan if priors[identifier] is None else priors[identifier] for identifier in everything], np.float32
    )
    return live, {identifier: priors[identifier] for identifier in kept}, by_key[live.key(np.arange(live.n_leaves))]


@settings(max_examples=3 * settings.default.max_examples)
@given(edited_tries())
def test_prior_of_every_prefix_equals_its_definition(edited):
    """Priors reach e^-300. Removed images are left out, unknown ones get the least of their relatives."""
    live, priors, leaves = edited
    prior = TriePrior.of_leaves(live, leaves)
    open_nodes = [(live.roots(1), ())]
    while open_nodes:
        nodes, prefix = open_nodes.pop()
        np.testing.assert_allclose(prior.of(nodes)[0], prior_below(priors, prefix), rtol=1e-6, atol=1e-6)
        if not live.is_leaf(nodes)[0]:
            expansion = live.expand(nodes)
            for entry, token in enumerate(expansion.token_ids.tolist()):
                open_nodes.append((expansion.take(np.array([entry])), (*prefix, token)))


def expected_scores(scorer, priors, eta, normalise):
    def logits(prefix):
        return scorer.logits(PROMPT, prefix).tolist()

    over_children = normalise is Normalise.CHILDREN
    return rank_all(list(priors), logits, over_children=over_children, log_priors=priors, eta=eta)


def assert_ranked(hits, expected):
    """Compare by score. Of two scores that differ by rounding, either may come first."""
    scores = dict(map(reversed, expected))
    np.testing.assert_allclose([h.ranked_by for h in hits], [score for score, _ in expected[: len(hits)]], atol=1e-4)
    np.testing.assert_allclose([h.ranked_by for h in hits], [scores[h.token_ids] for h in hits], atol=1e-4)
    assert len({h.token_ids for h in hits}) == len(hits)


LIMITED = [{"mode": "beam"}, *({"mode": "exact", "max_expansions": most} for most in (1, 2, 100))]


def search_with_prior(live, leaves, scorer, **options):
    prior = TriePrior.of_leaves(live, leaves)
    return recall(scorer, live, [PROMPT], SearchOptions(prior=prior, **options))[0]


@settings(max_examples=3 * settings.default.max_examples)
@given(edited_tries(), st.integers(0, 2**32 - 1), st.integers(1, 6), ETAS, st.sampled_from(Normalise), st.data())
def test_exact_search_with_a_prior_equals_brute_force(edited, seed, k, eta, normalise, data):
    """The least prior below a prefix bounds its identifiers, independent of the sums."""
    width = data.draw(st.integers(1, 4))
    (live, priors, leaves), scorer = edited, FakeScorer(40, seed=seed, spread=seed % 5)
    ranking = search_with_prior(live, leaves, scorer, k=k, width=width, mode="exact", normalise=normalise, eta=eta)
    assert ranking.exact
    assert len(ranking.hits) == min(k, len(priors))
    assert_ranked(ranking.hits, expected_scores(scorer, priors, eta, normalise))


@settings(max_examples=3 * settings.default.max_examples)
@given(edited_tries(), st.integers(0, 2**32 - 1), st.integers(1, 4), ETAS, st.data())
def test_exact_flag_with_a_prior_is_never_wrong(edited, seed, k, eta, data):
    (live, priors, leaves), scorer = edited, FakeScorer(40, seed=seed, spread=3.0)
    mode, width = data.draw(st.sampled_from(LIMITED)), data.draw(st.integers(1, 3))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=live.n_leaves, max_size=live.n_leaves)))
    allowed = data.draw(st.sampled_from([None, LeafFilter.from_mask(mask)]))
    ranking = search_with_prior(live, leaves, scorer, k=k, width=width, eta=eta, leaf_filter=allowed, **mode)
    everything = expected_scores(scorer, priors, eta, Normalise.CHILDREN)
    if allowed is not None:
        live_leaves = [leaf for leaf in range(live.n_leaves) if live.live is None or live.live.contains(np.array(leaf))]
        paths = {path_of(live, leaf) for leaf in live_leaves if mask[leaf]}
        everything = [row for row in everything if row[1] in paths]
    assert len(ranking.hits) == min(k, len(everything))
    scores, hits = dict(map(reversed, everything)), ranking.hits
    np.testing.assert_allclose([h.ranked_by for h in hits], [scores[h.token_ids] for h in hits], atol=1e-4)
    if ranking.exact:
        assert_ranked(ranking.hits, everything)


def path_of(live, leaf):
    n_base = live.base.n_leaves
    return live.base.token_ids_of(leaf) if leaf < n_base else live.added.token_ids_of(leaf - n_base)


@given(edited_tries(), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_prior_with_eta_0_changes_nothing(edited, seed, k):
    (live, _, leaves), scorer = edited, FakeScorer(40, seed=seed)
    plain = recall(scorer, live, [PROMPT], SearchOptions(k=k, width=2))
    assert [search_with_prior(live, leaves, scorer, k=k, width=2, eta=0.0)] == plain


def test_rare_image_outranks_one_that_is_always_likely():
    """p(id | query) alone would reverse the ranking; `log_prob` still reports it."""
    trie, _ = build_trie([(0,), (1,)])
    scorer = FakeScorer(VOCABULARY, spread=0.0, table={(PROMPT.token_ids, ()): {0: np.log(0.6), 1: np.log(0.4)}})
    prior = TriePrior.of_leaves(LiveTrie(trie), np.log(np.float32([0.9, 0.1])))
    (ranking,) = recall(scorer, trie, [PROMPT], SearchOptions(k=2, prior=prior, eta=1.0))
    assert [hit.token_ids for hit in ranking.hits] == [(1,), (0,)]
    np.testing.assert_allclose([hit.log_prob for hit in ranking.hits], np.log([0.4, 0.6]))
    np.testing.assert_allclose([hit.score for hit in ranking.hits], [0.4 / (0.4 + 0.1), 0.6 / (0.6 + 0.9)], rtol=1e-6)


def flat(identifiers, priors):
    """Return (a scorer with equal probabilities at every step, trie, its prior)."""
    trie, order = build_trie(identifiers)
    return (
        FakeScorer(VOCABULARY, spread=0.0),
        trie,
        TriePrior.of_leaves(LiveTrie(trie), np.log(np.float32(priors))[order]),
    )


@pytest.mark.parametrize("mode", LIMITED[:2])
def test_beam_that_drops_a_rare_image_is_not_exact(mode):
    """(2, 4) has the best score, but its prefix is last of three by its own score."""
    scorer, trie, prior = flat([(0,), (1,), (2, 3), (2, 4)], [0.2, 0.25, 0.549, 0.001])
    (beam,) = recall(scorer, trie, [PROMPT], SearchOptions(k=1, width=1, prior=prior, eta=1.0, **mode))
    (exact,) = recall(scorer, trie, [PROMPT], SearchOptions(k=1, width=1, mode="exact", prior=prior, eta=1.0))
    assert (beam.hits[0].token_ids, beam.exact) == ((0,), False)
    assert (exact.hits[0].token_ids, exact.exact) == ((2, 4), True)


def test_exact_search_expands_the_best_bound_first():
    """The prefix (0,) has the better score, (2,) the rare image. Once it is found, (0,) cannot win."""
    scorer, trie, prior = flat([(0, 1), (0, 2), (2, 3), (2, 4)], [0.2, 0.2, 0.599, 0.001])
    (exact,) = recall(scorer, trie, [PROMPT], SearchOptions(k=1, width=1, mode="exact", prior=prior, eta=1.0))
    assert (exact.hits[0].token_ids, exact.nodes_expanded) == ((2, 4), 2)


@pytest.mark.parametrize("ranked_by", [-np.inf, -1e6, -800.0, -1.0, 0.0, 1.0, 30.0, 1e6])
def test_score_is_above_0_and_at_most_1(ranked_by):
    assert 0.0 < Hit(0, 0, (1,), -1.0, ranked_by).score <= 1.0


@pytest.mark.parametrize("eta", [-0.1, np.nan, np.inf])
def test_invalid_eta_is_an_error(eta):
    with pytest.raises(SearchError, match="eta="):
        recall(FakeScorer(VOCABULARY), build_trie([(0,)])[0], [PROMPT], SearchOptions(k=1, eta=eta))


def test_eta_without_a_prior_names_the_command():
    with pytest.raises(SearchError, match="genret tune"):
        recall(FakeScorer(VOCABULARY), build_trie([(0,)])[0], [PROMPT], SearchOptions(k=1, eta=1.0))


def test_prior_without_known_images_is_none():
    assert TriePrior.of_leaves(LiveTrie(build_trie([(0,), (1,)])[0]), np.full(2, np.nan, np.float32)) is None
