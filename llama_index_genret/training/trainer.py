"""The loss at the targets of a batch, and the Trainer that takes it, with a progress bar.

Depends on Hugging Face's Trainer and collated batches; independent of indexes and options.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from llama_index_genret.training.checkpoints import CheckpointedTrainer
from llama_index_genret.training.collator import IGNORED


class LabelTrainer(CheckpointedTrainer):
    """Computes the LM head at the positions of the targets only, which stand at the right edge of a batch.

    Args:
        symbols: (u,) the token ids of identifiers, which the columns of soft targets stand for.
        show_progress: whether a bar with the loss is drawn on stderr.
    """

    def __init__(self, symbols: torch.Tensor, *, show_progress: bool, **others: Any) -> None:
        super().__init__(**others)
        self._symbols = symbols
        for callback in (ProgressCallback, PrinterCallback):  # they write the losses to stdout
            self.remove_callback(callback)
        self.add_callback(_Stop())
        if show_progress:
            self.add_callback(_Bar())

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Return the mean loss over the targets of all processes; overrides the Trainer's."""
        parts = [summed_loss(model, dict(part), self._symbols) for part in inputs.values()]
        loss = torch.stack([part for part, _ in parts]).sum()
        n_targets = torch.tensor(float(sum(n_targets for _, n_targets in parts)), device=loss.device)
        loss = loss / self.accelerator.reduce(n_targets, reduction="mean")  # gradients are averaged over processes
        if self.accelerator.num_processes > 1:  # which each must have of every parameter, images or not
            loss = loss + 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return (loss, {}) if return_outputs else loss


def summed_loss(model: Any, inputs: dict[str, torch.Tensor], symbols: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the cross-entropy summed over the targets, and their number.

    A label's is taken over the vocabulary; a soft target's over the symbols that may stand there. Where some images
    are drawn more often than others, the logits are raised by that much first, so that they need not learn it.
    Source of this: logit adjustment of Menon et al. (arXiv:2007.07314).
    """
    labels, rows = inputs.pop("labels"), inputs.pop("soft_rows", None)
    offsets, soft = inputs.pop("offsets", None), inputs.pop("soft", None)
    drawn_rows, drawn_offsets, drawn = (inputs.pop(f"drawn{of}", None) for of in ("_rows", "_offsets", ""))
    positions = (labels != IGNORED).any(0).flip(0).nonzero().flatten() + 1
    reach = int(torch.cat([positions] + ([offsets] if offsets is not None else [])).max())
    logits = model(**inputs, logits_to_keep=reach, use_cache=False).logits
    if drawn_rows is not None and drawn_offsets is not None and drawn is not None:
        places = drawn_rows[:, None], reach - drawn_offsets[:, None], symbols.to(logits.device)[None]
        logits = logits.index_put(places, drawn.to(logits.dtype), accumulate=True)
    targets = labels[:, -reach:]
    known = targets != IGNORED
    loss = functional.cross_entropy(logits[known].float(), targets[known], reduction="sum")
    if rows is None or offsets is None or soft is None:
        return loss, int(known.sum())
    scores = logits[rows, reach - offsets][:, symbols.to(logits.device)].float()
    log_probs = scores.masked_fill(soft < 0, -torch.inf).log_softmax(-1)
    return loss - (soft.clamp(min=0) * log_probs.masked_fill(soft < 0, 0)).sum(), int(known.sum()) + len(rows)


class _Stop(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Ends a run whose loss is no number any more."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and not np.isfinite(float(logs.get("loss", 0.0))):
            control.should_training_stop = True


class _Bar(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """A progress bar on stderr, with the loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()
