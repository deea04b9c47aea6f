"""The end-to-end test of answers, with a retriever and a model whose answers are known."""

import json
from pathlib import Path

import pytest
from llama_index.core.base.llms.types import ImageBlock
from llama_index.core.llms import ChatMessage, ChatResponse, CompletionResponse, CustomLLM, LLMMetadata
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore

from integration.recall.answers import groups_of, recorded, table
from llama_index_genret.cli.demo.grounding import answer_cases, grounding_rates, read_cases, same_answer
from llama_index_genret.errors import QueryError
from llama_index_genret.llamaindex.nodes import node_of

LINES = [
    # question, split, right image, other image; answers are their colors
    ("red circle?", "wording", "red-circle.png", "blue-bar.png"),
    ("green bar, wrongly recalled?", "wording", "green-bar.png", "black-frame.png"),
    ("blue square, always red?", "image", "blue-square.png", "yellow-bar.png"),
]


class ByName(BaseRetriever):
    """Recalls the image whose caption the question starts with, then two others. "wrongly" swaps the first two."""

    similarity_top_k = 3

    def __init__(self, records):
        super().__init__()
        self.records = records

    def _retrieve(self, query_bundle):
        question = query_bundle.query_str
        backwards = self.records[::-1]
        ranked = sorted(backwards, key=lambda record: not question.startswith(record.captions[0]))[:3]
        if "wrongly" in question:
            ranked[:2] = ranked[1::-1]
        return [NodeWithScore(node=node_of(record), score=1.0) for record in ranked]


class MiddleColor(CustomLLM):
    """Answers with the color of the middle image that it sees. Says "Red!" where the question has "always red"."""

    @property
    def metadata(self):
        return LLMMetadata(is_chat_model=True, context_window=8192)

    def chat(self, messages, **kwargs):
        (message,) = messages
        shown = [Path(block.path).name for block in message.blocks if isinstance(block, ImageBlock)]
        text = (
            "Red!"
            if "always red" in message.blocks[-1].text
            else shown[len(shown) // 2].partition("-")[0].upper() + "."
        )
        return ChatResponse(message=ChatMessage(role="assistant", content=text))

    async def achat(self, messages, **kwargs):
        return self.chat(messages)

    def complete(self, prompt, formatted=False, **kwargs):
        return CompletionResponse(text="")

    def stream_complete(self, prompt, formatted=False, **kwargs):
        yield CompletionResponse(text="")


@pytest.fixture
def cases(untrained_index, tmp_path):
    lines = [
        {
            "question": question,
            "kind": "color",
            "split": split,
            "file_name": name,
            "answer": name.partition("-")[0],
            "other_file_name": other,
            "other_answer": other.partition("-")[0],
        }
        for question, split, name, other in LINES
    ]
    path = tmp_path / "grounding.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return read_cases(path, untrained_index.records)


@pytest.fixture
def results(untrained_index, cases):
    return answer_cases(ByName(untrained_index.records), MiddleColor(), cases, images=[1, 3])


def test_rates_count_recall_answers_and_swapped_images(results):
    """Of three images the model sees the second one, which is the right one where the recall was wrong."""
    assert [(one.recalled, one.right, one.follows) for one in results] == [
        (True, {1: True, 3: False}, True),
        (False, {1: False, 3: True}, True),
        (True, {1: False, 3: False}, False),
    ]
    rates = grounding_rates(results)
    assert (rates.n, rates.recalled, rates.follows) == pytest.approx((3, 2 / 3, 2 / 3))
    assert rates.right == pytest.approx({1: 1 / 3, 3: 1 / 3})


def test_table_has_splits_and_numbers_of_images(results):
    groups = groups_of(results)
    lines = table({title: grounding_rates(group) for title, group in groups.items()})
    assert lines[0].split() == ["n", "recalled", "1", "image", "3", "images", "swapped"]
    assert [line.split()[2:] for line in lines[1:]] == [
        ["2", "0.500", "0.500", "0.500", "1.000"],
        ["colors", "1", "1.000", "0.000", "0.000", "0.000"],
    ]
    assert recorded(groups["held-out wordings"])["right"] == {1: 0.5, 3: 0.5}


def test_retriever_of_too_few_images_is_refused(untrained_index, cases):
    with pytest.raises(QueryError, match="similarity_top_k=5 or more, and it has 3"):
        answer_cases(ByName(untrained_index.records), MiddleColor(), cases, images=[1, 5])


def test_case_about_an_unknown_image_is_refused(untrained_index, cases, tmp_path):
    with pytest.raises(QueryError, match=r"grounding\.jsonl:1: .*'red-circle\.png'"):
        read_cases(tmp_path / "grounding.jsonl", untrained_index.records[1:])


@pytest.mark.parametrize(("answer", "same"), [("Dog.", True), ("dog", True), ("a dog", False), ("", False)])
def test_answers_are_compared_by_their_words(answer, same):
    assert same_answer(answer, "dog") == same
