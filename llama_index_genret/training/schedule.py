"""The order of all examples of a training or an update.

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
"""Factors of an update: passes over its examples, and learning rates, relative to the training."""

FORMER_OPTIONS = {"accumulate": "gradient_accumulation_steps", "recompute": "gradient_checkpointing"}
"""Option names in the manifests of earlier versions, and the current names."""


def added_rows(index: Index) -> list[int]:
    """Return the rows of the images added since the training, which an update learns.

    Raises:
        NotTrained: the index has no trained weights.
        TrainingError: no image was added, or the index does not record the images of its training.
    """
    if not index.is_trained:
        raise NotTrained(f"{index.folder} has no trained weights to update: run `genret train {index.folder}` first.")
    added = unseen_rows(index, update=False)
    if added is None:
        raise TrainingError(
            f"{index.folder} was trained by a release that did not record its training images: run `genret train "
            f"{index.folder}` again, without --update."
        )
    if not added:
        raise TrainingError(
            f"there is nothing to update: {index.folder} was trained on all of its {len(index.records)} images. "
            "Add images first, with `genret add`."
        )
    return added


def update_options(index: Index) -> TrainOptions:
    """Return the default options of an update: those of the training, with smaller steps and more passes.

    If the training set `max_steps`, the update takes the same number of steps per image, times `MORE_PASSES`.
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
    """Return all examples with interleaved tasks. An update alternates new and old images.

    Args:
        new: rows of the images that an update learns, None for a training.
    Raises:
        TrainingError: no image has a caption, or none of the new images has one.
    """

    def interleaved(tasks: Mapping[Task, list[Example]], n_examples: int) -> InterleavedExamples:
        return InterleavedExamples(tasks, n_examples, seed=options.seed, mix=options.mix)

    def n_examples(tasks: Mapping[Task, list[Example]], times: int = 1) -> int:
        n_steps = options.epochs * times * epoch_length(tasks, options.mix) / options.batch_size
        return options.batch_size * (options.max_steps or max(1, round(n_steps)))

    tasks = examples_of(index, teacher.texts if teacher else (), redrawn=options.redrawn)
    if new is None:
        return interleaved(tasks, n_examples(tasks))
    new_tasks, old_tasks = by_age(tasks, new, teacher.nearest_images() if teacher else ())
    if "retrieve" not in new_tasks:
        raise TrainingError(
            f"none of the {len(new)} images that were added to {index.folder} has a caption, and training needs "
            "queries for them. Give captions in metadata.jsonl ('text') and add the images again, or let the model "
            f"write queries: `genret write-queries {index.folder}`."
        )
    if not any(options.mix.get(task) for task in old_tasks):  # no old image is left
        return interleaved(new_tasks, n_examples(new_tasks))
    n = n_examples(new_tasks, times=2)
    return ExperienceReplay(interleaved(new_tasks, n - n // 2), interleaved(old_tasks, n // 2))


Tasks = dict[Task, list[Example]]


class ExperienceReplay(Sequence[Example]):
    """Examples that alternate between `new` and `old`, starting with `new`.

    Args:
        new: as many examples as `old`, or one more.
        old: the replayed examples.
    """

    def __init__(self, new: Sequence[Example], old: Sequence[Example]) -> None:
        if len(new) - len(old) not in (0, 1):
            raise ValueError(
                f"{len(new)} new and {len(old)} old examples cannot alternate: expected equal numbers, or one more new."
            )
        self._halves = (new, old)

    def __len__(self) -> int:
        return sum(map(len, self._halves))

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # Sequence's overloads: only int is used
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._halves[i % 2][i // 2]


def replay_distribution(n_images: int, new: Collection[int]) -> NDArray[np.float64]:
    """Return (n_images,) the share of each image among the examples of `ExperienceReplay`, with sum 1."""
    shares = np.full(n_images, 0.5 / max(1, n_images - len(new)))
    shares[list(new)] = 0.5 / len(new)
    return shares


def by_age(
    tasks: Mapping[Task, list[Example]], new: Collection[int], nearest_images: Sequence[int] = ()
) -> tuple[Tasks, Tasks]:
    """Split the examples into those of new and of old images. An example of imitate counts by its nearest image.

    Args:
        new: rows of the new images.
        nearest_images: (q,) the row of the teacher's most probable image for each of its queries.
    """
    new = frozenset(new)

    def select(is_new: bool) -> Tasks:
        selected = {
            task: [example for example in examples if (_row(example, nearest_images) in new) == is_new]
            for task, examples in tasks.items()
        }
        return {task: examples for task, examples in selected.items() if examples}

    return select(True), select(False)


def _row(example: Example, nearest_images: Sequence[int]) -> int:
    return int(nearest_images[example.row]) if example.task == "imitate" else example.row
