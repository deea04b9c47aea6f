"""The recipe: what it learns from, that it learns, that it resumes, and what it leaves behind."""

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


def test_every_block_holds_each_task_in_its_share_and_every_pass_each_example_once(untrained_index):
    tasks = examples_of(untrained_index)
    stream = InterleavedExamples(tasks, 4000, seed=3)
    shares = {task: count for task, count in MIX.items() if task in tasks}
    block = sum(shares.values())
    for start in (0, 7 * block):
        assert Counter(stream[start + i].task for i in range(block)) == Counter(shares)
    retrieve = [e for e in stream if e.task == "retrieve"][: len(tasks["retrieve"])]
    assert set(retrieve) == set(tasks["retrieve"])


def test_an_example_depends_on_the_seed_and_its_number_alone(untrained_index):
    tasks = examples_of(untrained_index)
    short, long = InterleavedExamples(tasks, 100, seed=3), InterleavedExamples(tasks, 4000, seed=3)
    assert [short[i] for i in range(100)] == [long[i] for i in range(100)]
    assert [InterleavedExamples(tasks, 100, seed=4)[i] for i in range(100)] != list(short)


def test_an_index_without_captions_cannot_be_trained_and_says_why(pictures, tiny_mllm, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("red-circle.png", "blue-bar.png"):
        (bare / name).write_bytes((pictures / name).read_bytes())
    index = build_index(read_corpus(bare), tmp_path / "index", tiny_mllm, scheme="numeric")
    with pytest.raises(TrainingError, match=r"metadata\.jsonl"):
        train(index, TrainOptions(max_steps=1), device="cpu", show_progress=False)


def test_only_the_target_and_the_end_of_the_turn_are_learned(untrained_index, tiny_mllm):
    index = untrained_index
    tensors = ExampleTensors(index, tiny_mllm, InterleavedExamples(examples_of(index), 60, seed=0))
    for i in range(60):
        item, example = tensors[i], InterleavedExamples(examples_of(index), 60, seed=0)[i]
        target = [int(t) for t in item["labels"] if t != IGNORED]
        named = "".join(index.identifiers[example.row]) if example.target is None else example.target
        assert index.tokenizer.decode(target) == named + "<|im_end|>"
        assert ("pixel_values" in item) == (example.task in ("memorise", "answer"))


def test_what_is_trained_as_a_query_is_what_is_asked_as_one(untrained_index, tiny_mllm):
    index = untrained_index
    tensors = ExampleTensors(index, tiny_mllm, InterleavedExamples(examples_of(index), 60, seed=0))
    stream = InterleavedExamples(examples_of(index), 60, seed=0)
    i = next(i for i in range(60) if stream[i].task == "retrieve")
    prompt = index.prompts.for_query(index.tokenizer, stream[i].text)
    assert tensors[i]["input_ids"].tolist()[: len(prompt.token_ids)] == list(prompt.token_ids)


def test_the_loss_of_a_padded_batch_is_the_sum_of_the_losses_alone(fresh_index):
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


def test_cached_features_and_fast_rows_change_neither_loss_nor_gradients(fresh_index):
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


def test_training_teaches_the_training_captions(pictures, tiny_mllm, tmp_path):
    """Even the tiny model learns five images by heart in a minute."""
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


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been_killed(fresh_index, pictures, tiny_mllm, tmp_path):
    """The same command, killed after its second checkpoint and given again."""
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
        assert process.poll() is None, "it ended before it could be killed"
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


def test_a_step_in_parts_and_with_less_memory_is_the_same_step(pictures, tiny_mllm, tmp_path):
    losses = []
    for number, chosen in enumerate([{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}]):
        index = build_index(read_corpus(pictures), tmp_path / str(number), tiny_mllm)
        options = TrainOptions(max_steps=5, lora_rank=2, **chosen)
        losses.append(train(index, options, device="cpu", show_progress=False).manifest.training["losses"])
    assert len(losses[0]) == 5
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)  # of the means of two halves
    np.testing.assert_allclose(losses[2], losses[0], rtol=2e-3)


def test_a_batch_that_does_not_divide_into_parts_is_an_error(fresh_index):
    with pytest.raises(TrainingError, match="multiple of 3"):
        train(fresh_index, TrainOptions(max_steps=1, gradient_accumulation_steps=3), device="cpu", show_progress=False)


@pytest.mark.parametrize(
    ("mix", "named"), [("retrieve=8,dream=2", "dream"), ("retrieve=eight", "eight"), ("memorise=3", "no retrieve")]
)
def test_a_mix_that_makes_no_sense_is_an_error_that_names_it(mix, named):
    assert read_mix("retrieve=8, memorise=3") == {"retrieve": 8, "memorise": 3}
    with pytest.raises(TrainingError, match=named):
        read_mix(mix)


def test_a_run_that_diverges_ends_early_and_leaves_no_checkpoint_to_resume(fresh_index):
    options = TrainOptions(max_steps=60, lora_rank=2, learning_rate=1e30, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"within (12|24) of 60 steps: lower the learning rate"):
        train(fresh_index, options, device="cpu", show_progress=False)
    assert not load_index(fresh_index.folder).is_trained
    assert list(fresh_index.folder.glob("training/*")) == []


def test_an_untrained_index_has_no_model_to_recall_with(untrained_index):
    with pytest.raises(NotTrained, match="genret train"):
        load_trained(untrained_index, device="cpu")


def test_another_model_is_an_error_that_says_which_differs(trained_index, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ModelMismatch, match=r"weights of .*other"):
        load_base(trained_index, device="cpu", base=str(other))


def test_a_model_with_another_tokenizer_is_an_error_that_says_so(trained_index, tiny_model_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    path = other / "tokenizer.json"
    grown = Tokenizer.from_file(str(path))
    grown.add_tokens(["another"])
    grown.save(str(path))
    with pytest.raises(ModelMismatch, match=r"tokenizer of .*other"):
        load_base(trained_index, device="cpu", base=str(other))


def test_the_same_model_elsewhere_is_welcome(trained_index, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "moved")
    load_trained(trained_index, device="cpu", base=str(tmp_path / "moved"))


def test_a_folder_without_a_model_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_mllm(str(tmp_path), device="cpu")


def test_an_exported_checkpoint_scores_like_the_index(trained_index, trained_mllm, tmp_path):
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


def test_an_export_overwrites_nothing(trained_index, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ModelError, match="not empty"):
        export_checkpoint(trained_index, tmp_path)
    assert [p.name for p in Path(tmp_path).iterdir()] == ["mine"]
