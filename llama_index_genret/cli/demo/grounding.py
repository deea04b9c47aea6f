"""Answers end to end: a question recalls images, and the same model answers from them or from another image.

Depends on LlamaIndex's engine around a retriever and an LLM; independent of training and of where the model runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.llms import LLM
from llama_index.core.schema import NodeWithScore, QueryBundle

from llama_index_genret.corpus import Record
from llama_index_genret.errors import QueryError
from llama_index_genret.llamaindex.nodes import node_of
from llama_index_genret.llamaindex.query_engine import image_query_engine
from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class AnswerCase:
    """A question about one image, and another image that has another answer to it.

    kind: what the question is about. split: what is held out of the training, such as its wording.
    """

    question: str
    kind: str
    split: str
    record: Record
    answer: str
    other: Record
    other_answer: str


@dataclass(frozen=True)
class Grounding:
    """The results of one case.

    recalled: whether the image of the question was recalled first.
    right: whether the answer was right, by the number of recalled images that the model saw.
    follows: whether the answer was that of the other image, when the model saw it alone.
    """

    case: AnswerCase
    recalled: bool
    right: Mapping[int, bool]
    follows: bool


@dataclass(frozen=True)
class GroundingRates:
    """The shares of `n` cases, in [0, 1]. See `Grounding`."""

    n: int
    recalled: float
    right: Mapping[int, float]
    follows: float


def read_cases(path: Path, records: Sequence[Record]) -> list[AnswerCase]:
    """Read the lines of a file like the demo's `grounding.jsonl`.

    Raises:
        QueryError: a line names an image that is not among the records.
    """
    by_name = {record.file_name: record for record in records}
    cases = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = json.loads(line)
        names = fields.pop("file_name"), fields.pop("other_file_name")
        if missing := [name for name in names if name not in by_name]:
            raise QueryError(f"{path}:{number}: the index has no image {missing[0]!r}. Use the index of these images.")
        cases.append(AnswerCase(**fields, record=by_name[names[0]], other=by_name[names[1]]))
    return cases


def answer_cases(
    retriever: GenerativeImageRetriever,
    llm: LLM,
    cases: Sequence[AnswerCase],
    *,
    images: Sequence[int] = (1, 3),
    progress: Progress = iter,
) -> list[Grounding]:
    """Put each question to the query engine, once with each number of recalled images and once with the other image.

    Args:
        retriever: recalls at least `max(images)` images.
        llm: answers from them.
        images: numbers of images that the model sees, the values of `similarity_top_k`. Default 1 and 3.
    Raises:
        QueryError: the retriever recalls too few images.
    """
    if max(images) > retriever.similarity_top_k:
        raise QueryError(
            f"images={tuple(images)} needs a retriever with similarity_top_k={max(images)} or more, and it has "
            f"{retriever.similarity_top_k}."
        )
    engine = image_query_engine(retriever, llm)

    def answer_from(case: AnswerCase, nodes: list[NodeWithScore]) -> str:
        return str(engine.synthesize(QueryBundle(case.question), nodes))

    results = []
    for case in progress(cases):
        nodes = engine.retrieve(QueryBundle(case.question))
        other = [NodeWithScore(node=node_of(case.other), score=1.0)]
        results.append(
            Grounding(
                case,
                recalled=nodes[0].node.node_id == case.record.image_id,
                right={n: same_answer(answer_from(case, nodes[:n]), case.answer) for n in images},
                follows=same_answer(answer_from(case, other), case.other_answer),
            )
        )
    return results


def grounding_rates(results: Sequence[Grounding]) -> GroundingRates:
    """Return the shares over at least one result."""
    return GroundingRates(
        n=len(results),
        recalled=float(np.mean([result.recalled for result in results])),
        right={n: float(np.mean([result.right[n] for result in results])) for n in results[0].right},
        follows=float(np.mean([result.follows for result in results])),
    )


def same_answer(answer: str, wanted: str) -> bool:
    """Return whether two answers have the same words, ignoring case and punctuation."""
    return _plain(answer) == _plain(wanted)


def _plain(text: str) -> str:
    return re.sub(r"[^\w ]", "", text.lower()).strip()
