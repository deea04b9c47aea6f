"""Checkpoints that survive a killed process or a full disk: a run resumes from the last complete one.

    INDEX/training/<run>/checkpoint-40               written by Hugging Face's `Trainer`
    INDEX/training/<run>/checkpoint-60.unfinished    present while checkpoint-60 is written

Depends on the Trainer and files; independent of indexes and losses.
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

_TORCH_SAVE_ERRORS = ("inline_container", "iostream", "PytorchStreamWriter")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def last_whole_checkpoint(work: Path) -> Path | None:
    """Return the complete checkpoint of the latest step, or None."""
    whole = {step: path for step, path in _checkpoints(work).items() if not _unfinished(path).exists()}
    return whole[max(whole)] if whole else None


def discard(work: Path) -> None:
    """Remove the checkpoints of a complete run. A kill during the removal leaves nothing that a run would resume."""
    removed = work.with_name(f"{work.name}.done")
    shutil.rmtree(removed, ignore_errors=True)
    work.rename(removed)
    shutil.rmtree(removed.parent)


class CheckpointedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """A Trainer that keeps a complete checkpoint until the next one is on the disk, and the best one until the end.

    Needs save_total_limit=None.
    """

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
                _remove_all_but(checkpoint, work / f"checkpoint-{self.state.best_global_step}")
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises a RuntimeError on a full disk
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_SAVE_ERRORS):
                raise
            raise NotWritten(
                f"the checkpoint {checkpoint} could not be written: {error}. The index is unchanged. Free disk "
                "space, and run the command again: it resumes from the previous checkpoint."
            ) from error


def _checkpoints(work: Path) -> dict[int, Path]:
    matches = [(_CHECKPOINT.fullmatch(path.name), path) for path in work.iterdir()] if work.is_dir() else []
    return {int(match[1]): path for match, path in matches if match}


def _unfinished(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.unfinished")


def _remove_all_but(checkpoint: Path, best: Path) -> None:
    for path in _checkpoints(checkpoint.parent).values():
        if path not in (checkpoint, best):
            _unfinished(path).touch()  # after a kill during the removal, the rest does not count as a checkpoint
            shutil.rmtree(path)
            _unfinished(path).unlink()
