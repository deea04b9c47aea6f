"""The examples of a whole run, in their order: of a training, or of an update.

Knows the index and the options; nothing of torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from llama_index_genret.errors import NotTrained, TrainingError
from llama_index_genret.store import Index
from llama_index_genret.training.examples import Example, Interleaved, Task, epoch_length, examples_of
from llama_index_genret.training.options import TrainOptions
from llama_index_genret.training.replay import Replayed, by_age
from llama_index_genret.training.teacher import Teacher

MORE_PASSES, SMALLER_STEPS = 5 / 3, 0.5
"""Of an update, beside the training below it."""


def added_rows(index: Index) -> list[int]:
    """Rows of the images that `genret train` has not seen, which an update is about.

    Raises:
        NotTrained: it was never run. TrainingError: there are none, or nobody noted which it has seen.
    """
    if not index.is_trained:
        raise NotTrained(f"{index.folder} has no trained weights to update: run `genret train {index.folder}` first.")
    added = index.unseen_rows(update=False)
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
    training = index.manifest.training or {}
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
    index: Index, options: TrainOptions, teacher: Teacher | None = None, new: Sequence[int] | None = None
) -> Sequence[Example]:
    """All tasks interleaved; of an update, its new images and the old ones in turns.

    Args:
        new: rows of the images that an update is about, None of a training.
    Raises:
        TrainingError: no image has a caption, or none of the new ones.
    """

    def interleaved(tasks: Mapping[Task, list[Example]], n_examples: int) -> Interleaved:
        return Interleaved(tasks, n_examples, seed=options.seed, mix=options.mix)

    def n_examples(tasks: Mapping[Task, list[Example]], times: int = 1) -> int:
        wanted = options.epochs * times * epoch_length(tasks, options.mix) / options.batch_size
        return options.batch_size * (options.max_steps or max(1, round(wanted)))

    tasks = examples_of(index, teacher.texts if teacher else (), redrawn=options.redrawn)
    if new is None:
        return interleaved(tasks, n_examples(tasks))
    ours, others = by_age(tasks, new, teacher.meant() if teacher else ())
    if "retrieve" not in ours:
        raise TrainingError(
            f"none of the {len(new)} images that were added to {index.folder} has a caption, so that nothing teaches "
            "which query means which of them. Give captions in metadata.jsonl ('text') and add them anew, or let the "
            f"model write queries: `genret write-queries {index.folder}`."
        )
    if not any(options.mix.get(task) for task in others):  # no old image is left
        return interleaved(ours, n_examples(ours))
    n = n_examples(ours, times=2)
    return Replayed(interleaved(ours, n - n // 2), interleaved(others, n // 2))
