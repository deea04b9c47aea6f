"""Validation of a run: held-out captions, recall while it trains, the best checkpoint, and early ends."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llama_index_genret.cli import app
from llama_index_genret.corpus import Question, read_corpus
from llama_index_genret.models.encoder import load_encoder
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.store import load_index, text_key
from llama_index_genret.store.build import build_index
from llama_index_genret.store.model_loading import load_base, load_trained
from llama_index_genret.store.model_state import adapter_folder
from llama_index_genret.store.queries import EvaluationQuery
from llama_index_genret.store.vectors import embed_records
from llama_index_genret.training import pace as pacing
from llama_index_genret.training import recipe
from llama_index_genret.training.feature_cache import cached_layers
from llama_index_genret.training.pace import EVALUATIONS, Pace, has_stalled
from llama_index_genret.training.recipe import TrainOptions, train
from llama_index_genret.training.validation import MOST_QUERIES, Validation, hold_out, recalled, without_captions

pytestmark = pytest.mark.torch

OPTIONS = TrainOptions(max_steps=16, batch_size=4, lora_rank=2, learning_rate=1e-2, checkpoint_every=4)
MADE_UP = ("a {}", "one {}", "my {}", "some {}", "{} here", "{} there", "{} now", "old {}", "new {}", "big {}")


def captioned(corpus):
    """Give each image eleven captions, so that a tenth of them can be held out."""
    records = [
        replace(record, captions=(*record.captions, *(form.format(record.captions[0]) for form in MADE_UP)))
        for record in corpus.records
    ]
    return replace(corpus, records=tuple(records))


@pytest.fixture(scope="module")
def index(pictures, tiny_mllm, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("validated") / "index"
    return build_index(captioned(read_corpus(pictures)), folder, tiny_mllm, encoder=load_encoder(encoder))


def copy_of(index, folder):
    return load_index(shutil.copytree(index.folder, folder / "index"))


def trained(index, options=OPTIONS, **others):
    return train(index, options, device="cpu", show_progress=False, **others)


def queries_of(index):
    return [EvaluationQuery(f"the {r.captions[0]}", frozenset([r.image_id])) for r in index.records]


def weights(index):
    return load_file(adapter_folder(index) / "adapter_model.safetensors")


def test_held_out_captions_leave_each_image_another_one(index):
    held_out = hold_out(index, range(20), seed=0)
    assert len(held_out) == 20  # at most one of an image
    assert len({query.image_ids for query in held_out}) == 20
    learned = without_captions(index, held_out)
    for full, record in zip(index.records, learned.records, strict=True):
        assert len(record.captions) == len(full.captions) - 1
    assert hold_out(index, range(20), seed=0) == held_out
    assert hold_out(index, range(20), seed=1) != held_out


def test_at_most_a_tenth_of_the_captions_is_held_out(index):
    few = replace(index, records=tuple(replace(r, captions=r.captions[:10]) for r in index.records))
    assert len(hold_out(few, range(20), seed=0)) == 20
    fewer = replace(index, records=tuple(replace(r, captions=r.captions[:9]) for r in index.records))
    assert hold_out(fewer, range(20), seed=0) == []  # 18 are too few
    many = [
        replace(index.records[0], image_id=str(n), captions=tuple(f"{n} {k}" for k in range(9))) for n in range(300)
    ]
    assert len(hold_out(replace(index, records=tuple(many)), range(300), seed=0)) == MOST_QUERIES


def test_caption_that_another_text_equals_is_not_held_out(index):
    again = tuple(f"{text}!".upper() for text in index.records[0].captions)
    records = (index.records[0], replace(index.records[1], captions=again), *index.records[2:])
    held_out = hold_out(replace(index, records=records), range(20), seed=0)
    images = {image_id for query in held_out for image_id in query.image_ids}
    assert images.isdisjoint({index.records[0].image_id, index.records[1].image_id})


def test_held_out_captions_appear_in_no_example(index, tmp_path, monkeypatch):
    """Record what the Trainer reads, the encoder's imitated texts included."""
    seen = []
    make = recipe._example_tensors

    def record(run, mllm, teachers):
        examples = make(run, mllm, teachers)
        seen.extend(examples._examples[i] for i in range(len(examples)))
        seen.append(teachers)
        return examples

    monkeypatch.setattr(recipe, "_example_tensors", record)
    words = hold_out(index, range(20), seed=0)
    options = replace(OPTIONS, max_steps=150, epochs=1, imitated=tuple(query.text.upper() for query in words))
    monkeypatch.setattr(recipe.LabelTrainer, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(copy_of(index, tmp_path), options)
    teachers = seen.pop()
    keys = {text_key(query.text) for query in words}
    assert {example.task for example in seen} >= {"retrieve", "describe", "imitate", "answer"}
    texts = [text for example in seen for text in (example.text, example.target) if text]
    assert keys.isdisjoint(map(text_key, [*texts, *teachers.text.texts]))
    assert len(teachers.text.texts) > 100


def test_vectors_of_validation_lack_the_held_out_captions(index, encoder):
    reader = load_encoder(encoder)
    validation = Validation.choose(index, None, None, seed=0)
    found = validation.vectors(reader)
    np.testing.assert_allclose(found, embed_records(reader, validation.learned.records), atol=2e-3)
    assert np.abs(found - np.asarray(index.vectors, np.float32)).max() > 0.01
    given = Validation.choose(index, queries_of(index), None, seed=0)
    np.testing.assert_array_equal(given.vectors(reader), np.asarray(index.vectors, np.float32))


def test_course_has_recall_of_model_and_encoder(index, tmp_path, encoder):
    lines = []
    result = trained(copy_of(index, tmp_path), replace(OPTIONS, patience=8), report=lines.append)
    course = result.manifest.training["validation"]
    assert [entry["step"] for entry in course] == list(range(2, 17, 2))
    assert len(course) == EVALUATIONS
    validation = Validation.choose(index, None, None, seed=0)
    expected = validation.encoder_recall(load_encoder(encoder), validation.vectors(load_encoder(encoder)))
    for entry in course:
        assert 0 <= entry["recall@1"] <= entry["recall@5"] <= 1
        assert {name: entry[name] for name in expected} == expected
    assert expected["encoder_recall@5"] > 0
    assert lines[0] == "The run is validated on 20 captions, which it does not learn."
    assert [line.partition(":")[0] for line in lines[1:]] == [f"step {step} of 16" for step in range(2, 17, 2)]
    assert "(encoder " in lines[1]


@pytest.mark.parametrize("scheme", ["structured", "atomic"])
def test_course_equals_recall_of_the_stored_weights(pictures, tiny_mllm, tmp_path, scheme):
    """Some layers are frozen and cached while the run is validated; the stored index has no cache."""
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, scheme=scheme)
    queries = queries_of(index)
    options = replace(OPTIONS, layers=1, learning_rate=3e-2, symbol_learning_rate=5e-2, patience=8, max_steps=40)
    result = trained(index, options, validation=queries)
    course = {entry["step"]: entry for entry in result.manifest.training["validation"]}
    best = course[result.manifest.training["stored_step"]]
    figures = recalled(result, TransformersScorer(load_trained(result, device="cpu")), queries).mean(0)
    np.testing.assert_allclose([best["recall@1"], best["recall@5"]], figures, atol=1e-6)
    assert len({entry["recall@5"] for entry in course.values()}) > 1


