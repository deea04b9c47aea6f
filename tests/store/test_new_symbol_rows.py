"""Rows of symbols that join a trained index: guessed from pictures, set, kept through updates, and told to servers."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import IdentifierError, StoreError, TrainingError
from llama_index_genret.models.encoder import TextEncoder, embed_by_captions
from llama_index_genret.models.features import vision_features
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.endpoint.loaded_indexes import Registry
from llama_index_genret.store import drop_update, load_index, remove_images, store_adapter
from llama_index_genret.store.build import add_to_index, build_index, needs_features
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.store.model_state import adapter_folder, stored_new_rows, unseen_rows
from llama_index_genret.store.new_symbol_rows import RowRegression
from llama_index_genret.training.recipe import TrainOptions, train

pytestmark = pytest.mark.torch

OLD = 16
OPTIONS = TrainOptions(max_steps=2, batch_size=10, lora_rank=2, symbol_learning_rate=5e-2)


@pytest.fixture(scope="module")
def records(pictures):
    return read_corpus(pictures).records


@pytest.fixture(scope="module")
def truth(records, tiny_mllm):
    """(20, 32): rows that follow from the features by a linear map."""
    features = vision_features(tiny_mllm, [record.path for record in records])
    return features @ np.random.default_rng(0).normal(size=(features.shape[1], 32)).astype(np.float32)


@pytest.fixture(scope="module")
def trained(pictures, records, truth, tiny_mllm, tmp_path_factory):
    """One symbol an image; the rows of the sixteen are those of `truth`."""
    folder, corpus = tmp_path_factory.mktemp("atomic"), read_corpus(pictures)
    index = build_index(replace(corpus, records=records[:OLD]), folder / "index", tiny_mllm, scheme="atomic")
    index = train(index, OPTIONS, device="cpu", show_progress=False)
    adapter = shutil.copytree(adapter_folder(index), folder / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    (name,) = (name for name in tensors if name.endswith("trainable_tokens_delta"))
    save_file(tensors | {name: truth[:OLD]}, adapter / "adapter_model.safetensors")
    return store_adapter(index, adapter, {})


@pytest.fixture(scope="module")
def grown(trained, records, tiny_mllm, tmp_path_factory):
    return add_to_index(copy_of(trained, tmp_path_factory.mktemp("grown")), records[OLD:], tiny_mllm)


def copy_of(index, folder):
    return load_index(shutil.copytree(index.folder, folder / "index"))


def rows_of(index):
    """(images, d) as the loaded model has them."""
    embeddings = load_trained(index, device="cpu").model.get_input_embeddings().weight.detach().numpy()
    return embeddings[[index.token_ids(row)[0] for row in range(len(index.records))]]


def cosine(ours, theirs):
    """(ours, theirs)"""
    norms = np.linalg.norm(ours, axis=1)[:, None] * np.linalg.norm(theirs, axis=1)
    return ours @ theirs.T / norms


def recalled(index):
    scorer = TransformersScorer(load_trained(index, device="cpu"))
    prompt = index.prompts.for_query(index.tokenizer, "black bar")
    (ranking,) = recall(scorer, index.trie, [prompt], SearchOptions(k=30))
    return {index.record_of(hit).image_id: hit.log_prob for hit in ranking.hits}


def test_a_ridge_finds_a_linear_relation_and_shrinks_to_the_mean_without_one():
    draw = np.random.default_rng(1)
    relation = draw.normal(size=(12, 6)).astype(np.float32)
    features = draw.normal(size=(200, 12)).astype(np.float32) + 3
    rows = features @ relation + 1
    fitted = RowRegression.fit(features[:150], rows[:150], penalty=1e-6)
    np.testing.assert_allclose(fitted.predict(features[150:]), rows[150:], atol=1e-3)
    strong = RowRegression.fit(features, rows, penalty=1e9)
    np.testing.assert_allclose(strong.predict(features), np.broadcast_to(rows.mean(0), rows.shape), atol=1e-3)
    one = RowRegression.fit(features[:1], rows[:1])
    np.testing.assert_allclose(one.predict(features[1:2]), rows[:1], atol=1e-5)


def test_a_penalty_of_one_halves_directions_of_mean_variance():
    features = np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)
    fitted = RowRegression.fit(features, features, penalty=1.0)
    np.testing.assert_allclose(fitted.predict(features), features / 2, atol=1e-6)


def test_guessed_rows_point_where_predicted_ones_do_and_are_as_long_as_trained_ones():
    draw = np.random.default_rng(3)
    features, rows = draw.normal(size=(50, 4)).astype(np.float32), draw.normal(size=(50, 6)).astype(np.float32) + 2
    fitted = RowRegression.fit(features, rows, penalty=10.0)
    directions = [found - rows.mean(0) for found in (fitted.guess(features), fitted.predict(features))]
    lengths = [np.linalg.norm(direction, axis=1) for direction in directions]
    np.testing.assert_allclose(lengths[0], np.linalg.norm(rows - rows.mean(0), axis=1).mean(), rtol=1e-4)
    np.testing.assert_allclose((directions[0] * directions[1]).sum(1), lengths[0] * lengths[1], rtol=1e-3)
    np.testing.assert_allclose(fitted.guess(features.mean(0, keepdims=True)), rows.mean(0)[None], atol=0.01)


def test_an_added_image_has_a_row_like_images_that_look_like_it(grown, truth):
    rows = rows_of(grown)
    np.testing.assert_allclose(rows[:OLD], truth[:OLD], atol=1e-6)
    mean = truth[:OLD].mean(0)
    random = np.random.default_rng(2).normal(size=(4, 32)) * truth[:OLD].std(0)
    cosines, by_chance = cosine(rows[OLD:] - mean, truth[OLD:] - mean), cosine(random, truth[OLD:] - mean)
    assert (cosines.diagonal() > 0.7).all()
    assert (by_chance.diagonal() < 0.7).all()
    assert cosines.argmax(0).tolist() == [0, 1, 2, 3]  # a query that means one of the new images finds it among them


def test_an_added_image_with_captions_has_a_row_like_images_whose_captions_are_like_its(
    trained, records, tiny_mllm, tmp_path, encoder, caplog
):
    """By the teacher of the training, or another; one without captions by how it looks, as all do without a teacher."""
    reader = TextEncoder(encoder, device="cpu")
    mute = [*records[OLD:19], replace(records[19], captions=())]
    placed, _ = embed_by_captions(reader, [record.captions for record in [*records[:OLD], *mute]])
    looks = rows_of(add_to_index(copy_of(trained, tmp_path), mute, tiny_mllm))
    expected = RowRegression.fit(placed[:OLD], looks[:OLD]).guess(placed[OLD:19])
    (tmp_path / "left").mkdir()
    for way in ("chosen", "of the training", "gone", "all told"):
        (tmp_path / way).mkdir()
        index = copy_of(trained, tmp_path / way)
        teacher = encoder if way in ("chosen", "all told") else None
        if way in ("of the training", "gone"):
            described = {"teacher": encoder if way == "of the training" else str(tmp_path / "none")}
            index = store_adapter(index, shutil.copytree(adapter_folder(index), tmp_path / f"{way} adapter"), described)
        added = mute[:-1] if way == "all told" else mute
        grown = add_to_index(index, added, tiny_mllm, teacher=teacher)
        found = rows_of(grown)[OLD:]
        if way == "gone":
            np.testing.assert_allclose(found, looks[OLD:], atol=1e-5)
            assert "placed by how they look" in caplog.text
            continue
        np.testing.assert_allclose(found[:3], expected, atol=1e-4)
        assert np.abs(expected - looks[OLD:19]).max() > 0.1
        if way == "all told":  # no picture was looked at: the next image is the first
            assert not stored_new_rows(grown).regressions
            old = [record.image_id for record in records[:OLD]]
            left = remove_images(copy_of(grown, tmp_path / "left"), old)  # how captions tell of rows is stored
            again = add_to_index(
                left, [replace(record, image_id="b") for record in added[:1]], tiny_mllm, teacher=encoder
            )
            np.testing.assert_allclose(rows_of(again)[3], found[0], atol=1e-5)
            grown = add_to_index(grown, mute[3:], tiny_mllm)
            np.testing.assert_allclose(rows_of(grown)[OLD:19], found, atol=1e-6)
        np.testing.assert_allclose(rows_of(grown)[19], looks[19], atol=1e-4)
    add_to_index(trained, [], tiny_mllm, teacher=encoder)
    assert "the teacher was not asked" in caplog.text
    with pytest.raises(TrainingError, match="does not load as a text encoder"):
        add_to_index(trained, mute, tiny_mllm, teacher=str(tmp_path / "none"))


def test_it_is_recalled_at_once_and_the_weights_have_another_name(trained, grown, records):
    assert needs_features(trained)
    assert recalled(grown).keys() == {record.image_id for record in records}
    assert sum(np.exp(list(recalled(grown).values()))) == pytest.approx(1, abs=1e-4)
    assert grown.weights_id != trained.weights_id
    assert unseen_rows(grown) == list(range(OLD, 20))
    loaded = load_index(grown.folder)
    assert loaded.tokenizer.vocab_size == trained.tokenizer.vocab_size + 4


def test_more_images_need_no_old_one(trained, grown, records, tiny_mllm, tmp_path):
    """The regression is stored; where it is not, and no image is left to fit it on, that is said."""
    old = [record.image_id for record in records[:OLD]]
    more = [replace(record, image_id=f"{record.image_id}-b") for record in records[:2]]
    (tmp_path / "with").mkdir()
    left = remove_images(copy_of(grown, tmp_path / "with"), old)
    both = add_to_index(left, more, tiny_mllm)
    np.testing.assert_allclose(rows_of(both)[:4], rows_of(grown)[OLD:], atol=1e-6)
    once = add_to_index(copy_of(trained, tmp_path), [*records[OLD:], *more], tiny_mllm)
    np.testing.assert_allclose(rows_of(both)[4:], rows_of(once)[20:], atol=1e-4)
    (tmp_path / "without").mkdir()
    empty = remove_images(copy_of(trained, tmp_path / "without"), old)
    with pytest.raises(IdentifierError, match="no image is left"):
        add_to_index(empty, more, tiny_mllm)


def test_without_the_vision_tower_there_is_nothing_to_guess_from(trained, records):
    with pytest.raises(IdentifierError, match="load_base"):
        add_to_index(trained, records[OLD:])


def test_an_update_trains_the_guessed_rows_and_dropped_gives_them_back(grown, tmp_path):
    index = copy_of(grown, tmp_path)
    guessed = rows_of(index)
    updated = train(index, OPTIONS, update=True, device="cpu", show_progress=False)
    assert np.abs(rows_of(updated)[OLD:] - guessed[OLD:]).max(axis=1).min() > 1e-3
    dropped = drop_update(updated)
    np.testing.assert_array_equal(rows_of(dropped), guessed)
    assert dropped.weights_id == grown.weights_id


def test_a_training_takes_the_guessed_rows_over(grown, trained, tmp_path):
    index = copy_of(grown, tmp_path)
    anew = train(index, OPTIONS, device="cpu", show_progress=False)
    assert stored_new_rows(anew) is None
    assert unseen_rows(anew) == []
    with pytest.raises(StoreError, match="symbols of their own while it was trained"):
        store_adapter(replace(anew, manifest=trained.manifest), adapter_folder(anew), {})


def test_a_running_server_stays_with_the_weights_that_it_has(trained, records, tiny_mllm, tmp_path):
    index = copy_of(trained, tmp_path)
    registry = Registry({"index": index.folder})
    add_to_index(index, records[OLD:], tiny_mllm)
    assert len(registry.get("index").index.records) == OLD
    assert "symbols of their own. Restart" in registry.problems["index"]
