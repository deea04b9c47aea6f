"""The training recipe: its examples, its loss, that it learns and resumes, and the stored files."""

import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import ModelError, ModelMismatch, NotTrained, TrainingError
from llama_index_genret.models.mllm import fingerprint, load_mllm
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.export import export_checkpoint
from llama_index_genret.store import load_index
from llama_index_genret.store.build import build_index
from llama_index_genret.store.model_loading import load_base, load_trained
from llama_index_genret.training.collator import IGNORED, ExampleTensors, collate
from llama_index_genret.training.feature_cache import cached_tower
from llama_index_genret.training.lora import add_lora, fast_symbol_rows
from llama_index_genret.training.recipe import TrainOptions, train
from llama_index_genret.training.tasks import MIX, InterleavedExamples, examples_of, read_mix
from llama_index_genret.training.trainer import summed_loss
from tests.conftest import draw_pictures
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.torch


@pytest.fixture
def fresh_index(pictures, tiny_mllm, tmp_path):
    return build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm)


def test_blocks_follow_the_mix_and_epochs_cover_all_examples(untrained_index):
    tasks = examples_of(untrained_index)
    stream = InterleavedExamples(tasks, 4000, seed=3)
    shares = {task: count for task, count in MIX.items() if task in tasks}
    block = sum(shares.values())
    for start in (0, 7 * block):
        assert Counter(stream[start + i].task for i in range(block)) == Counter(shares)
    retrieve = [e for e in stream if e.task == "retrieve"][: len(tasks["retrieve"])]
    assert set(retrieve) == set(tasks["retrieve"])


def test_example_depends_only_on_seed_and_number(untrained_index):
    tasks = examples_of(untrained_index)
    short, long = InterleavedExamples(tasks, 100, seed=3), InterleavedExamples(tasks, 4000, seed=3)
    assert [short[i] for i in range(100)] == [long[i] for i in range(100)]
    assert [InterleavedExamples(tasks, 100, seed=4)[i] for i in range(100)] != list(short)


