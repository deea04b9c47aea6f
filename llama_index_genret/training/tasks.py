"""The training tasks as text, and their interleaving.

    memorise    image -> identifier
    retrieve    query -> identifier
    describe    identifier -> caption
    answer      image, question -> answer; several images as well, and a question that names another image
    imitate     query -> the text teacher's distribution over images

Depends on the index; independent of torch. Example `i` is a function of the seed and `i` alone, so that a resumed run
and any number of processes read the same stream.

Source: memorise and retrieve are the two tasks of GRACE (arXiv:2402.10805), mixed in every batch rather than phased.
describe and answer preserve the model's ability to describe an image from its identifier or its pixels. The share of
answer examples with a wrong name teaches the model to look: the name alone would otherwise give the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.corpus import Record
from llama_index_genret.errors import TrainingError
from llama_index_genret.store import Index

Task = Literal["memorise", "retrieve", "describe", "answer", "imitate"]

CARRIERS = ("a picture of {}", "find {}", "what is the {} like?", "image: {}")
"""Query templates for a caption, used beside the caption itself. One is a question, because `genret ask` sends some."""

MIX: dict[Task, int] = {"retrieve": 8, "memorise": 3, "describe": 1, "answer": 8, "imitate": 20}
"""Number of examples of each task in a block. Tasks without examples are left out. The order seeds the shuffles."""

MOST_IMAGES = 3
"""Largest number of images in an answer example."""

SEVERAL_IMAGES = 1 / 3
"""Share of the answer examples with 2 to MOST_IMAGES images, as a query engine shows several hits."""

MISNAMED = 1 / 4
"""Share of the other answer examples whose question names another image, if it names one at all."""

NAME_ANYWHERE = 1 / 2
"""Share of the examples with several images, one of them named, in which it has a random place. Else it is first."""

_CANDIDATES = 8
"""Number of random images from which the others are chosen. Those that the question names are left out."""


@dataclass(frozen=True)
class Example:
    """One input and its target.

    row: row of the record; for imitate, the number of the teacher's query.
    text: the variable text of the prompt, empty for memorise and describe.
    target: the target text, None for the identifier.
    version: version of the image to memorise, 0 for the original, others from `augmentation.load_version`.
    """

    task: Task
    row: int
    text: str
    target: str | None
    version: int = 0


@dataclass(frozen=True)
class ShownQuestion:
    """A question, and the rows of the images before it in the prompt, in order."""

    text: str
    rows: tuple[int, ...]


def show_question(example: Example, records: Sequence[Record], *seed: int) -> ShownQuestion:
    """Return the question and the images of an answer example: with other images, with another name, or as they are.

    A question names an image if it has one of its captions in it, word by word. With several images, a question that
    names none is about the first one, as a query engine shows the best hit first.

    Args:
        seed: the seed of all draws, and the number of the example.
    """
    rng = np.random.default_rng(seed)
    name = _name_in(example.text, records[example.row])
    drawn = rng.choice(len(records), min(len(records), _CANDIDATES), replace=False).tolist()
    others = [row for row in drawn if row != example.row and not _name_in(example.text, records[row])]
    if others and rng.random() < SEVERAL_IMAGES:
        rows = others[: int(rng.integers(1, MOST_IMAGES))]
        anywhere = bool(name) and rng.random() < NAME_ANYWHERE
        rows.insert(int(rng.integers(len(rows) + 1)) if anywhere else 0, example.row)
        return ShownQuestion(example.text, tuple(rows))
    other_names = [records[row].captions[0] for row in others if records[row].captions]
    if name and other_names and rng.random() < MISNAMED:
        return ShownQuestion(example.text.replace(name, other_names[0]), (example.row,))
    return ShownQuestion(example.text, (example.row,))


def _name_in(question: str, record: Record) -> str:
    """Return the part of the question that is a caption of the image, "" if there is none."""
    found = (re.search(rf"(?<!\w){re.escape(caption)}(?!\w)", question, re.IGNORECASE) for caption in record.captions)
    return max((match.group() for match in found if match), key=len, default="")


def examples_of(index: Index, imitated: Sequence[str] = (), *, redrawn: int = 0) -> dict[Task, list[Example]]:
    """Return all examples of every task that the records support, in the order of the records.

    Args:
        imitated: queries of the text teacher.
        redrawn: additional versions of each image to memorise.
    Raises:
        TrainingError: no record has a caption or a pseudo-query, so that there is no example query -> identifier.
    """
    tasks: dict[Task, list[Example]] = {task: [] for task in MIX}
    for row, record in enumerate(index.records):
        tasks["memorise"] += [Example("memorise", row, "", None, version) for version in range(1 + redrawn)]
        for place, caption in enumerate(record.captions):
            carriers = ["{}", *(CARRIERS[(row + place + step) % len(CARRIERS)] for step in (0, 1))]
            queries = [carrier.replace("{}", caption) for carrier in carriers]
            tasks["retrieve"] += [Example("retrieve", row, query, None) for query in queries]
            tasks["describe"].append(Example("describe", row, "", caption))
        tasks["retrieve"] += [Example("retrieve", row, q.text, None) for q in index.pseudo_queries_of(record)]
        for question, answer in _questions(record):
            tasks["answer"].append(Example("answer", row, question, answer))
    if not tasks["retrieve"]:
        raise TrainingError(
            f"no image of {index.folder} has a caption, and training needs queries for the images. "
            "Give captions in metadata.jsonl ('text') and index again, or let the model write queries: "
            f"`genret write-queries {index.folder}`."
        )
    tasks["imitate"] = [Example("imitate", number, query, None) for number, query in enumerate(imitated)]
    return {task: examples for task, examples in tasks.items() if examples}


def _questions(record: Record) -> list[tuple[str, str]]:
    """Return the record's questions with their answers, or a question that its first caption answers."""
    if record.questions:
        return [(q.question, q.answer) for q in record.questions]
    return [("What is in the picture?", record.captions[0])] if record.captions else []


