"""The order of all examples of a run, of a first training or of an update.

An update alternates new images with replayed old ones, so that the model does not forget the old ones.

Depends on the index and the options; independent of torch.
Source: experience replay, as DSI++ (arXiv:2212.09744) uses it to add documents to a generative retriever. There the
model generates queries for the old documents; here the old examples themselves are available.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import NotTrained, TrainingError
from llama_index_genret.store import Index
from llama_index_genret.store.model_state import unseen_rows
from llama_index_genret.training.options import TrainOptions
from llama_index_genret.training.tasks import Example, InterleavedExamples, Task, epoch_length, examples_of
from llama_index_genret.training.text_teacher import TextTeacher

MORE_PASSES, SMALLER_STEPS = 5 / 3, 0.5
"""Of an update, beside the training below it."""

FORMER_OPTIONS = {"accumulate": "gradient_accumulation_steps", "recompute": "gradient_checkpointing"}
"""Names of options in the manifests of earlier versions, and what they are called now."""


def added_rows(index: Index) -> list[int]:
    """Rows of the images that `genret train` has not seen, which an update is about.

    Raises:
        NotTrained: it was never run. TrainingError: there are none, or nobody noted which it has seen.
    """
    if not index.is_trained:
        raise NotTrained(f"{index.folder} has no trained weights to update: run `genret train {index.folder}` first.")
    added = unseen_rows(index, update=False)
    if added is None:
        raise TrainingError(
            f"{index.folder} was trained by a release that did not note on which images: run `genret train "
            f"{index.folder}` once more, without --update."
        )
    if not added:
        raise TrainingError(
            f"there is nothing to update: {index.folder} was trained on all of its {len(index.records)} images. "
            "Add some first, with `genret add`."
        )
    return added


def update_options(index: Index) -> TrainOptions:
    """Of an update, unless others are given: those of the training below it, with smaller steps and more passes.

    Where the training was of so many steps, the update takes as many for each image as it took, times `MORE_PASSES`.
    """
    training = {FORMER_OPTIONS.get(name, name): value for name, value in (index.manifest.training or {}).items()}
    names = {field.name for field in fields(TrainOptions)} & training.keys()
    options = TrainOptions(**{name: training[name] for name in names})
    options = replace(
        options,
        epochs=options.epochs * MORE_PASSES,
        learning_rate=options.learning_rate * SMALLER_STEPS,
        symbol_learning_rate=options.symbol_learning_rate * SMALLER_STEPS,
        imitated=tuple(options.imitated),
    )
    if options.max_steps is None:
        return options
    new = len(added_rows(index))
    share = 2 * new / max(1, len(index.records) - new)  # every other example is of an old image
    return replace(options, max_steps=max(1, round(options.max_steps * MORE_PASSES * share)))


def stream(
    index: Index, options: TrainOptions, teacher: TextTeacher | None = None, new: Sequence[int] | None = None
) -> Sequence[Example]:
    """All tasks interleaved; of an update, its new images and the old ones in turns.

    Args:
        new: rows of the images that an update is about, None of a training.
    Raises:
        TrainingError: no image has a caption, or none of the new ones.
    """

    def interleaved(tasks: Mapping[Task, list[Example]], n_examples: int) -> InterleavedExamples:
        return InterleavedExamples(tasks, n_examples, seed=options.seed, mix=options.mix)

    def n_examples(tasks: Mapping[Task, list[Example]], times: int = 1) -> int:
        wanted = options.epochs * times * epoch_length(tasks, options.mix) / options.batch_size
        return options.batch_size * (options.max_steps or max(1, round(wanted)))

    tasks = examples_of(index, teacher.texts if teacher else (), redrawn=options.redrawn)
    if new is None:
        return interleaved(tasks, n_examples(tasks))
    ours, others = by_age(tasks, new, teacher.nearest_images() if teacher else ())
    if "retrieve" not in ours:
        raise TrainingError(
            f"none of the {len(new)} images that were added to {index.folder} has a caption, so that nothing teaches "
            "which query means which of them. Give captions in metadata.jsonl ('text') and add them anew, or let the "
            f"model write queries: `genret write-queries {index.folder}`."
        )
    if not any(options.mix.get(task) for task in others):  # no old image is left
        return interleaved(ours, n_examples(ours))
    n = n_examples(ours, times=2)
    return ExperienceReplay(interleaved(ours, n - n // 2), interleaved(others, n // 2))


Tasks = dict[Task, list[Example]]


class ExperienceReplay(Sequence[Example]):
    """Every other example is of `new`, every other one of `old`, the first of `new`.

    Args:
        new: as many as old, or one more.
    """

    def __init__(self, new: Sequence[Example], old: Sequence[Example]) -> None:
        if len(new) - len(old) not in (0, 1):
            raise ValueError(f"{len(new)} new and {len(old)} old examples do not take turns.")
        self._halves = (new, old)

    def __len__(self) -> int:
        return sum(map(len, self._halves))

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # Sequence's overloads: only int is used
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._halves[i % 2][i // 2]


def replay_distribution(n_images: int, new: Collection[int]) -> NDArray[np.float64]:
    """(n_images,) how often each image is the one of an example of `ExperienceReplay`, of sum 1."""
    drawn = np.full(n_images, 0.5 / max(1, n_images - len(new)))
    drawn[list(new)] = 0.5 / len(new)
    return drawn


def by_age(tasks: Mapping[Task, list[Example]], new: Collection[int], meant: Sequence[int] = ()) -> tuple[Tasks, Tasks]:
    """The examples of new images and those of the others; of a query that a teacher answers, by what it means most.

    Args:
        new: rows of the new images. meant: (q,) the row of the image that each query of the teacher means most.
    """
    new = frozenset(new)

    def part(wanted: bool) -> Tasks:
        parted = {task: [e for e in examples if (_row(e, meant) in new) == wanted] for task, examples in tasks.items()}
        return {task: examples for task, examples in parted.items() if examples}

    return part(True), part(False)


def _row(example: Example, meant: Sequence[int]) -> int:
    return int(meant[example.row]) if example.task == "imitate" else example.row
