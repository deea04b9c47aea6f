"""The progress of a run, by its steps and, with a budget, by the clock: learning rate, evaluations and end follow it.

    progress = max(step / steps, seconds spent / seconds of the budget)

With a budget of minutes, the cosine schedule thus ends when the time does, however fast the steps are. Without one the
progress depends on the step alone, so that a resumed run equals an uninterrupted one.

Depends on callbacks of Hugging Face's Trainer and on a clock; independent of models, indexes and losses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

EVALUATIONS = 8
"""Evaluations of a whole run."""

RECALL = "eval_recall"
"""Name of the validated metric in a log: the mean of recall@1 and recall@5."""


class Pace(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is untyped here
    """Evaluates a run `EVALUATIONS` times, and ends it at its last step, its last second, or when recall stops rising.

    The clock counts from the first step to the end, over all parts of a resumed run. Loading the model and embedding
    its queries come before. The budget keeps a reserve for one more step and the longest evaluation and checkpoint so
    far. Several processes use the mean of their clocks, so that they end at the same step.

    Args:
        steps: maximum number of steps.
        minutes: budget of wall time. Default None, no limit.
        evaluates: whether there are validation queries.
        patience: evaluations without a rise after which a run ends; None to never end early.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        steps: int,
        *,
        minutes: float | None,
        evaluates: bool,
        patience: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._minutes, self._clock = steps, minutes, clock
        self._evaluates, self._patience = evaluates, patience
        self._spent_s = self._longest_pause_s = self._longest_step_s = 0.0
        self._mark, self._progress, self._has_stepped = clock(), 0.0, False
        self.reason = ""

    @property
    def progress(self) -> float:
        """Return the share of the run that is done, from 0 to 1."""
        return min(1.0, self._progress)

    def factor(self, step: int) -> float:
        """Return the factor of the learning rates: a linear warm-up over 5 % of the run, then a cosine down to 0."""
        place, warmup = max(float(step), self.progress * self._steps), max(1, self._steps // 20)
        if place < warmup:
            return place / warmup
        done = (place - warmup) / max(1, self._steps - warmup)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))

    def state(self) -> dict[str, Any]:
        """Return the seconds that the run has spent, for its checkpoint."""
        return {"args": {}, "attributes": {"spent_s": self._spent_s}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Continue the clock of the checkpoint."""
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self._spent_s = float(saved["attributes"]["spent_s"]) if saved else 0.0
        self._progress = self._at(state.global_step)
        self._mark = self._clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the evaluation and the checkpoint since the last step."""
        pause_s = self._tick()
        if self._has_stepped:  # a resumed run skips examples before its first step
            self._longest_pause_s = max(self._longest_pause_s, pause_s)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate at each eighth of the run, and end it when the budget is spent."""
        self._longest_step_s, self._has_stepped = max(self._longest_step_s, self._tick()), True
        before, self._progress = self.progress, max(self._progress, self._at(state.global_step))
        if self._evaluates and math.floor(self.progress * EVALUATIONS) > math.floor(before * EVALUATIONS):
            control.should_evaluate = control.should_log = True
        if self.progress == 1.0 and state.global_step < self._steps:
            self.reason = f"the budget of {self._minutes:g} minutes is spent"
            control.should_training_stop = control.should_save = control.should_log = True
        self._stop_if_stalled(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the run when recall has stopped rising."""
        self._stop_if_stalled(state, control)

    def _stop_if_stalled(self, state: Any, control: Any) -> None:
        course = [entry[RECALL] for entry in state.log_history if RECALL in entry]
        if self._patience and has_stalled(course, self._patience) and self.progress < 1.0:
            self.reason = f"recall has not risen for {self._patience} evaluations"
            control.should_training_stop = True

    def _tick(self) -> float:
        now = self._clock()
        passed, self._mark = now - self._mark, now
        if self._minutes is not None and PartialState().num_processes > 1:
            seconds = torch.tensor(passed, dtype=torch.float32, device=PartialState().device)
            passed = float(reduce(seconds, reduction="mean"))
        self._spent_s += passed
        return passed

    def _at(self, step: int) -> float:
        by_steps = step / self._steps
        if self._minutes is None:
            return by_steps
        budget_s = 60.0 * self._minutes - self._longest_pause_s - self._longest_step_s
        return max(by_steps, self._spent_s / budget_s if budget_s > 0 else 1.0)


def has_stalled(course: Sequence[float], patience: int) -> bool:
    """Return whether none of the last `patience` values is higher than the best one before them."""
    earlier, last = course[:-patience], course[-patience:]
    return bool(earlier) and max(last) <= max(earlier)
