"""Updates: their examples, that they resume, that dropping one restores every byte, and merged adapters."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from typer import BadParameter

from llama_index_genret.cli import app
from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import ModelMismatch, NotTrained, StoreError, TrainingError
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.launch import serve_command, served_adapter
from llama_index_genret.serving.merge_lora import join_adapters
from llama_index_genret.store import drop_update, load_index, remove_images, store_adapter, store_update
from llama_index_genret.store.build import add_to_index, build_index
from llama_index_genret.store.manifest import MANIFEST, manifest_text
from llama_index_genret.store.model_loading import load_base, load_trained
from llama_index_genret.store.model_state import adapter_folder, has_update, unseen_rows, update_folder
from llama_index_genret.training import recipe
from llama_index_genret.training.recipe import TrainOptions, train
from llama_index_genret.training.schedule import (
    MORE_PASSES,
    SMALLER_STEPS,
    by_age,
    replay_distribution,
    stream,
    update_options,
)
from llama_index_genret.training.tasks import MIX, Example
from tests.tiny_model import make_wordy_model

pytestmark = pytest.mark.torch

OLD = 16
NEW = [16, 17, 18, 19]
OPTIONS = TrainOptions(max_steps=4, batch_size=10, lora_rank=2, learning_rate=1e-2, checkpoint_every=2)


def grown_index(pictures, mllm, folder, **build_options):
    """Train briefly on 16 images, then add four."""
    corpus = read_corpus(pictures)
    index = build_index(replace(corpus, records=corpus.records[:OLD]), folder, mllm, **build_options)
    index = train(index, replace(OPTIONS, max_steps=2), device="cpu", show_progress=False)
    return add_to_index(index, corpus.records[OLD:], mllm)


def updated_index(index, options=OPTIONS):
    return train(index, options, update=True, device="cpu", show_progress=False)


@pytest.fixture(scope="module")
def grown(pictures, tiny_mllm, tmp_path_factory):
    return grown_index(pictures, tiny_mllm, tmp_path_factory.mktemp("grown") / "index")


@pytest.fixture(scope="module")
def updated(grown, tmp_path_factory):
    return updated_index(copy_of(grown, tmp_path_factory.mktemp("updated")))


def copy_of(index, folder):
    return load_index(shutil.copytree(index.folder, folder / "index"))


def bytes_of(index):
    return {path.relative_to(index.folder): path.read_bytes() for path in index.folder.rglob("*") if path.is_file()}


def weights(index):
    return load_trained(index, device="cpu").model.state_dict()


def assert_same_weights(ours, theirs):
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def rankings(index):
    scorer = TransformersScorer(load_trained(index, device="cpu"))
    prompts = [index.prompts.for_query(index.tokenizer, text) for text in ("red circle", "black bar")]
    found = recall(scorer, index.trie, prompts, SearchOptions(k=20))
    return [[(index.record_of(hit).image_id, hit.log_prob) for hit in ranking.hits] for ranking in found]


def test_unseen_images_are_tracked_through_edits(grown, updated, untrained_index, tmp_path):
    assert unseen_rows(grown) == NEW
    assert unseen_rows(updated) == []
    assert unseen_rows(updated, update=False) == NEW
    assert unseen_rows(untrained_index) is None
    first = updated.records[0]
    other = remove_images(copy_of(updated, tmp_path), [first.image_id])
    assert unseen_rows(other) == []
    other = add_to_index(other, [replace(first, sha256="0" * 64)], load_base(other, device="cpu"))
    assert unseen_rows(other) == [19]  # another image under the same id


def test_update_alternates_new_and_old_images_by_the_mix(grown):
    seen = stream(grown, TrainOptions(max_steps=8), new=NEW)
    halves = [[seen[i] for i in range(start, len(seen), 2)] for start in (0, 1)]
    assert {example.row for example in halves[0]} == set(NEW)
    assert {example.row for example in halves[1]} <= set(range(OLD))
    shares = {task: count for task, count in MIX.items() if task != "imitate"}
    for half in halves:
        assert len(half) == 80
        assert Counter(example.task for example in half[:20]) == Counter(shares)


def test_replay_distribution_matches_the_stream(grown):
    seen = stream(grown, TrainOptions(max_steps=200, mix={"retrieve": 1}), new=NEW)
    counts = Counter(example.row for example in seen)
    shares = replay_distribution(len(grown.records), NEW)
    assert shares.sum() == pytest.approx(1)
    assert sum(counts[row] for row in NEW) / len(seen) == pytest.approx(shares[NEW].sum())
    for row, share in enumerate(shares):
        assert counts[row] / len(seen) == pytest.approx(share, rel=0.2)


def test_update_inherits_options_with_smaller_steps(grown, tmp_path):
    ours = update_options(grown)
    assert (ours.batch_size, ours.lora_rank) == (OPTIONS.batch_size, OPTIONS.lora_rank)
    assert ours.learning_rate == SMALLER_STEPS * OPTIONS.learning_rate
    assert ours.symbol_learning_rate == SMALLER_STEPS * OPTIONS.symbol_learning_rate
    assert ours.max_steps == round(2 * MORE_PASSES * 2 * len(NEW) / OLD)  # the training took 2 steps for 16 images
    index = copy_of(grown, tmp_path)
    training = index.manifest.training | {"max_steps": None, "epochs": 6.0}
    longer = replace(index, manifest=index.manifest.model_copy(update={"training": training}))
    assert (update_options(longer).epochs, update_options(longer).max_steps) == (6.0 * MORE_PASSES, None)
    trained = train(index, update=True, device="cpu", show_progress=False)
    assert trained.manifest.update["steps"] == ours.max_steps
    app(["train", str(index.folder), "--update", "--epochs", "0.2", "--device", "cpu"], standalone_mode=False)
    assert (
        load_index(index.folder).manifest.update["max_steps"] is None
    )  # --epochs overrides the max_steps of the training
    assert trained.manifest.update["learning_rate"] == ours.learning_rate


def test_former_option_names_are_read(grown):
    former = grown.manifest.training | {"accumulate": 2, "recompute": True, "symbol_start": "images"}
    del former["gradient_accumulation_steps"], former["gradient_checkpointing"]
    earlier = replace(grown, manifest=grown.manifest.model_copy(update={"training": former}))
    options = update_options(earlier)
    assert (options.gradient_accumulation_steps, options.gradient_checkpointing) == (2, True)


def test_update_epochs_count_the_new_images(grown):
    tasks = {"retrieve": [e for e in stream(grown, TrainOptions(max_steps=50)) if e.task == "retrieve"]}
    ours, _ = by_age({**tasks, "memorise": [], "describe": [], "answer": []}, NEW)
    n_new = len(set(ours["retrieve"]))
    block = sum(count for task, count in MIX.items() if task != "imitate")
    for epochs in (10, 20):
        examples = stream(grown, TrainOptions(epochs=epochs, batch_size=10), new=NEW)
        assert len(examples) == pytest.approx(2 * epochs * n_new * block / MIX["retrieve"], abs=10)


def test_imitate_example_counts_by_its_nearest_image():
    tasks = {"imitate": [Example("imitate", number, "?", None) for number in range(4)]}
    new, old = by_age(tasks, [7], nearest_images=[7, 3, 7, 0])
    assert [example.row for example in new["imitate"]] == [0, 2]
    assert [example.row for example in old["imitate"]] == [1, 3]


def test_update_changes_recall_and_dropping_restores_all_bytes(grown, updated, tmp_path):
    files = bytes_of(grown)
    assert updated.weights_id != grown.weights_id
    assert updated.manifest.update["max_steps"] == 4
    adapter = [name for name in grown.manifest.files if name.startswith("adapter/")]
    assert all(updated.manifest.files[name] == grown.manifest.files[name] for name in adapter)
    before, with_update = rankings(grown), rankings(updated)
    assert np.abs([a[1] - b[1] for a, b in zip(before[0], with_update[0], strict=True)]).max() > 0.01
    dropped = drop_update(copy_of(updated, tmp_path))
    assert bytes_of(dropped) == files
    assert rankings(dropped) == before
    with pytest.raises(NotTrained, match="no update to drop"):
        drop_update(dropped)


def test_killed_update_resumes_to_the_same_weights(grown, updated, tmp_path, monkeypatch):
    index = copy_of(grown, tmp_path)
    compute_loss, steps = recipe.LabelTrainer.compute_loss, iter(range(99))

    def compute_or_die(*arguments, **options):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return compute_loss(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(recipe.LabelTrainer, "compute_loss", compute_or_die)
        with pytest.raises(KeyboardInterrupt):
            updated_index(index)
    assert not has_update(load_index(index.folder))
    resumed = updated_index(load_index(index.folder))
    assert resumed.manifest.update["resumed_at_step"] == 2
    assert updated.manifest.update["resumed_at_step"] == 0
    assert_same_weights(weights(resumed), weights(updated))
    assert not (index.folder / "training").exists()


def test_training_and_update_have_different_run_keys(grown, updated):
    keys = {recipe._run_key(grown, OPTIONS), recipe._run_key(grown, OPTIONS, update=True)}
    assert len(keys) == 2
    assert recipe._run_key(updated, OPTIONS, update=True) in keys  # it starts from the same weights


def test_second_update_replaces_the_first(grown, updated, tmp_path):
    again = updated_index(copy_of(updated, tmp_path))
    assert_same_weights(weights(again), weights(updated))
    assert len([name for name in again.manifest.files if name.startswith("update/")]) == len(
        [name for name in updated.manifest.files if name.startswith("update/")]
    )


def test_impossible_update_is_refused(grown, trained_index, untrained_index, pictures, tmp_path):
    for index, error, reason in [
        (trained_index, TrainingError, "nothing to update"),
        (untrained_index, NotTrained, "no trained weights to update"),
        (without_captions(grown, NEW), TrainingError, "none of the 4 images that were added"),
        (without_notes(copy_of(grown, tmp_path)), TrainingError, "did not record"),
    ]:
        with pytest.raises(error, match=reason):
            updated_index(index)


def without_captions(index, rows):
    records = [replace(r, captions=()) if row in rows else r for row, r in enumerate(index.records)]
    return replace(index, records=tuple(records))


def without_notes(index):
    files = {name: entry for name, entry in index.manifest.files.items() if name != "adapter/images.json"}
    (index.folder / MANIFEST).write_text(manifest_text(index.manifest.model_copy(update={"files": files})))
    return load_index(index.folder)


def test_update_without_old_images_has_no_replay(grown, tmp_path):
    left = remove_images(copy_of(grown, tmp_path), [record.image_id for record in grown.records[:OLD]])
    examples = stream(left, TrainOptions(max_steps=2), new=unseen_rows(left, update=False))
    assert {example.row for example in examples} == {0, 1, 2, 3}


def test_training_drops_the_update(updated, tmp_path):
    index = copy_of(updated, tmp_path)
    retrained = store_adapter(index, adapter_folder(index), {"steps": 1})
    assert not has_update(retrained)
    assert retrained.manifest.update is None
    assert unseen_rows(retrained) == []


def test_edits_during_an_update_are_kept(grown, updated, tmp_path):
    index = copy_of(grown, tmp_path)
    remove_images(index, [index.records[0].image_id, index.records[17].image_id])
    stored = store_update(index, update_folder(updated), {})
    assert len(stored.records) == 18
    assert stored.weights_id == updated.weights_id
    retrained = store_adapter(stored, shutil.copytree(update_folder(updated), tmp_path / "other"), {})
    with pytest.raises(StoreError, match="trained again"):
        store_update(stored, update_folder(updated), {})
    assert not has_update(load_index(retrained.folder))


def test_update_and_drop_from_the_command_line(grown, tmp_path, capsys):
    index = copy_of(grown, tmp_path)

    def run(*arguments):
        app([*map(str, arguments), "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    assert run("inspect", index.folder)["untrained_images"] == 4
    result = run("train", index.folder, "--update", "--max-steps", 1, "--batch-size", 4, "--device", "cpu")
    assert (result["untrained_images"], result["update"]["steps"], result["update"]["learning_rate"]) == (
        0,
        1,
        SMALLER_STEPS * OPTIONS.learning_rate,
    )
    assert run("train", index.folder, "--drop-update")["update"] is None
    assert load_index(index.folder).weights_id == grown.weights_id
    with pytest.raises(BadParameter, match="give it alone"):
        run("train", index.folder, "--drop-update", "--max-steps", 1)


@pytest.fixture(scope="module")
def plain(pictures, tmp_path_factory):
    """An updated index with identifiers of existing words, so that its adapters are plain LoRA of two ranks."""
    folder = tmp_path_factory.mktemp("plain")
    mllm = load_mllm(str(make_wordy_model(folder / "model")), device="cpu")
    index = grown_index(pictures, mllm, folder / "index", alphabet="existing")
    return updated_index(index, replace(OPTIONS, lora_rank=7))


def test_joined_adapter_has_the_logits_of_both(plain):
    with torch.inference_mode():
        inputs = {"input_ids": torch.tensor([[5, 60, 200, 300]]), "use_cache": False}
        expected = load_trained(plain, device="cpu").model(**inputs).logits
        below = load_trained(plain, device="cpu", update=False).model(**inputs).logits
        joined = PeftModel.from_pretrained(load_base(plain, device="cpu").model, served_adapter(plain))(**inputs).logits
    torch.testing.assert_close(joined, expected, rtol=1e-4, atol=1e-4)
    assert (below - expected).abs().max() > 0.01


def test_updated_index_is_served_by_one_adapter(plain):
    command = serve_command([plain], host="127.0.0.1", port=1, adapters=True)
    folder = served_adapter(plain)
    assert command[command.index("--max-lora-rank") + 1] == "16"  # 2 + 7, rounded up to a rank that vLLM accepts
    assert f"genret-{plain.weights_id}={folder}" in command
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    below = drop_update(load_index(shutil.copytree(plain.folder, plain.folder.parent / "dropped")))
    assert served_adapter(below) == adapter_folder(below)


def test_incompatible_adapters_are_not_joined(updated, plain, tmp_path):
    with pytest.raises(ModelMismatch, match="no plain LoRA"):
        join_adapters(adapter_folder(updated), update_folder(updated), tmp_path / "out")
    other = shutil.copytree(update_folder(plain), tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(ModelMismatch, match="different modules"):
        join_adapters(adapter_folder(plain), other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