def test_training_without_captions_is_refused(pictures, tiny_mllm, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("red-circle.png", "blue-bar.png"):
        (bare / name).write_bytes((pictures / name).read_bytes())
    index = build_index(read_corpus(bare), tmp_path / "index", tiny_mllm, scheme="numeric")
    with pytest.raises(TrainingError, match=r"metadata\.jsonl"):
        train(index, TrainOptions(max_steps=1), device="cpu", show_progress=False)


def test_labels_cover_only_target_and_end_of_turn(untrained_index, tiny_mllm):
    index = untrained_index
    tensors = ExampleTensors(index, tiny_mllm, InterleavedExamples(examples_of(index), 60, seed=0))
    for i in range(60):
        item, example = tensors[i], InterleavedExamples(examples_of(index), 60, seed=0)[i]
        target = [int(t) for t in item["labels"] if t != IGNORED]
        expected = "".join(index.identifiers[example.row]) if example.target is None else example.target
        assert index.tokenizer.decode(target) == expected + "<|im_end|>"
        assert ("pixel_values" in item) == (example.task in ("memorise", "answer"))


def test_training_and_recall_use_the_same_query_prompt(untrained_index, tiny_mllm):
    index = untrained_index
    tensors = ExampleTensors(index, tiny_mllm, InterleavedExamples(examples_of(index), 60, seed=0))
    stream = InterleavedExamples(examples_of(index), 60, seed=0)
    i = next(i for i in range(60) if stream[i].task == "retrieve")
    prompt = index.prompts.for_query(index.tokenizer, stream[i].text)
    assert tensors[i]["input_ids"].tolist()[: len(prompt.token_ids)] == list(prompt.token_ids)


def test_padded_batch_has_the_summed_loss_of_its_items(fresh_index):
    mllm = load_base(fresh_index, device="cpu")
    tensors = ExampleTensors(fresh_index, mllm, InterleavedExamples(examples_of(fresh_index), 20, seed=0))
    items = [tensors[i] for i in range(20)]
    symbols = torch.from_numpy(tensors.paths.token_ids)
    with torch.no_grad():
        together = [summed_loss(mllm.model, dict(part), symbols) for part in collate(items, pad=0).values()]
        alone = [
            summed_loss(mllm.model, dict(part), symbols) for item in items for part in collate([item], pad=0).values()
        ]
    assert sum(n for _, n in together) == sum(n for _, n in alone)
    assert float(sum(loss for loss, _ in together)) == pytest.approx(float(sum(loss for loss, _ in alone)), rel=1e-4)


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = sum(summed_loss(model, dict(part), torch.empty(0, dtype=torch.long))[0] for part in batch.values())
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_caches_and_fast_rows_keep_loss_and_gradients(fresh_index):
    mllm = load_base(fresh_index, device="cpu")
    model = add_lora(fresh_index, mllm, TrainOptions(lora_rank=2))
    tensors = ExampleTensors(fresh_index, mllm, InterleavedExamples(examples_of(fresh_index), 20, seed=0))
    batch = collate([tensors[i] for i in range(20)], pad=0)

    plain_loss, plain = loss_and_gradients(model, batch)
    with cached_tower(mllm.model), fast_symbol_rows(model):
        for _ in range(2):
            fast_loss, fast = loss_and_gradients(model, batch)
            assert fast_loss == pytest.approx(plain_loss, rel=1e-5)
            assert fast.keys() == plain.keys()
            assert any("trainable_tokens" in name for name in fast)
            for name, gradient in plain.items():
                torch.testing.assert_close(fast[name], gradient, rtol=1e-3, atol=1e-4)


def test_training_learns_the_training_captions(pictures, tiny_mllm, tmp_path):
    """Five images are enough for the tiny model to learn in a minute."""
    few = tmp_path / "few"
    draw_pictures(few)
    lines = (few / "metadata.jsonl").read_text().splitlines()[::4]
    (few / "metadata.jsonl").write_text("\n".join(lines))
    index = build_index(read_corpus(few), tmp_path / "index", tiny_mllm)
    options = TrainOptions(max_steps=150, lora_rank=16, learning_rate=2e-2, symbol_learning_rate=5e-2)
    index = train(index, options, device="cpu", show_progress=False)
    scorer = TransformersScorer(load_trained(index, device="cpu"))
    prompts = [index.prompts.for_query(index.tokenizer, record.captions[0]) for record in index.records]
    found = [
        index.record_of(ranking.hits[0]).image_id for ranking in recall(scorer, index.trie, prompts, SearchOptions(k=1))
    ]
    right = np.mean([image_id == record.image_id for image_id, record in zip(found, index.records, strict=True)])
    assert right >= 0.8


def test_killed_run_resumes_to_the_same_weights(fresh_index, pictures, tiny_mllm, tmp_path):
    """Kill the command after its second checkpoint, and run it again."""
    folder = fresh_index.folder
    steps = 12
    code = f"""
from pathlib import Path
from llama_index_genret.store import load_index
from llama_index_genret.training.recipe import TrainOptions, train
options = TrainOptions(max_steps={steps}, lora_rank=2, checkpoint_every=2)
train(load_index(Path({str(folder)!r})), options, device="cpu", show_progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not list(folder.glob("training/*/checkpoint-[6-9]*")):
        assert process.poll() is None, "the run ended before the kill"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not load_index(folder).is_trained
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert load_index(folder).manifest.training["resumed_at_step"] >= 4
    straight = build_index(read_corpus(pictures), tmp_path / "straight", tiny_mllm)
    options = TrainOptions(max_steps=steps, lora_rank=2, checkpoint_every=2)
    straight = train(straight, options, device="cpu", show_progress=False)
    assert straight.manifest.training["resumed_at_step"] == 0
    interrupted, uninterrupted = (load_trained(load_index(f), device="cpu").model for f in (folder, straight.folder))
    for (name, ours), theirs in zip(interrupted.state_dict().items(), uninterrupted.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)
    assert not (folder / "training").exists()


def test_accumulation_and_checkpointing_keep_the_losses(pictures, tiny_mllm, tmp_path):
    losses = []
    for number, memory_options in enumerate([{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}]):
        index = build_index(read_corpus(pictures), tmp_path / str(number), tiny_mllm)
        options = TrainOptions(max_steps=5, lora_rank=2, **memory_options)
        losses.append(train(index, options, device="cpu", show_progress=False).manifest.training["losses"])
    assert len(losses[0]) == 5
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)  # the step averages the means of two halves
    np.testing.assert_allclose(losses[2], losses[0], rtol=2e-3)


def test_indivisible_batch_size_is_refused(fresh_index):
    with pytest.raises(TrainingError, match="multiple of 3"):
        train(fresh_index, TrainOptions(max_steps=1, gradient_accumulation_steps=3), device="cpu", show_progress=False)


@pytest.mark.parametrize(
    ("mix", "words"), [("retrieve=8,dream=2", "dream"), ("retrieve=eight", "eight"), ("memorise=3", "no retrieve")]
)
def test_invalid_mix_is_refused(mix, words):
    assert read_mix("retrieve=8, memorise=3") == {"retrieve": 8, "memorise": 3}
    with pytest.raises(TrainingError, match=words):
        read_mix(mix)


def test_diverged_run_stops_and_leaves_no_checkpoint(fresh_index):
    options = TrainOptions(max_steps=60, lora_rank=2, learning_rate=1e30, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"within (12|24) of 60 steps: lower the learning rate"):
        train(fresh_index, options, device="cpu", show_progress=False)
    assert not load_index(fresh_index.folder).is_trained
    assert list(fresh_index.folder.glob("training/*")) == []


def test_untrained_index_has_no_trained_model(untrained_index):
    with pytest.raises(NotTrained, match="genret train"):
        load_trained(untrained_index, device="cpu")


def test_other_base_model_is_refused(trained_index, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ModelMismatch, match=r"weights of .*other"):
        load_base(trained_index, device="cpu", base=str(other))


def test_other_tokenizer_is_refused(trained_index, tiny_model_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    path = other / "tokenizer.json"
    grown = Tokenizer.from_file(str(path))
    grown.add_tokens(["another"])
    grown.save(str(path))
    with pytest.raises(ModelMismatch, match=r"tokenizer of .*other"):
        load_base(trained_index, device="cpu", base=str(other))


def test_moved_base_model_is_accepted(trained_index, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "moved")
    load_trained(trained_index, device="cpu", base=str(tmp_path / "moved"))


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_mllm(str(tmp_path), device="cpu")


def test_exported_checkpoint_scores_like_the_index(trained_index, trained_mllm, tmp_path):
    exported = load_mllm(str(export_checkpoint(trained_index, tmp_path / "checkpoint")), device="cpu")
    ids = trained_index.tokenizer.encode_markup("<g0_1><g1_0> a red circle")
    assert exported.processor.tokenizer("<g0_1><g1_0> a red circle", add_special_tokens=False).input_ids == ids
    prompts = [Prompt(tuple(ids)), Prompt((5, 60))]
    expected, found = (
        recall(TransformersScorer(mllm), trained_index.trie, prompts, SearchOptions(k=20))
        for mllm in (trained_mllm, exported)
    )
    for ours, theirs in zip(expected, found, strict=True):
        assert [hit.leaf for hit in ours.hits] == [hit.leaf for hit in theirs.hits]
        np.testing.assert_allclose([h.log_prob for h in ours.hits], [h.log_prob for h in theirs.hits], atol=1e-4)
    assert fingerprint(exported.model) == fingerprint(trained_mllm.model)


def test_export_refuses_a_nonempty_folder(trained_index, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ModelError, match="not empty"):
        export_checkpoint(trained_index, tmp_path)
    assert [p.name for p in Path(tmp_path).iterdir()] == ["mine"]
