"""Images added to a trained index are recalled by the encoder at once, in every scheme, with nothing trained."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from llama_index_genret.corpus import read_corpus
from llama_index_genret.models.encoder import CallableEncoder
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.blend import Blender, BlendScorer
from llama_index_genret.scorers.encoder import EncoderScorer
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.store.build import add_to_index, build_index
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.store.model_state import unseen_rows
from llama_index_genret.store.scoring import Scoring
from llama_index_genret.training.recipe import TrainOptions, train

pytestmark = pytest.mark.torch

SCHEMES = ("atomic", "numeric", "semantic", "string", "structured")
NEW = ("red-square", "blue-circle", "black-frame", "yellow-bar", "green-bar")


def embed(texts):
    """Add up a fixed random vector for each word."""
    return np.stack([sum(map(vector_of, text.split()), np.full(24, 1e-3)) for text in texts])


def vector_of(word):
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).normal(size=24)


ENCODER = CallableEncoder(embed, name="words")


@pytest.fixture(scope="module", params=SCHEMES)
def grown(request, pictures, tiny_mllm, tmp_path_factory):
    """An index that was trained on fifteen images, after five more were added."""
    corpus = read_corpus(pictures)
    old, new = ([r for r in corpus.records if (r.image_id in NEW) == is_new] for is_new in (False, True))
    folder = tmp_path_factory.mktemp("added") / "index"
    index = build_index(replace(corpus, records=old), folder, tiny_mllm, encoder=ENCODER, scheme=request.param)
    index = train(index, TrainOptions(max_steps=2, lora_rank=2), encoder=ENCODER, device="cpu", show_progress=False)
    return add_to_index(index, new, tiny_mllm, encoder=ENCODER)


def ranked(index, scorer, query, **options):
    prompt = index.prompts.for_query(index.tokenizer, query)
    (ranking,) = recall(scorer, index.trie, [prompt], SearchOptions(k=20, **options))
    return {index.record_of(hit).image_id: hit.log_prob for hit in ranking.hits}


def test_added_images_are_first_for_their_captions(grown):
    assert {grown.records[row].image_id for row in unseen_rows(grown)} == set(NEW)
    scorer = Blender(grown, ENCODER).scorer(TransformersScorer(load_trained(grown, device="cpu")), grown.scoring())
    for image_id in NEW:
        caption = image_id.replace("-", " ")
        assert next(iter(ranked(grown, scorer, caption))) == image_id
        assert next(iter(ranked(grown, scorer, caption, mode="exact"))) == image_id


def test_models_share_of_added_images_is_the_encoders(grown):
    model = TransformersScorer(load_trained(grown, device="cpu"))
    encoder = EncoderScorer(ENCODER, grown.trie, grown.vectors, temperature=Scoring().temperature)
    learned = np.array([record.image_id not in NEW for record in grown.records])
    alone = BlendScorer(model, encoder, 1.0, grown.leaf_filter_of(learned))
    query = "a yellow circle"
    found, expected = ranked(grown, alone, query, mode="exact"), ranked(grown, encoder, query, mode="exact")
    np.testing.assert_allclose([found[image] for image in NEW], [expected[image] for image in NEW], atol=1e-4)
    assert sum(np.exp(list(found.values()))) == pytest.approx(1.0, abs=1e-4)
