"""Rows of symbols added to a trained index: they are predicted, loaded, kept through updates and seen by servers."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import IdentifierError, StoreError
from llama_index_genret.models.encoder import embed_by_captions, load_encoder
from llama_index_genret.models.features import vision_features
from llama_index_genret.models.ridge import RowRegression
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.endpoint.loaded_indexes import Registry
from llama_index_genret.store import drop_update, load_index, remove_images, store_adapter
from llama_index_genret.store.build import add_to_index, build_index, needs_features
from llama_index_genret.store.model_loading import load_trained
from llama_index_genret.store.model_state import adapter_folder, stored_new_rows, unseen_rows
from llama_index_genret.training.recipe import TrainOptions, train

pytestmark = pytest.mark.torch

OLD = 16
OPTIONS = TrainOptions(max_steps=2, batch_size=10, lora_rank=2, symbol_learning_rate=5e-2)


@pytest.fixture(scope="module")
def records(pictures):
    return read_corpus(pictures).records


@pytest.fixture(scope="module")
def truth(records, tiny_mllm):
    """Return (20, 32) rows that are a linear map of the features."""
    features = vision_features(tiny_mllm, [record.path for record in records])
    return features @ np.random.default_rng(0).normal(size=(features.shape[1], 32)).astype(np.float32)


@pytest.fixture(scope="module")
def trained(pictures, records, truth, tiny_mllm, tmp_path_factory):
    """Build and train an index with one symbol per image. The rows of its 16 images are those of `truth`."""
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
    """Return the rows of the loaded model's embeddings, (images, d)."""
    embeddings = load_trained(index, device="cpu").model.get_input_embeddings().weight.detach().numpy()
    return embeddings[[index.token_ids(row)[0] for row in range(len(index.records))]]


def cosine(first, second):
    """Return the cosine of every pair of rows, (rows of first, rows of second)."""
    norms = np.linalg.norm(first, axis=1)[:, None] * np.linalg.norm(second, axis=1)
    return first @ second.T / norms


def recall_all(index):
    scorer = TransformersScorer(load_trained(index, device="cpu"))
    prompt = index.prompts.for_query(index.tokenizer, "black bar")
    (ranking,) = recall(scorer, index.trie, [prompt], SearchOptions(k=30))
    return {index.record_of(hit).image_id: hit.log_prob for hit in ranking.hits}


def test_ridge_fits_a_linear_map_and_shrinks_to_the_mean():
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


def test_penalty_of_one_halves_directions_of_mean_variance():
    features = np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)
    fitted = RowRegression.fit(features, features, penalty=1.0)
    np.testing.assert_allclose(fitted.predict(features), features / 2, atol=1e-6)


def test_guess_keeps_the_direction_and_has_the_trained_length():
    draw = np.random.default_rng(3)
    features, rows = draw.normal(size=(50, 4)).astype(np.float32), draw.normal(size=(50, 6)).astype(np.float32) + 2
    fitted = RowRegression.fit(features, rows, penalty=10.0)
    directions = [found - rows.mean(0) for found in (fitted.guess(features), fitted.predict(features))]
    lengths = [np.linalg.norm(direction, axis=1) for direction in directions]
    np.testing.assert_allclose(lengths[0], np.linalg.norm(rows - rows.mean(0), axis=1).mean(), rtol=1e-4)
    np.testing.assert_allclose((directions[0] * directions[1]).sum(1), lengths[0] * lengths[1], rtol=1e-3)
    np.testing.assert_allclose(fitted.guess(features.mean(0, keepdims=True)), rows.mean(0)[None], atol=0.01)


def test_row_of_an_added_image_follows_similar_images(grown, truth):
    rows = rows_of(grown)
    np.testing.assert_allclose(rows[:OLD], truth[:OLD], atol=1e-6)
    mean = truth[:OLD].mean(0)
    random = np.random.default_rng(2).normal(size=(4, 32)) * truth[:OLD].std(0)
    cosines, by_chance = cosine(rows[OLD:] - mean, truth[OLD:] - mean), cosine(random, truth[OLD:] - mean)
    assert (cosines.diagonal() > 0.7).all()
    assert (by_chance.diagonal() < 0.7).all()
    assert cosines.argmax(0).tolist() == [0, 1, 2, 3]  # a query for a new image ranks it first among them


