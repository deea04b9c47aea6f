"""The examples of an update: new images are learned while old ones are heard again, so that they are not forgotten.

Knows examples; nothing of torch or of how either kind was chosen.
Source: experience replay, as DSI++ (arXiv:2212.09744) uses it to add documents to a generative retriever. There the
model makes up queries of the old documents; here the old examples themselves are at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.training.examples import Example, Task

Tasks = dict[Task, list[Example]]


class Replayed(Sequence[Example]):
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


def drawn_in_turns(n_images: int, new: Collection[int]) -> NDArray[np.float64]:
    """(n_images,) how often each image is the one of an example of `Replayed`, of sum 1."""
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
