"""Rows of symbols that join a trained index: guessed from pictures, set, kept through updates, and told to servers."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama_index_genret.corpus import read_corpus
from llama_index_genret.endpoint.registry import Registry
from llama_index_genret.errors import IdentifierError, StoreError
from llama_index_genret.indexing import add_to_index, build_index, needs_features
from llama_index_genret.modeling import load_trained, vision_features
from llama_index_genret.new_rows import RowRegression
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.store import drop_update, load_index, remove_images, store_adapter
from llama_index_genret.training.recipe import TrainOptions, train

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
    adapter = shutil.copytree(index.adapter_folder(), folder / "adapter")
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


def recalled(index):
    scorer = TransformersScorer(load_trained(index, device="cpu"))
    prompt = index.prompts.for_query(index.tokenizer, "black bar")
    (ranking,) = recall(scorer, index.trie, [prompt], k=30)
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


def test_an_added_image_has_a_row_like_images_that_look_like_it(grown, truth):
    rows = rows_of(grown)
    np.testing.assert_allclose(rows[:OLD], truth[:OLD], atol=1e-6)
    error = np.linalg.norm(rows[OLD:] - truth[OLD:], axis=1)
    draw = np.random.default_rng(2)
    random = truth[:OLD].mean(0) + truth[:OLD].std(0) * draw.normal(size=(4, 32))
    assert (error < 0.5 * np.linalg.norm(random - truth[OLD:], axis=1)).all()
    assert (error < np.linalg.norm(truth[:OLD].mean(0) - truth[OLD:], axis=1)).all()


def test_it_is_recalled_at_once_and_the_weights_have_another_name(trained, grown, records):
    assert needs_features(trained)
    assert recalled(grown).keys() == {record.image_id for record in records}
    assert sum(np.exp(list(recalled(grown).values()))) == pytest.approx(1, abs=1e-4)
    assert grown.weights_id != trained.weights_id
    assert grown.unseen_rows() == list(range(OLD, 20))
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
    assert anew.new_rows() is None
    assert anew.unseen_rows() == []
    with pytest.raises(StoreError, match="symbols of their own while it was trained"):
        store_adapter(replace(anew, manifest=trained.manifest), anew.adapter_folder(), {})


def test_a_running_server_stays_with_the_weights_that_it_has(trained, records, tiny_mllm, tmp_path):
    index = copy_of(trained, tmp_path)
    registry = Registry({"index": index.folder})
    add_to_index(index, records[OLD:], tiny_mllm)
    assert len(registry.get("index").index.records) == OLD
    assert "symbols of their own. Restart" in registry.problems["index"]
