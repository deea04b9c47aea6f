"""The share of the model in the blend is tuned on validation queries, with the model run once per prefix."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from llama_index_genret import FakeScorer
from llama_index_genret.errors import NotTrained, SearchError
from llama_index_genret.evaluation.evaluate import evaluate
from llama_index_genret.evaluation.parts import parts_of
from llama_index_genret.evaluation.trials import Trials
from llama_index_genret.evaluation.tuning import MODEL_WEIGHTS, TEMPERATURES, tune
from llama_index_genret.scorers.recording import RecordingScorer
from llama_index_genret.store import Scoring, ScoringChoice, add_images, load_index, remove_images
from llama_index_genret.store.queries import EvaluationQuery

pytestmark = pytest.mark.torch

FEW = {"model_weights": (0.0, 0.3, 0.5, 1.0), "temperatures": (0.05, 0.5), "etas": (0.0, 0.5)}


@pytest.fixture
def queries(encoded_index):
    """Return a query for each of twelve images and one that is refused."""
    right = [EvaluationQuery(f"a {r.captions[0]}", frozenset([r.image_id])) for r in encoded_index.records[:12]]
    return [*right, EvaluationQuery(" ", right[0].image_ids)]


@pytest.fixture
def model(encoded_index):
    return FakeScorer(encoded_index.tokenizer.vocab_size)


@pytest.fixture
def trained_model(adapted_index, queries):
    """A model that gives the right image of each query the highest probability."""
    index, table, fake = adapted_index, {}, FakeScorer(adapted_index.tokenizer.vocab_size)
    for query in queries[:-1]:
        prompt = query.prompt(index)
        (row,) = (index.rows_by_id[image_id] for image_id in query.image_ids)
        path = index.token_ids(row)
        for depth, right in enumerate(path):
            logits = fake.logits(prompt, path[:depth])
            table[prompt.token_ids, path[:depth]] = {t: v + 9.0 * (t == right) for t, v in enumerate(logits)}
    return FakeScorer(fake.vocab_size, table=table)


def test_trials_have_the_figures_of_the_evaluation(adapted_index, model, word_encoder, queries):
    tuning = tune(adapted_index, model, queries, encoder=word_encoder, rerank=4, rerank_weights=(0.0, 0.5), **FEW)
    assert len(tuning.trials) == 4 * 2 + 2 * 2 * (tuning.index.scoring().model_weight > 0)
    for trial in tuning.trials:
        rerank = trial.scoring.rerank if trial.scoring.rerank_weight else 0
        choice = ScoringChoice(**vars(replace(trial.scoring, rerank=rerank)))
        part = parts_of(tuning.index, model, word_encoder, choice)[0]
        found = evaluate(tuning.index, part.scorer, queries, scoring=choice).figures()
        assert found["mrr"] == trial.figures["mrr"], trial.scoring
    assert len({trial.figures["mrr"] for trial in tuning.trials}) > 3


def test_compared_figures_are_those_of_the_parts(adapted_index, model, noise_encoder, queries):
    tuning = tune(adapted_index, model, queries, encoder=noise_encoder, **FEW)
    assert list(tuning.compared) == ["before", "after", "model", "encoder"]
    assert tuning.compared["before"].scoring == Scoring()
    assert tuning.compared["after"].scoring == tuning.index.scoring()
    parts = parts_of(tuning.index, model, noise_encoder, ScoringChoice())
    for name, part in zip(("after", "model", "encoder"), parts, strict=True):
        found = evaluate(tuning.index, part.scorer, queries, scoring=part.choice).figures()
        assert found["mrr"] == tuning.compared[name].figures["mrr"]
    assert tuning.compared["after"].figures["mrr"] >= tuning.compared["before"].figures["mrr"]


def test_a_useless_model_gets_a_small_share(adapted_index, model, word_encoder, queries):
    flat = {"encoder": word_encoder, "temperatures": [0.5]}
    tuned = tune(adapted_index, model, queries, **flat).index
    assert tuned.scoring().model_weight < 0.5
    alone = tune(tuned, model, queries, model_weights=[0.0], **flat)
    assert alone.compared["before"].scoring == tuned.scoring()
    assert alone.index.scoring() == Scoring(model_weight=0.0, temperature=0.5)
    assert alone.compared["after"].figures["mrr"] == pytest.approx(12 / 13)
    assert load_index(adapted_index.folder).manifest.tuned.queries == 13


def test_a_useless_encoder_gets_a_small_share(adapted_index, trained_model, noise_encoder, queries):
    tuning = tune(adapted_index, trained_model, queries, encoder=noise_encoder, temperatures=[0.02])
    assert tuning.index.scoring().model_weight > 0.5
    assert tuning.compared["model"].figures["mrr"] == pytest.approx(12 / 13)
    assert tuning.compared["encoder"].figures["mrr"] < 0.7


def test_ties_keep_the_default_blend(adapted_index, model, word_encoder):
    """Every image is right, so every ranking has the same MRR."""
    anything = [EvaluationQuery("anything", frozenset(adapted_index.rows_by_id))]
    tuning = tune(adapted_index, model, anything, encoder=word_encoder)
    assert tuning.index.scoring() == Scoring(rerank_weight=0.0)
    assert len(tuning.trials) == len(MODEL_WEIGHTS) * len(TEMPERATURES) + 11


def test_model_scores_each_prefix_of_a_query_once(adapted_index, model, word_encoder, queries):
    recorder = RecordingScorer(model)
    trials = Trials(adapted_index, recorder, word_encoder, queries)
    scorings = [Scoring(model_weight=w, temperature=t) for w in MODEL_WEIGHTS for t in TEMPERATURES]
    assert len(trials.hits(scorings)) == 55
    scored = [(row.query, row.prefix) for step in recorder.steps for row in step.rows]
    assert len(scored) == len(set(scored)) > len(queries)


def test_untrained_index_has_nothing_to_choose(encoded_index, word_encoder, queries, tmp_path):
    index = load_index(shutil.copytree(encoded_index.folder, tmp_path / "index"))
    tuning = tune(index, None, queries, encoder=word_encoder)
    assert (tuning.trials, list(tuning.compared)) == ([], ["encoder"])
    assert tuning.compared["encoder"].figures["mrr"] == pytest.approx(12 / 13)
    assert load_index(index.folder).version == index.version
    with pytest.raises(NotTrained, match="genret train"):
        tune(index, None, queries)


def test_images_added_since_the_training_have_no_prior(adapted_index, model, word_encoder):
    """Their probability is the encoder's, so a discount by the model's prior would rank them above all others."""
    gone = adapted_index.records[0]
    index = remove_images(adapted_index, [gone.image_id])
    renamed = replace(gone, image_id="new")
    vector = np.array(adapted_index.vectors[:1])
    index = add_images(index, [renamed], adapted_index.identifiers[:1], index.scheme(), vectors=vector)
    prior = tune(index, model, encoder=word_encoder).index.log_prior
    assert np.flatnonzero(np.isnan(prior)).tolist() == [19]


def test_weight_out_of_range_is_refused(adapted_index, model, word_encoder, queries):
    with pytest.raises(SearchError, match="model_weight"):
        tune(adapted_index, model, queries, encoder=word_encoder, model_weights=[1.5])
