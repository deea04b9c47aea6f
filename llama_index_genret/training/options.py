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

    epochs: passes over the retrieve examples, in an update over those of the new images; max_steps overrides it.
    batch_size: examples a step, over all processes; gradient_accumulation_steps: parts in which each process computes
        its share, one after another. gradient_checkpointing: keep no activations of the layers, but compute them
        again: less memory, for one more forward pass.
    learning_rate: of the LoRA matrices and the connector; symbol_learning_rate: of the new symbols' rows.
    layers: how many of the language model's last layers are trained, all if not given. With the identifiers of
        `atomic` the others then cost a forward pass only.
    mix: examples of each task in a block, see `examples.MIX`.
    redrawn: more versions of each picture to memorise, in other styles, see `redrawing`: for image queries that show
        the same thing, but not the same picture.
    teacher_temperature: of the distribution over images that the task `imitate` learns from the index's encoder.
    imitated: more queries to imitate it on, beside captions, words of the model's vocabulary and lists of those.
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

    def __post_init__(self) -> None:
        """Raise TrainingError for a value out of range."""
        if not 0 < self.epochs < inf:
            raise TrainingError(f"epochs={self.epochs} must be greater than 0 and finite.")
        for name in ("learning_rate", "symbol_learning_rate"):
            if not 0 <= getattr(self, name) < inf:
                raise TrainingError(f"{name}={getattr(self, name)} must be at least 0 and finite.")
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