def test_row_follows_similar_vectors_where_there_is_one(pictures, records, tiny_mllm, tmp_path, encoder, monkeypatch):
    """An image without captions has no vector where too few images have one: its row follows similar images."""
    monkeypatch.setattr("llama_index_genret.store.build.MIN_FITTED", 20)
    reader, corpus = load_encoder(encoder), replace(read_corpus(pictures), records=records[:OLD])
    trained = build_index(corpus, tmp_path / "index", tiny_mllm, encoder=reader, scheme="atomic")
    trained = train(trained, OPTIONS, encoder=reader, device="cpu", show_progress=False)
    old_rows = rows_of(trained)
    vectors, _ = embed_by_captions(reader, [record.captions for record in records])
    features = vision_features(tiny_mllm, [record.path for record in records])
    by_vector, by_image = (RowRegression.fit(x[:OLD], old_rows).guess(x[OLD:]) for x in (vectors, features))
    assert np.abs(by_vector - by_image).max() > 0.1
    with_vectors = add_to_index(trained, records[OLD:19], tiny_mllm, encoder=reader)
    assert not stored_new_rows(with_vectors).regressions
    grown = add_to_index(with_vectors, [replace(records[19], captions=())], tiny_mllm, encoder=reader)
    found = rows_of(grown)[OLD:]
    np.testing.assert_allclose(found, [*by_vector[:3], by_image[3]], atol=5e-3)  # vectors are stored in float16
    left = remove_images(grown, [record.image_id for record in records[:OLD]])  # the regressions are stored
    again = add_to_index(left, [replace(records[OLD], image_id="again")], tiny_mllm, encoder=reader)
    np.testing.assert_allclose(rows_of(again)[4], found[0], atol=5e-3)


def test_added_image_is_recalled_and_the_weights_id_changes(trained, grown, records):
    assert needs_features(trained)
    assert recall_all(grown).keys() == {record.image_id for record in records}
    assert sum(np.exp(list(recall_all(grown).values()))) == pytest.approx(1, abs=1e-4)
    assert grown.weights_id != trained.weights_id
    assert unseen_rows(grown) == list(range(OLD, 20))
    loaded = load_index(grown.folder)
    assert loaded.tokenizer.vocab_size == trained.tokenizer.vocab_size + 4


def test_stored_regression_needs_no_trained_image(trained, grown, records, tiny_mllm, tmp_path):
    """Without a stored regression and without trained images to fit it on, adding raises IdentifierError."""
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


def test_new_symbols_without_a_model_are_an_error(trained, records):
    with pytest.raises(IdentifierError, match="load_base"):
        add_to_index(trained, records[OLD:])


def test_update_trains_predicted_rows_and_drop_restores_them(grown, tmp_path):
    index = copy_of(grown, tmp_path)
    predicted = rows_of(index)
    updated = train(index, OPTIONS, update=True, device="cpu", show_progress=False)
    assert np.abs(rows_of(updated)[OLD:] - predicted[OLD:]).max(axis=1).min() > 1e-3
    dropped = drop_update(updated)
    np.testing.assert_array_equal(rows_of(dropped), predicted)
    assert dropped.weights_id == grown.weights_id


def test_training_replaces_the_predicted_rows(grown, trained, tmp_path):
    index = copy_of(grown, tmp_path)
    retrained = train(index, OPTIONS, device="cpu", show_progress=False)
    assert stored_new_rows(retrained) is None
    assert unseen_rows(retrained) == []
    with pytest.raises(StoreError, match="symbols of their own while it was trained"):
        store_adapter(replace(retrained, manifest=trained.manifest), adapter_folder(retrained), {})


def test_running_server_keeps_the_loaded_weights(trained, records, tiny_mllm, tmp_path):
    index = copy_of(trained, tmp_path)
    registry = Registry({"index": index.folder})
    add_to_index(index, records[OLD:], tiny_mllm)
    assert len(registry.get("index").index.records) == OLD
    assert "symbols of their own. Restart" in registry.problems["index"]