def test_frozen_layer_cache_keeps_search_results(index):
    """Identifiers of several symbols continue the KV cache of a prompt whose frozen layers were skipped."""
    queries = queries_of(index)
    mllm = load_base(index, device="cpu")
    plain = recalled(index, TransformersScorer(mllm), queries)
    with cached_layers(mllm.model.get_decoder(), 1):
        for _ in range(2):
            np.testing.assert_array_equal(recalled(index, TransformersScorer(mllm), queries), plain)
    assert 0 < plain.mean() < 1
    assert index.trie.depth > 1


def scripted(monkeypatch, values):
    """Let the evaluations of a run return these values, one after another."""
    left = iter(values)

    def recall(*_, **__):
        value = next(left)
        return {pacing.RECALL: value, "recall@1": value, "recall@5": value}

    monkeypatch.setattr(Validation, "model_recall", recall)


def test_best_checkpoint_wins_over_a_later_worse_one(index, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.5, 0.5, 0.2, 0.3, 0.2, 0.1, 0.1])
    kept, load = {}, recipe.LabelTrainer.load_best

    def keep(trainer):
        for folder in Path(trainer.args.output_dir).glob("checkpoint-*"):
            kept[folder.name] = load_file(folder / "adapter_model.safetensors")
        load(trainer)

    monkeypatch.setattr(recipe.LabelTrainer, "load_best", keep)
    result = trained(copy_of(index, tmp_path), replace(OPTIONS, patience=8))
    assert (result.manifest.training["steps"], result.manifest.training["stored_step"]) == (16, 6)  # the later of two
    assert kept.keys() == {"checkpoint-6", "checkpoint-16"}
    for name, tensor in weights(result).items():
        torch.testing.assert_close(tensor, kept["checkpoint-6"][name], msg=name)
    assert max((tensor - kept["checkpoint-16"][name]).abs().max() for name, tensor in weights(result).items()) > 1e-3


def test_run_ends_when_recall_no_longer_rises(index, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.5, 0.5, 0.2, 0.3, 0.9])
    lines = []
    result = trained(copy_of(index, tmp_path), report=lines.append)
    assert (result.manifest.training["steps"], result.manifest.training["stored_step"]) == (10, 6)
    assert lines[-1] == "The run ended at step 10 of 16: recall has not risen for 3 evaluations."
    assert len(result.manifest.training["validation"]) == 5


