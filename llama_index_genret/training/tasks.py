"""The training tasks as text, and their interleaving.

Knows the index; nothing of torch. Example `i` is a function of the seed and `i` alone, so that a resumed run, and
any number of processes, see the same stream.

Source: memorise and retrieve are GRACE's two tasks (arXiv:2402.10805), mixed in every batch rather than phased;
describe and answer keep the model able to speak of the image behind a name, and of a picture. imitate: any query at
all, for which a teacher says how likely each image is meant. remember: the questions of answer, of a name in place of
the picture (closed-book answers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.corpus import Record
from llama_index_genret.errors import TrainingError
from llama_index_genret.store import Index

Task = Literal["memorise", "retrieve", "describe", "answer", "imitate", "remember"]

CARRIERS = ("a picture of {}", "find {}", "what is the {} like?", "image: {}")
"""How a caption is put as a query while training, beside the caption as it is. A question is a query too: that of
`genret ask`."""

MIX: dict[Task, int] = {"retrieve": 8, "memorise": 3, "describe": 1, "answer": 8, "imitate": 20, "remember": 0}
"""Examples of each task in a block; tasks without examples are left out. The order seeds the shuffles."""


@dataclass(frozen=True)
class Example:
    """One input and its target.

    row: of the record; for imitate, of the query among the teacher's. text: what fills the task's blank; empty for
    memorise, which has none, and for describe, which takes the identifier's tokens. target: None for the identifier.
    version: of the picture to memorise, 0 as it is, others as `redrawing` draws them.
    """

    task: Task
    row: int
    text: str
    target: str | None
    version: int = 0


def examples_of(index: Index, imitated: Sequence[str] = (), *, redrawn: int = 0) -> dict[Task, list[Example]]:
    """All examples of every task that the records allow, in the order of the records.

    Args:
        imitated: queries for which a teacher is imitated.
        redrawn: more versions of each picture to memorise.
    Raises:
        TrainingError: no record has a caption or a pseudo-query, so that nothing teaches query -> identifier.
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
            tasks["remember"].append(Example("remember", row, question, answer))
    if not tasks["retrieve"]:
        raise TrainingError(
            f"no image of {index.folder} has a caption, so nothing teaches which query means which image. "
            "Give captions in metadata.jsonl ('text') and index again, or let the model write queries: "
            f"`genret write-queries {index.folder}`."
        )
    tasks["imitate"] = [Example("imitate", number, query, None) for number, query in enumerate(imitated)]
    return {task: examples for task, examples in tasks.items() if examples}


def _questions(record: Record) -> list[tuple[str, str]]:
    """The record's own questions, or what its first caption answers."""
    if record.questions:
        return [(q.question, q.answer) for q in record.questions]
    return [("What is in the picture?", record.captions[0])] if record.captions else []


class InterleavedExamples(Sequence[Example]):
    """`n_examples` examples: every block of sum(mix) holds each task in its share, each task in its own shuffles.

    for block: tasks = shuffle(mix); for task in tasks: next example of that task's current shuffle
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
    """`retrieve=8,memorise=3`: how many examples of each task a block has; tasks that are not named have none.

    Raises:
        TrainingError: a task or number is none, or nothing is left to retrieve.
    """
    mix: dict[Task, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        task = next((task for task in MIX if task == name), None)
        if task is None or not number.isdecimal():
            raise TrainingError(f"mix {text!r}: want task=number of the tasks {', '.join(MIX)}, found {part!r}.")
        mix[task] = int(number)
    if not mix.get("retrieve"):
        raise TrainingError(f"mix {text!r} has no retrieve: at least one, or nothing is taught to be found.")
    return mix


def epoch_length(tasks: Mapping[Task, list[Example]], mix: Mapping[Task, int] = MIX) -> int:
    """Interleaved examples until every retrieve example was seen once."""
    block = sum(mix.get(task, 0) for task in tasks)
    return int(np.ceil(len(tasks["retrieve"]) * block / mix["retrieve"]))


@lru_cache(maxsize=16)
def _permutation(n: int, *seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(n)
