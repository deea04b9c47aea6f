"""The answer examples: which images they show, what their questions name, and that recall shows images the same way."""

from dataclasses import replace

import pytest
import torch
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import NodeWithScore, QueryBundle

from llama_index_genret.corpus import Question
from llama_index_genret.llamaindex.llms import InProcessLLM
from llama_index_genret.llamaindex.nodes import node_of
from llama_index_genret.llamaindex.query_engine import image_query_engine
from llama_index_genret.llamaindex.retriever import GenerativeImageRetriever
from llama_index_genret.models.mllm import answer_prompt
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.training.collator import IGNORED, ExampleTensors, collate
from llama_index_genret.training.tasks import (
    MISNAMED,
    MOST_IMAGES,
    NAME_ANYWHERE,
    SEVERAL_IMAGES,
    Example,
    examples_of,
    show_question,
)

pytestmark = pytest.mark.torch

N = 2000
NAMING, PLAIN = "Which color is the Red circle?", "Which color is it?"


@pytest.fixture(scope="module")
def records(untrained_index):
    return untrained_index.records


def shown(records, text, n=N, *, seed=0):
    """Return the questions of `n` examples about the first image, the red circle."""
    assert records[0].captions == ("red circle",)
    example = Example("answer", 0, text, "red")
    return [show_question(example, records, seed, i) for i in range(n)]


def share(values):
    values = list(values)
    return sum(values) / len(values)


def test_questions_of_a_record_are_trained_in_their_wordings(untrained_index):
    wordings = ("Which color is it?", "which colour is the red circle?")
    record = replace(untrained_index.records[0], questions=tuple(Question(q, "red") for q in wordings))
    index = replace(untrained_index, records=(record, *untrained_index.records[1:]))
    answers = [example for example in examples_of(index)["answer"] if example.row == 0]
    assert [(example.text, example.target) for example in answers] == [(wording, "red") for wording in wordings]


@pytest.mark.parametrize("text", [NAMING, PLAIN])
def test_a_third_shows_two_or_three_different_images(records, text):
    questions = shown(records, text)
    counts = [len(question.rows) for question in questions]
    assert share(count > 1 for count in counts) == pytest.approx(SEVERAL_IMAGES, abs=0.03)
    assert share(count == MOST_IMAGES for count in counts) == pytest.approx(SEVERAL_IMAGES / 2, abs=0.03)
    assert all(0 in question.rows and len(set(question.rows)) == len(question.rows) for question in questions)
    assert {row for question in questions for row in question.rows} == set(range(len(records)))


def test_question_without_a_name_is_about_the_first_image(records):
    assert all(question.rows[0] == 0 and question.text == PLAIN for question in shown(records, PLAIN))


def test_named_image_has_any_place_among_several(records):
    several = [question for question in shown(records, NAMING) if len(question.rows) == MOST_IMAGES]
    assert all(question.text == NAMING for question in several)
    places = [question.rows.index(0) for question in several]
    for place in range(MOST_IMAGES):
        expected = NAME_ANYWHERE / MOST_IMAGES + (1 - NAME_ANYWHERE) * (place == 0)
        assert share(at == place for at in places) == pytest.approx(expected, abs=0.06)


def test_some_single_images_are_misnamed(records):
    single = [question.text for question in shown(records, NAMING) if len(question.rows) == 1]
    wrong = {text for text in single if text != NAMING}
    assert share(text != NAMING for text in single) == pytest.approx(MISNAMED, abs=0.03)
    assert wrong == {NAMING.replace("Red circle", record.captions[0]) for record in records[1:]}


def test_images_that_the_question_names_are_no_distractors(records):
    """With its caption in the question, another image would be as good an answer."""
    text = "Is it a red circle, or rather a red bar?"
    row = next(row for row, record in enumerate(records) if record.captions == ("red bar",))
    assert not any(row in question.rows for question in shown(records, text))
    partly = [record for record in records if record.captions[0] == "black bar"]
    assert [q.text for q in shown([*records[:1], *partly], "Is it a black barn?", 50) if len(q.rows) > 1]


def test_shown_question_depends_on_seed_and_number(records):
    assert shown(records, NAMING, 100) == shown(records, NAMING, 100)
    assert shown(records, NAMING, 100) != shown(records, NAMING, 100, seed=1)


def test_only_image_of_a_corpus_is_shown_alone(records):
    assert {question.rows for question in shown(records[:1], NAMING)} == {(0,)}
    assert {question.text for question in shown(records[:1], NAMING)} == {NAMING}


class Listening(InProcessLLM):
    """Keeps the messages of the last chat."""

    def chat(self, messages: list[ChatMessage], **kwargs):
        object.__setattr__(self, "heard", messages)
        return super().chat(messages, **kwargs)


@pytest.mark.parametrize("n_images", [1, 2, 3])
def test_training_and_query_engine_share_the_prompt(untrained_index, tiny_mllm, n_images):
    """The tokens and pixels of a training example are those that the engine's model reads, image by image."""
    index, example = untrained_index, Example("answer", 0, PLAIN, "red")
    i, question = next(
        (i, question) for i, question in enumerate(shown(index.records, PLAIN, 100)) if len(question.rows) == n_images
    )
    item = ExampleTensors(index, tiny_mllm, [example] * (i + 1))[i]
    llm = Listening(tiny_mllm, max_tokens=1)
    engine = image_query_engine(GenerativeImageRetriever(index, FakeScorer(index.tokenizer.vocab_size)), llm)
    nodes = [NodeWithScore(node=node_of(index.records[row]), score=1.0) for row in question.rows]
    engine.synthesize(QueryBundle(PLAIN), nodes)
    inputs = llm._inputs(llm.heard)
    prompt = inputs["input_ids"][0]
    assert torch.equal(item["input_ids"][: len(prompt)], prompt)
    assert torch.equal(item["pixel_values"], inputs["pixel_values"])
    assert item["pixel_values"].shape[1] == n_images
    assert (item["labels"][: len(prompt) - 1] == IGNORED).all()
    assert answer_prompt(tiny_mllm, 1) == index.prompts.answer


def test_examples_of_one_batch_may_show_different_numbers(untrained_index, tiny_mllm):
    """Each image goes into the model once, with the examples that show equally many."""
    tensors = ExampleTensors(untrained_index, tiny_mllm, [Example("answer", 0, PLAIN, "red")] * 30)
    items = [tensors[i] for i in range(30)]
    batches = collate(items, pad=0).values()
    assert sorted(len(batch["input_ids"]) for batch in batches) == sorted(
        sum(item["pixel_values"].shape[1] == n_images for item in items) for n_images in (1, 2, 3)
    )
    assert all(len(batch["pixel_values"]) == len(batch["input_ids"]) for batch in batches)
