"""Checkpoints of a training that is killed, or finds the disk full: a run goes on from the last one that is whole.

    INDEX/training/<run>/checkpoint-40               of Hugging Face's `Trainer`
    INDEX/training/<run>/checkpoint-60.unfinished    while that one is written

Knows the Trainer and files; nothing of indexes or losses.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer

from llama_index_genret.errors import NotWritten
from llama_index_genret.files import make_folder, sync, sync_tree

_TORCH_SAVE = ("inline_container", "iostream", "PytorchStreamWriter")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def last_whole_checkpoint(work: Path) -> Path | None:
    """The checkpoint of the latest step whose writing has come to its end; None without any."""
    whole = {step: path for step, path in _checkpoints(work).items() if not _unfinished(path).exists()}
    return whole[max(whole)] if whole else None


def discard(work: Path) -> None:
    """Remove a run that is done. Killed in the midst of it, nothing is left that a run would go on from."""
    gone = work.with_name(f"{work.name}.done")
    shutil.rmtree(gone, ignore_errors=True)
    work.rename(gone)
    shutil.rmtree(gone.parent)


class CheckpointedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Keeps the last whole checkpoint until the next one has reached the disk. Needs save_total_limit=None."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        work = Path(self.args.output_dir)
        checkpoint = work / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                make_folder(work)
                _unfinished(checkpoint).touch()
                sync(work)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                sync_tree(checkpoint)
                _unfinished(checkpoint).unlink()
                sync(work)
                _remove_all_but(checkpoint)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save tells a full disk as a RuntimeError
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_SAVE):
                raise
            raise NotWritten(
                f"the checkpoint {checkpoint} could not be written: {error}. The index is as it was. Free space there, "
                "and run the command again: it goes on from the checkpoint before."
            ) from error


def _checkpoints(work: Path) -> dict[int, Path]:
    found = [(_CHECKPOINT.fullmatch(path.name), path) for path in work.iterdir()] if work.is_dir() else []
    return {int(match[1]): path for match, path in found if match}


def _unfinished(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.unfinished")


def _remove_all_but(checkpoint: Path) -> None:
    for path in _checkpoints(checkpoint.parent).values():
        if path != checkpoint:
            _unfinished(path).touch()  # killed in the midst of it, what is left is no checkpoint
            shutil.rmtree(path)
            _unfinished(path).unlink()
