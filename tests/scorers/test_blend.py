"""The blend of a model and the encoder, against its definition over whole identifiers and its two ends."""

import asyncio

import numpy as np
import pytest

from llama_index_genret.errors import SearchError
from llama_index_genret.models.encoder import unit
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import arecall, recall
from llama_index_genret.scorers.blend import BlendScorer
from llama_index_genret.scorers.encoder import EncoderScorer
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import Normalise, SearchOptions
from llama_index_genret.trie import LeafFilter, LiveTrie, build_trie
from tests.scorers.test_encoder import DIMENSION, ENCODER

N = 40
QUERY = Prompt((7,), query="a fox")


def make_parts(n_levels):
    """(trie, model, encoder scorer) of forty images."""
    identifiers = [(n,) if n_levels == 1 else (n // 8, 10 + n % 8) for n in range(N)]
    live = LiveTrie(build_trie(identifiers)[0])
    vectors = unit(np.random.default_rng(3).normal(size=(N, DIMENSION)))
    return live, FakeScorer(50, seed=1), EncoderScorer(ENCODER, live, vectors, temperature=0.1)


@pytest.fixture(scope="module", params=[1, 2])
def parts(request):
    return make_parts(request.param)


def ranked(scorer, live):
    (ranking,) = recall(scorer, live, [QUERY], SearchOptions(k=N, mode="exact"))
    return {hit.key: hit.log_prob for hit in ranking.hits}


def test_weight_one_is_the_model_alone(parts):
    live, model, encoder = parts
    assert ranked(BlendScorer(model, encoder, 1.0), live) == ranked(model, live)


def test_a_small_weight_approaches_the_encoder(parts):
    live, model, encoder = parts
    blended, alone = ranked(BlendScorer(model, encoder, 1e-9), live), ranked(encoder, live)
    assert blended.keys() == alone.keys()
    np.testing.assert_allclose([blended[key] for key in range(N)], [alone[key] for key in range(N)], atol=1e-6)


def test_one_level_blends_as_the_definition_says():
    live, model, encoder = make_parts(1)
    by_model, by_encoder = ranked(model, live), ranked(encoder, live)
    expected = np.array([0.3 * by_model[key] + 0.7 * by_encoder[key] for key in range(N)])
    expected -= np.logaddexp.reduce(expected)
    found = ranked(BlendScorer(model, encoder, 0.3), live)
    np.testing.assert_allclose([found[key] for key in range(N)], expected, atol=1e-9)


def test_unlearned_images_have_the_encoders_share(parts):
    """Whatever the weight, half of the images that the model never saw keep the probability the encoder gives them."""
    live, model, encoder = parts
    learned = LeafFilter.from_mask(np.arange(N) < 24)
    by_encoder = ranked(encoder, live)
    found = ranked(BlendScorer(model, encoder, 1.0, learned), live)
    np.testing.assert_allclose(
        [found[key] for key in range(24, N)], [by_encoder[key] for key in range(24, N)], atol=1e-9
    )
    np.testing.assert_allclose(np.exp(list(found.values())).sum(), 1.0)


def test_learned_images_share_by_the_model_at_every_level(parts):
    """By definition: unlearned images keep the encoder's, the rest is divided as in a tree without them."""
    live, model, encoder = parts
    mask = np.random.default_rng(0).random(N) < 0.7
    learned, row = LeafFilter.from_mask(mask), live.key(np.arange(N))
    by_encoder = np.array([ranked(encoder, live)[key] for key in range(N)])
    alone = ranked(model, LiveTrie(live.base, live=learned, keys=live.keys))
    share = np.logaddexp.reduce(by_encoder[row[mask]])
    expected = by_encoder.copy()
    expected[row[mask]] = [alone[key] + share for key in row[mask]]
    found = ranked(BlendScorer(model, encoder, 1.0, learned), live)
    np.testing.assert_allclose([found[key] for key in range(N)], expected, atol=1e-9)


def test_an_image_query_goes_to_the_model_alone(parts):
    live, model, encoder = parts
    image = Prompt((7,), image=b"not read by a fake")
    (blended,) = recall(BlendScorer(model, encoder, 0.3), live, [image], SearchOptions(k=N))
    (alone,) = recall(model, live, [image], SearchOptions(k=N))
    assert blended == alone


def test_a_search_over_the_vocabulary_is_the_models(parts):
    live, model, encoder = parts
    (blended,) = recall(
        BlendScorer(model, encoder, 0.3), live, [QUERY], SearchOptions(k=N, normalise=Normalise.VOCABULARY)
    )
    (alone,) = recall(model, live, [QUERY], SearchOptions(k=N, normalise=Normalise.VOCABULARY))
    assert blended == alone


def test_an_event_loop_gets_the_same_blend(parts):
    live, model, encoder = parts
    blend = BlendScorer(model, encoder, 0.3)
    assert asyncio.run(arecall(blend, live, [QUERY], SearchOptions(k=5))) == recall(
        blend, live, [QUERY], SearchOptions(k=5)
    )


@pytest.mark.parametrize("weight", [0.0, -0.1, 1.1, float("nan")])
def test_a_weight_out_of_range_is_refused(parts, weight):
    _, model, encoder = parts
    with pytest.raises(SearchError, match="model_weight"):
        BlendScorer(model, encoder, weight)
