"""Recall by the encoder alone: the search finds what sorting the cosines finds."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_index_genret.errors import EncoderError, QueryError, SearchError
from llama_index_genret.models.encoder import CallableEncoder, unit
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import arecall, recall
from llama_index_genret.scorers.encoder import EncoderScorer, widen
from llama_index_genret.search import Normalise, Row, Rows, SearchOptions
from llama_index_genret.trie import LeafFilter, LiveTrie, add_identifiers, build_trie, remove_identifiers
from tests.search.test_beam_search import identifier_sets

DIMENSION = 8


def embed(texts):
    """A fixed random vector for each text."""
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=DIMENSION) for text in texts])


ENCODER = CallableEncoder(embed)


def asked(text):
    return Prompt((1,), query=text)


def edited(identifiers):
    """The identifiers as a live trie; of four or more, the last is added later and the first is removed."""
    if len(identifiers) < 4:
        trie, order = build_trie(identifiers)
        return LiveTrie(trie, keys=order), range(len(identifiers))
    trie, order = build_trie(identifiers[:-1])
    live = add_identifiers(LiveTrie(trie, keys=order), identifiers[-1:], [len(identifiers) - 1])
    return remove_identifiers(live, identifiers[:1]), range(1, len(identifiers))


@settings(max_examples=150, deadline=None)
@given(identifier_sets(), st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.05, 0.5]))
def test_exact_search_ranks_as_the_cosines_do(identifiers, seed, temperature):
    """The probability of an image is the softmax over the images that exist, whatever the tree."""
    live, rows = edited(identifiers)
    vectors = unit(np.random.default_rng(seed).normal(size=(len(identifiers), DIMENSION)))
    scorer = EncoderScorer(ENCODER, live, vectors, temperature=temperature)
    rankings = recall(scorer, live, [asked("a fox"), asked("an owl")], SearchOptions(k=len(rows), mode="exact"))
    for ranking, query in zip(rankings, ENCODER.embed_queries(["a fox", "an owl"]), strict=True):
        cosines = (vectors @ query)[list(rows)].astype(np.float64) / temperature
        log_probs = cosines - np.logaddexp.reduce(cosines)
        order = np.argsort(-log_probs, kind="stable")
        assert ranking.exact
        np.testing.assert_allclose([hit.log_prob for hit in ranking.hits], log_probs[order], atol=1e-4)
        np.testing.assert_allclose(
            log_probs[[rows.index(hit.key) for hit in ranking.hits]], log_probs[order], atol=1e-4
        )


@pytest.fixture(scope="module")
def flat():
    """Sixty images with one symbol each."""
    trie, _ = build_trie([(number,) for number in range(60)])
    vectors = unit(np.random.default_rng(0).normal(size=(60, DIMENSION)))
    return LiveTrie(trie), vectors


def test_a_filter_leaves_the_scores_of_others_as_they_are(flat):
    live, vectors = flat
    scorer = EncoderScorer(ENCODER, live, vectors, temperature=0.05)
    (whole,) = recall(scorer, live, [asked("a fox")], SearchOptions(k=60))
    mask = np.arange(60) % 2 == 0
    (half,) = recall(scorer, live, [asked("a fox")], SearchOptions(k=60, leaf_filter=LeafFilter.from_mask(mask)))
    assert [hit for hit in whole.hits if hit.key % 2 == 0] == list(half.hits)


def test_float16_vectors_in_blocks_score_as_float32(flat, monkeypatch):
    live, vectors = flat
    expected = recall(
        EncoderScorer(ENCODER, live, vectors, temperature=0.05), live, [asked("a fox")], SearchOptions(k=60)
    )
    monkeypatch.setattr("llama_index_genret.scorers.encoder.CACHED_BYTES", 0)
    monkeypatch.setattr("llama_index_genret.scorers.encoder.BLOCK_ROWS", 7)
    scorer = EncoderScorer(ENCODER, live, vectors.astype(np.float16), temperature=0.05)
    found = recall(scorer, live, [asked("a fox")], SearchOptions(k=60))
    np.testing.assert_allclose(
        sorted((h.key, h.log_prob) for h in found[0].hits),
        sorted((h.key, h.log_prob) for h in expected[0].hits),
        atol=0.02,
    )


def test_every_finite_half_widens_to_the_same_number():
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)]
    wide = widen(half, np.empty(len(half), np.int32))
    np.testing.assert_array_equal(wide.view(np.int32), half.astype(np.float32).view(np.int32))


def test_an_event_loop_gets_the_same_ranking(flat):
    live, vectors = flat
    scorer = EncoderScorer(ENCODER, live, vectors, temperature=0.05)
    assert asyncio.run(arecall(scorer, live, [asked("a fox")], SearchOptions(k=5))) == recall(
        scorer, live, [asked("a fox")], SearchOptions(k=5)
    )


def test_an_image_query_needs_an_encoder_of_images(flat, pictures):
    live, vectors = flat
    image = sorted(pictures.glob("*.png"))[0]
    with pytest.raises(QueryError, match="embeds texts only"):
        recall(EncoderScorer(ENCODER, live, vectors, temperature=0.05), live, [Prompt((1,), image)], SearchOptions(k=3))
    seen = []

    def embed_images(images):
        seen.extend(images)
        return vectors[:1] * 3

    both = CallableEncoder(embed, embed_images=embed_images)
    (ranking,) = recall(
        EncoderScorer(both, live, vectors, temperature=0.05), live, [Prompt((1,), image)], SearchOptions(k=3)
    )
    assert ranking.hits[0].key == 0
    assert seen[0].mode == "RGB"


def test_another_dimension_names_both(flat):
    live, vectors = flat
    with pytest.raises(EncoderError, match="has 8 dimensions, the index's vectors have 5"):
        EncoderScorer(ENCODER, live, vectors[:, :5], temperature=0.05)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.001, float("nan"), float("inf")])
def test_a_temperature_out_of_range_is_refused(flat, temperature):
    live, vectors = flat
    with pytest.raises(SearchError, match="temperature"):
        EncoderScorer(ENCODER, live, vectors, temperature=temperature)


def test_a_reranking_is_refused(flat):
    live, vectors = flat
    with (
        EncoderScorer(ENCODER, live, vectors, temperature=0.05).session([asked("a")], Normalise.CHILDREN) as session,
        pytest.raises(QueryError, match="needs a trained model"),
    ):
        session.log_likelihoods([])


def test_rows_of_no_search_are_refused(flat):
    live, vectors = flat
    rows = Rows.of([Row(0, (), np.array([1, 2]))])
    with (
        EncoderScorer(ENCODER, live, vectors, temperature=0.05).session([asked("a")], Normalise.CHILDREN) as session,
        pytest.raises(SearchError, match="only a search"),
    ):
        session.score(rows)
