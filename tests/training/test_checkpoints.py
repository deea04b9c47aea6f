"""Training that is killed while it writes a checkpoint, runs out of disk space, or is started twice."""

import pytest
from transformers import Trainer

from llama_index_genret.corpus import read_corpus
from llama_index_genret.errors import IndexBusy, NotWritten
from llama_index_genret.files import only_writer
from llama_index_genret.store import load_index
from llama_index_genret.store.build import build_index
from llama_index_genret.training import recipe
from llama_index_genret.training.checkpoints import discard, last_whole_checkpoint
from llama_index_genret.training.recipe import TrainOptions, train
from tests.guarantees.test_files import files_of_at_most

pytestmark = pytest.mark.torch

OPTIONS = TrainOptions(max_steps=6, batch_size=2, lora_rank=2, checkpoint_every=2)


@pytest.fixture
def index(pictures, tiny_mllm, tmp_path):
    return build_index(read_corpus(pictures), tmp_path / "index", tiny_mllm, scheme="numeric")


def trained(index):
    return train(load_index(index.folder), OPTIONS, device="cpu", show_progress=False)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_incomplete_checkpoint_of_a_killed_run_is_not_resumed(index, monkeypatch, method):
    """Kill the run within the second checkpoint, after its weights are written."""
    steps, write = [], getattr(Trainer, method)

    def write_or_die(trainer, *arguments):
        steps.append(trainer.state.global_step)
        if len(steps) == 2:
            raise Killed
        write(trainer, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, method, write_or_die)
        with pytest.raises(Killed):
            trained(index)
    (work,) = (index.folder / "training").iterdir()
    assert (work / "checkpoint-4").is_dir()
    assert last_whole_checkpoint(work) == work / "checkpoint-2"
    assert trained(index).manifest.training["resumed_at_step"] == 2
    assert not (index.folder / "training").exists()


def test_partly_removed_checkpoint_is_not_resumed(tmp_path):
    work = tmp_path / "training" / "run"
    for name in ("checkpoint-2", "checkpoint-10"):
        (work / name).mkdir(parents=True)
    assert last_whole_checkpoint(work) == work / "checkpoint-10"
    (work / "checkpoint-10.unfinished").touch()
    assert last_whole_checkpoint(work) == work / "checkpoint-2"
    discard(work)
    assert last_whole_checkpoint(work) is None
    assert not (tmp_path / "training").exists()


def test_training_resumes_after_a_full_disk(index):
    with files_of_at_most(20_000), pytest.raises(NotWritten, match=r"checkpoint-2 could not be written.*resumes"):
        trained(index)
    assert not load_index(index.folder).is_trained
    assert trained(index).is_trained


def test_second_concurrent_training_is_refused(index):
    with only_writer(index.folder / recipe.LOCK, busy=""), pytest.raises(IndexBusy, match="another training of"):
        trained(index)
    assert trained(index).is_trained