def test_run_with_questions_is_validated_to_its_end(index, tmp_path, monkeypatch):
    """Recall says nothing about the answers, so that it does not end the run."""
    scripted(monkeypatch, [0.5] * 8)
    quizzed = replace(index.records[0], questions=(Question("Which color?", "red"),))
    result = trained(replace(copy_of(index, tmp_path), records=(quizzed, *index.records[1:])))
    assert result.manifest.training["steps"] == 16
    assert len(result.manifest.training["validation"]) == 8


def test_stall_is_a_lack_of_rises_among_the_last_values():
    assert not has_stalled([0.5, 0.5, 0.5], 3)
    assert has_stalled([0.5, 0.5, 0.5, 0.4], 3)
    assert not has_stalled([0.5, 0.1, 0.1, 0.6], 3)
    assert has_stalled([0.5, 0.6, 0.1], 1)


def test_killed_validated_run_resumes_to_the_same_weights(index, tmp_path, monkeypatch):
    options = replace(OPTIONS, patience=4)  # ends at step 10 at the earliest, after the kill
    straight = trained(copy_of(index, tmp_path / "straight"), options)
    compute_loss, steps = recipe.LabelTrainer.compute_loss, iter(range(99))

    def compute_or_die(*arguments, **others):
        if next(steps) == 6:
            raise KeyboardInterrupt
        return compute_loss(*arguments, **others)

    interrupted = copy_of(index, tmp_path / "interrupted")
    with monkeypatch.context() as patched:
        patched.setattr(recipe.LabelTrainer, "compute_loss", compute_or_die)
        with pytest.raises(KeyboardInterrupt):
            trained(interrupted, options)
    resumed = trained(load_index(interrupted.folder), options)
    ours, theirs = resumed.manifest.training, straight.manifest.training
    assert (ours["resumed_at_step"] > 0, theirs["resumed_at_step"]) == (True, 0)
    assert ours["validation"] == theirs["validation"]
    assert (ours["steps"], ours["stored_step"]) == (theirs["steps"], theirs["stored_step"])
    for name, tensor in weights(resumed).items():
        torch.testing.assert_close(tensor, weights(straight)[name], rtol=1e-3, atol=1e-4, msg=name)


def test_index_with_one_caption_an_image_is_not_validated(pictures, tiny_mllm, tmp_path):
    lines = []
    index = build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm)
    result = trained(index, replace(OPTIONS, max_steps=2), report=lines.append)
    assert result.manifest.training["validation"] == []
    assert result.manifest.training["stored_step"] == 2
    assert [line.partition(",")[0] for line in lines] == ["The run is not validated"]


class Clock:
    """Seconds that pass at each reading."""

    def __init__(self, step_s):
        self.now, self.step_s = 0.0, step_s

    def __call__(self):
        self.now += self.step_s
        return self.now


def test_budget_of_minutes_ends_a_run(index, tmp_path, monkeypatch):
    """Each step reads the clock twice: 6 s a step, and 60 s for all."""
    monkeypatch.setattr(recipe, "Pace", lambda *a, **others: Pace(*a, **others, clock=Clock(3.0)))
    lines, rates = [], []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda o, *a: rates.append(o.param_groups[0]["lr"]) or step(o, *a))
    result = trained(
        copy_of(index, tmp_path), replace(OPTIONS, minutes=1.0, max_steps=1000, patience=8), report=lines.append
    )
    steps = result.manifest.training["steps"]
    assert steps == 9  # one more would be late
    assert lines[-1] == "The run ended at step 9 of 1000: the budget of 1 minutes is spent."
    assert result.manifest.training["validation"][-1]["step"] == 9
    assert max(rates) == pytest.approx(OPTIONS.learning_rate, rel=0.05)
    assert rates[-1] < 0.2 * OPTIONS.learning_rate
    assert result.manifest.training["final_loss"] > 0


def test_budget_that_suffices_changes_nothing(index, tmp_path):
    results = [
        trained(copy_of(index, tmp_path / str(minutes)), replace(OPTIONS, max_steps=4, minutes=minutes))
        for minutes in (None, 600.0)
    ]
    for name, tensor in weights(results[0]).items():
        torch.testing.assert_close(tensor, weights(results[1])[name], rtol=1e-3, atol=1e-4, msg=name)


def test_validation_file_from_the_command_line(index, tmp_path, capsys):
    copied = copy_of(index, tmp_path)
    file = tmp_path / "queries.jsonl"
    lines = [{"query": "reddish", "image_id": r.image_id} for r in index.records[:3]]
    file.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["train", copied.folder, "--max-steps", 2, "--validation", file, "--minutes", 60, "--device", "cpu"]
    app([*map(str, arguments), "--json"], standalone_mode=False)
    out, err = capsys.readouterr()
    training = json.loads(out)["training"]
    assert [entry["step"] for entry in training["validation"]] == [1, 2]
    assert training["minutes"] == 60
    assert "validated on 3 given queries" in err
    assert "step 2 of 2: recall@1" in err
