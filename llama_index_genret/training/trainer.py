"""The loss at the targets of a batch, and a Trainer with this loss, validation by recall and a progress bar.

Depends on Hugging Face's Trainer and collated batches; independent of indexes and options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from llama_index_genret.training.checkpoints import CheckpointedTrainer
from llama_index_genret.training.collator import IGNORED
from llama_index_genret.training.pace import RECALL, Pace


class LabelTrainer(CheckpointedTrainer):
    """A Trainer that computes the LM head only at the positions of the targets, at the right edge of a batch.

    Args:
        symbols: (u,) token ids of the columns of soft targets.
        pace: decides when to evaluate and when to end.
        validate: returns the figures of an evaluation, RECALL among them.
        report: receives one line for each evaluation.
        show_progress: draw a bar with the loss on stderr.
    """

    def __init__(
        self,
        symbols: torch.Tensor,
        *,
        pace: Pace,
        validate: Callable[[], dict[str, float]],
        report: Callable[[str], None],
        show_progress: bool,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self._symbols, self._validate, self._report = symbols, validate, report
        for callback in (ProgressCallback, PrinterCallback):  # they write the losses to stdout
            self.remove_callback(callback)
        self.add_callback(_StopAtNonFiniteLoss())
        self.add_callback(pace)
        if show_progress:
            self.add_callback(_Bar())

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Return the mean loss over the targets of all processes, in place of the Trainer's loss."""
        parts = [summed_loss(model, dict(part), self._symbols) for part in inputs.values()]
        loss = torch.stack([part for part, _ in parts]).sum()
        n_targets = torch.tensor(float(sum(n_targets for _, n_targets in parts)), device=loss.device)
        loss = loss / self.accelerator.reduce(n_targets, reduction="mean")  # gradients are averaged over processes
        if (
            self.accelerator.num_processes > 1
        ):  # each process needs a gradient of every parameter, with or without images
            loss = loss + 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return (loss, {}) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure recall on the validation queries, in place of the Trainer's loss on examples."""
        figures = self._validate()
        self.log(figures)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        if self.is_world_process_zero():
            self._report(f"step {self.state.global_step} of {self.args.max_steps}: {as_text(figures)}")
        return figures

    def load_best(self) -> None:
        """Load the weights of the evaluation with the highest recall, the latest of several."""
        if self.state.best_global_step and self.state.best_global_step != self.state.global_step:
            self._load_best_model()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Note the highest recall, the latest of several, and save its checkpoint."""
        is_best = self.state.best_metric is None or metrics[RECALL] >= self.state.best_metric
        if is_best:
            self.state.best_metric, self.state.best_global_step = metrics[RECALL], self.state.global_step
            self.control.should_save = True
        return is_best


def as_text(figures: dict[str, float]) -> str:
    """Return the figures of an evaluation in words."""
    names = ("recall@1", "recall@5")
    own = ", ".join(f"{name} {figures[name]:.3f}" for name in names)
    encoder = ", ".join(f"{figures[key]:.3f}" for name in names if (key := f"encoder_{name}") in figures)
    return f"{own} (encoder {encoder})" if encoder else own


def summed_loss(model: Any, inputs: dict[str, torch.Tensor], symbols: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the cross-entropy summed over the targets, and their number.

    Labels use the whole vocabulary, soft targets only the symbols that may follow. If images are sampled unevenly, the
    log ratios of their frequencies are added to the logits first, so that the model does not learn the frequencies.

    Args:
        inputs: one batch of `collator.collate`. Its targets are removed from the dictionary.
        symbols: (u,) token ids of the columns of soft targets.
    Source: logit adjustment of Menon et al. (arXiv:2007.07314).
    """
    labels, rows = inputs.pop("labels"), inputs.pop("soft_rows", None)
    offsets, soft = inputs.pop("offsets", None), inputs.pop("soft", None)
    adjustment_rows, adjustment_offsets, adjustment = (
        inputs.pop(f"adjustment{suffix}", None) for suffix in ("_rows", "_offsets", "")
    )
    positions = (labels != IGNORED).any(0).flip(0).nonzero().flatten() + 1
    reach = int(torch.cat([positions] + ([offsets] if offsets is not None else [])).max())
    logits = model(**inputs, logits_to_keep=reach, use_cache=False).logits
    if adjustment_rows is not None and adjustment_offsets is not None and adjustment is not None:
        places = adjustment_rows[:, None], reach - adjustment_offsets[:, None], symbols.to(logits.device)[None]
        logits = logits.index_put(places, adjustment.to(logits.dtype), accumulate=True)
    targets = labels[:, -reach:]
    known = targets != IGNORED
    loss = functional.cross_entropy(logits[known].float(), targets[known], reduction="sum")
    if rows is None or offsets is None or soft is None:
        return loss, int(known.sum())
    scores = logits[rows, reach - offsets][:, symbols.to(logits.device)].float()
    log_probs = scores.masked_fill(soft < 0, -torch.inf).log_softmax(-1)
    return loss - (soft.clamp(min=0) * log_probs.masked_fill(soft < 0, 0)).sum(), int(known.sum()) + len(rows)


class _StopAtNonFiniteLoss(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Stop a run whose loss is no longer finite."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and not np.isfinite(float(logs.get("loss", 0.0))):
            control.should_training_stop = True


class _Bar(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Draw a progress bar with the loss and the last recall on stderr."""

    _loss = _recall = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.3f}"
        if logs and RECALL in logs:
            self._recall = as_text(logs)
        self._bar.set_postfix_str(", ".join(part for part in (self._loss, self._recall) if part))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()
