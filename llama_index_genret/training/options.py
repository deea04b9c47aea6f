"""Options of a training run.

Depends on names and numbers; independent of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from llama_index_genret.errors import TrainingError
from llama_index_genret.training.tasks import MIX, Task

LARGEST_RANK = 4096
"""Maximum rank of LoRA matrices: the number of hidden features of a large model."""
LONGEST_BLOCK = 100_000
"""Maximum number of examples in a block, which are shuffled together."""


@dataclass(frozen=True)
class TrainOptions:
    """The options of a run. A changed option makes another run, which does not resume these checkpoints.

    epochs: passes over the retrieve examples; an update counts those of the new images. max_steps overrides it.
    max_steps: number of optimizer steps, derived from `epochs` by default.
    batch_size: examples per step, over all processes.
    gradient_accumulation_steps: forward passes per step in each process.
    gradient_checkpointing: recompute the activations of the layers. It saves memory and costs one more forward pass.
    learning_rate: learning rate of the LoRA matrices and the connector.
    symbol_learning_rate: learning rate of the new symbols' rows.
    lora_rank: rank of the LoRA matrices.
    checkpoint_every: steps between checkpoints.
    seed: seed of the example order, the initial values and the sampling, from 0 to 2**32 - 1.
    layers: number of the language model's last layers to train, all by default. With the scheme `atomic` the other
        layers then need no backward pass.
    mix: number of examples of each task in a block, see `tasks.MIX`.
    redrawn: additional versions of each image to memorise, in other styles, see `augmentation`. They help image
        queries that show the same object in another image.
    teacher_temperature: temperature of the distribution over images that `imitate` distils from the index's encoder.
    imitated: additional queries for the task imitate, beside captions, words of the model's vocabulary and keyword
        lists.
    minutes: budget of wall time from the first step to the last, with evaluations and checkpoints. The learning rate
        then follows the clock, and reaches 0 at the end. Default None: no limit.
    patience: number of evaluations on validation queries, of 8 in a run, without a rise of recall before the run ends.
        A run that trains answers to the records' questions does not end early.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 20
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = 2e-3
    symbol_learning_rate: float = 1e-2
    lora_rank: int = 32
    checkpoint_every: int = 100
    seed: int = 0
    layers: int | None = None
    mix: Mapping[Task, int] = field(default_factory=lambda: dict(MIX))
    redrawn: int = 0
    teacher_temperature: float = 0.05
    imitated: tuple[str, ...] = ()
    minutes: float | None = None
    patience: int = 3

    def __post_init__(self) -> None:
        """Raise TrainingError for a value out of range."""
        if not 0 < self.epochs < inf:
            raise TrainingError(f"epochs={self.epochs} must be greater than 0 and finite.")
        for name in ("learning_rate", "symbol_learning_rate"):
            if not 0 <= getattr(self, name) < inf:
                raise TrainingError(f"{name}={getattr(self, name)} must be at least 0 and finite.")
        if self.minutes is not None and not 0 < self.minutes < inf:
            raise TrainingError(f"minutes={self.minutes} must be greater than 0 and finite.")
        if self.patience < 1:
            raise TrainingError(f"patience={self.patience} must be at least 1.")
        if not 1 <= self.lora_rank <= LARGEST_RANK:
            raise TrainingError(f"lora_rank={self.lora_rank} must be from 1 to {LARGEST_RANK}.")
        if sum(self.mix.values()) > LONGEST_BLOCK:
            raise TrainingError(
                f"the mix {dict(self.mix)} has more than {LONGEST_BLOCK} examples: use smaller numbers of equal ratio."
            )
        if self.redrawn < 0:
            raise TrainingError(f"redrawn={self.redrawn} must be at least 0.")
        if self.redrawn and not self.mix.get("memorise"):
            raise TrainingError(
                f"redrawn={self.redrawn} redraws images for the task `memorise`, which the mix lacks: "
                "add it (--mix memorise=...), or leave --redrawn out."
            )
        if not 0 <= self.seed < 2**32:
            raise TrainingError(f"seed={self.seed} must be from 0 to {2**32 - 1}.")
