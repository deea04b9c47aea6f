"""The parts of an index: what a query gets, the model alone and the encoder alone."""

from dataclasses import replace

import numpy as np
import pytest

from llama_index_genret import FakeScorer
from llama_index_genret.errors import NotTrained, SearchError
from llama_index_genret.evaluation.evaluate import evaluate
from llama_index_genret.evaluation.parts import parts_of
from llama_index_genret.scorers.base import recall
from llama_index_genret.search import SearchOptions
from llama_index_genret.store import ScoringChoice, add_images, remove_images
from llama_index_genret.store.queries import EvaluationQuery

pytestmark = pytest.mark.torch

ANY = ScoringChoice()


@pytest.fixture(scope="module")
def model(encoded_index):
    return FakeScorer(encoded_index.tokenizer.vocab_size)


def names_of(parts):
    return [part.name for part in parts]


def hits_of(index, scorer):
    prompt = index.prompts.for_query(index.tokenizer, "red circle")
    (ranking,) = recall(scorer, index.trie, [prompt], SearchOptions(k=20, width=20))
    return {index.record_of(hit).image_id: hit.log_prob for hit in ranking.hits}


def test_trained_index_has_the_blend_and_both_parts(adapted_index, model, word_encoder):
    parts = parts_of(adapted_index, model, word_encoder, ANY)
    assert names_of(parts) == ["blend", "model", "encoder"]
    assert [part.scoring.model_weight for part in parts] == [0.5, 1.0, 0.0]
    blend, alone, encoder = (hits_of(adapted_index, part.scorer) for part in parts)
    assert alone == hits_of(adapted_index, model)
    assert max(encoder, key=encoder.get) == "red-circle"
    assert blend not in (alone, encoder)


def test_one_part_alone_is_the_only_row(adapted_index, encoded_index, model, word_encoder):
    assert names_of(parts_of(encoded_index, None, word_encoder, ANY)) == ["encoder"]
    assert names_of(parts_of(adapted_index, model, None, ANY)) == ["model"]
    with pytest.raises(NotTrained, match="genret train"):
        parts_of(encoded_index, None, None, ANY)


def test_model_alone_has_no_encoder_share_of_new_images(adapted_index, model, word_encoder):
    """The blend gives an image that was added after the training the share of the encoder."""
    new = adapted_index.records[0]
    identifier, vector = adapted_index.identifiers[0], np.array(adapted_index.vectors[:1])
    index = remove_images(adapted_index, [new.image_id])
    renamed = replace(new, image_id="new")
    index = add_images(index, [renamed], [identifier], index.scheme(), vectors=vector)
    blend, alone, _ = parts_of(index, model, word_encoder, ScoringChoice(model_weight=0.9))
    assert hits_of(index, alone.scorer) == hits_of(index, model)
    assert hits_of(index, blend.scorer)["new"] > hits_of(index, alone.scorer)["new"] + 0.1


def test_encoder_alone_has_no_prior_and_no_reranking(adapted_index, model, word_encoder):
    parts = parts_of(adapted_index, model, word_encoder, ScoringChoice(eta=0.5, rerank=3))
    assert [(part.scoring.eta, part.scoring.rerank) for part in parts] == [(0.5, 3), (0.5, 3), (0.0, 0)]
    queries = [EvaluationQuery(r.captions[0], frozenset([r.image_id])) for r in adapted_index.records]
    evaluation = evaluate(adapted_index, parts[2].scorer, queries, scoring=parts[2].choice)
    assert evaluation.figures()["recall@1"] == 1.0


def test_reranking_without_a_model_is_refused(encoded_index, adapted_index, model, word_encoder):
    with pytest.raises(SearchError, match="--rerank 0"):
        parts_of(encoded_index, None, word_encoder, ScoringChoice(rerank=3))
    with pytest.raises(SearchError, match="--rerank 0"):
        parts_of(adapted_index, model, word_encoder, ScoringChoice(rerank=3, model_weight=0.0))