class InterleavedExamples(Sequence[Example]):
    """A stream of examples in blocks of sum(mix), in which each task has its share. Each task is shuffled per epoch.

        for block: tasks = shuffle(mix); for task in tasks: next example of that task's current shuffle

    Args:
        tasks: all examples of each task.
        n_examples: length of the stream.
        seed: seed of all shuffles.
        mix: number of examples of each task in a block.
    """

    def __init__(
        self, tasks: Mapping[Task, list[Example]], n_examples: int, *, seed: int, mix: Mapping[Task, int] = MIX
    ) -> None:
        self._tasks = tasks
        self._n_examples = n_examples
        self._seed = seed
        self._block = [task for task in MIX for _ in range(mix.get(task, 0)) if task in tasks]

    def __len__(self) -> int:
        return self._n_examples

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # Sequence's overloads: only int is used
        if not 0 <= i < self._n_examples:
            raise IndexError(i)
        block, place = divmod(i, len(self._block))
        order = _permutation(len(self._block), self._seed, 0, block)
        task = self._block[order[place]]
        earlier = sum(self._block[j] == task for j in order[:place])
        epoch, position = divmod(block * self._block.count(task) + earlier, len(self._tasks[task]))
        shuffle = _permutation(len(self._tasks[task]), self._seed, 1 + list(MIX).index(task), epoch)
        return self._tasks[task][int(shuffle[position])]


def read_mix(text: str) -> dict[Task, int]:
    """Parse the number of examples of each task in a block: `retrieve=8,memorise=3`. Other tasks get none.

    Raises:
        TrainingError: a task or number is invalid, or the mix has no retrieve examples.
    """
    mix: dict[Task, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        task = next((task for task in MIX if task == name), None)
        if task is None or not number.isdecimal():
            raise TrainingError(f"mix {text!r}: expected task=number with a task of {', '.join(MIX)}, got {part!r}.")
        mix[task] = int(number)
    if not mix.get("retrieve"):
        raise TrainingError(
            f"mix {text!r} has no retrieve: add retrieve=1 or more, without which the model learns no queries."
        )
    return mix


def epoch_length(tasks: Mapping[Task, list[Example]], mix: Mapping[Task, int] = MIX) -> int:
    """Return the number of interleaved examples in which every retrieve example occurs once."""
    block = sum(mix.get(task, 0) for task in tasks)
    return int(np.ceil(len(tasks["retrieve"]) * block / mix["retrieve"]))


@lru_cache(maxsize=16)
def _permutation(n: int, *seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(n)
