"""Test closed-book answers against a greedy decoding loop, and the requests that a server receives."""

import asyncio
import json
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch

from llama_index_genret.corpus.images import from_data_url, load_image
from llama_index_genret.errors import QueryError, ServerError, UnknownImage
from llama_index_genret.models.prompts import CAPTION_QUESTION
from llama_index_genret.scorers.closed_book import ImageMemory, InProcessSpeaker, MemoryAnswer, ServerSpeaker
from llama_index_genret.scorers.http_client import Server
from llama_index_genret.training.collator import ExampleTensors
from llama_index_genret.training.tasks import MIX, InterleavedExamples, examples_of, read_mix

pytestmark = pytest.mark.torch

QUESTION = "What is its main color?"


@pytest.fixture(scope="module")
def memory(trained_index, trained_mllm):
    return ImageMemory(trained_index, InProcessSpeaker(trained_mllm), max_tokens=5)


def greedy(mllm, inputs, n):
    """Decode greedily, token by token, without a cache."""
    token_ids = []
    for _ in range(n):
        with torch.no_grad():
            token = mllm.model(**inputs).logits[0, -1].argmax().view(1, 1)
        if int(token) in {mllm.model.generation_config.eos_token_id}:
            break
        token_ids.append(int(token))
        longer = {"input_ids": torch.cat([inputs["input_ids"], token], 1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        inputs = {**inputs, **longer}
    return mllm.processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def by_identifier(index, mllm, row, text):
    """Answer a prompt written as text: the symbols of the identifier, then the question."""
    template, identifier = index.prompts.describe, "".join(index.identifiers[row])
    ids = index.tokenizer.encode_markup(f"{template.before}{identifier}{text}{template.after}")
    return greedy(mllm, {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}, 5)


def by_image(index, mllm, row, text):
    template = index.prompts.answer
    inputs = mllm.process([f"{template.before}{text}{template.after}"], [load_image(index.records[row].path)])
    return greedy(mllm, inputs, 5)


def test_answers_equal_greedy_decoding_by_identifier_and_image(memory, trained_index, trained_mllm):
    answers = [memory.answer_from_memory(trained_index.records[row].image_id, QUESTION) for row in range(4)]
    assert [a.from_memory for a in answers] == [
        by_identifier(trained_index, trained_mllm, r, f"\n{QUESTION}") for r in range(4)
    ]
    assert [a.from_image for a in answers] == [by_image(trained_index, trained_mllm, row, QUESTION) for row in range(4)]
    assert len({a.from_memory for a in answers}) > 1
    assert answers[0].from_memory != answers[0].from_image


def test_empty_question_gives_a_description(memory, trained_index, trained_mllm):
    answer = memory.answer_from_memory(trained_index.records[3].image_id)
    assert answer.from_memory == by_identifier(trained_index, trained_mllm, 3, "")
    assert answer.from_image == by_image(trained_index, trained_mllm, 3, CAPTION_QUESTION)


def test_async_answer_equals_sync_answer(memory, trained_index):
    image_id = trained_index.records[2].image_id
    assert asyncio.run(memory.aanswer_from_memory(image_id, QUESTION)) == memory.answer_from_memory(image_id, QUESTION)


def test_missing_image_file_leaves_the_answer_from_memory(memory, trained_index, trained_mllm, tmp_path):
    records = [replace(record, path=tmp_path / "gone.png") for record in trained_index.records]
    blind = ImageMemory(replace(trained_index, records=tuple(records)), InProcessSpeaker(trained_mllm), max_tokens=5)
    image_id = records[0].image_id
    expected = replace(memory.answer_from_memory(image_id, QUESTION), from_image=None)
    assert blind.answer_from_memory(image_id, QUESTION) == expected


def test_unknown_image_or_too_long_question_is_rejected(memory, trained_index):
    with pytest.raises(UnknownImage, match="no-such-image"):
        memory.answer_from_memory("no-such-image", QUESTION)
    with pytest.raises(QueryError, match="tokens"):
        memory.answer_from_memory(trained_index.records[0].image_id, "why? " * 500)


def test_markup_in_a_question_stays_text(trained_index):
    tokenizer, identifier = trained_index.tokenizer, trained_index.token_ids(0)
    symbol = next(s for symbols in trained_index.identifiers for s in symbols if s not in trained_index.identifiers[0])
    token_ids = trained_index.prompts.about_identifier(tokenizer, identifier, f"And {symbol}?").token_ids
    assert tokenizer.symbol_id(symbol) not in set(token_ids) - set(identifier)


class Completions(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests[self.path] = body
        choice = {"message": {"content": " blue "}} if "messages" in body else {"text": " red"}
        content = json.dumps(self.server.malformed or {"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server():
    protocol = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    protocol.requests, protocol.malformed = {}, None
    Thread(target=protocol.serve_forever, daemon=True).start()
    yield protocol
    protocol.shutdown()
    protocol.server_close()


def server_memory(server, index):
    return ImageMemory(
        index, ServerSpeaker(Server(f"http://127.0.0.1:{server.server_port}/v1"), "genret"), max_tokens=9
    )


@pytest.mark.parametrize(
    "run", [lambda m, *a: m.answer_from_memory(*a), lambda m, *a: asyncio.run(m.aanswer_from_memory(*a))]
)
def test_server_receives_identifier_tokens_and_the_image_once(server, trained_index, run):
    record = trained_index.records[5]
    answer = run(server_memory(server, trained_index), record.image_id, QUESTION)
    assert answer == MemoryAnswer(record.image_id, QUESTION, "red", "blue")
    memory_request = server.requests["/v1/completions"]
    image_request = server.requests["/v1/chat/completions"]
    expected = trained_index.prompts.about_identifier(trained_index.tokenizer, trained_index.token_ids(5), QUESTION)
    assert memory_request["prompt"] == [list(expected.token_ids)]
    (message,) = image_request["messages"]
    image, text = message["content"]
    assert from_data_url(image["image_url"]["url"]) == record.path.read_bytes()
    assert text["text"] == QUESTION
    for body in (memory_request, image_request):
        assert (body["max_tokens"], body["temperature"], body["model"]) == (9, 0, "genret")


@pytest.mark.parametrize("malformed", [{"choices": []}, {"choices": [{"text": "a"}, {"text": "b"}]}, {"choices": [{}]}])
def test_malformed_server_response_is_an_error(server, trained_index, malformed):
    server.malformed = malformed
    with pytest.raises(ServerError, match="no completion"):
        server_memory(server, trained_index).answer_from_memory(trained_index.records[0].image_id, QUESTION)


def test_remember_task_asks_the_answer_questions_by_identifier(untrained_index, tiny_mllm):
    tasks = {"remember": examples_of(untrained_index)["remember"]}
    tensors = ExampleTensors(untrained_index, tiny_mllm, InterleavedExamples(tasks, 20, seed=0, mix={"remember": 1}))
    answers = [(e.row, e.text, e.target) for e in examples_of(untrained_index)["answer"]]
    assert [(e.row, e.text, e.target) for e in tasks["remember"]] == answers
    for i, example in enumerate(InterleavedExamples(tasks, 20, seed=0, mix={"remember": 1})):
        identifier = untrained_index.token_ids(example.row)
        prompt = untrained_index.prompts.about_identifier(untrained_index.tokenizer, identifier, example.text)
        item, n = tensors[i], len(prompt.token_ids)
        assert item.keys() == {"input_ids", "labels"}  # no image
        assert item["input_ids"][:n].tolist() == list(prompt.token_ids)
        target = untrained_index.tokenizer.encode_text(example.target)
        end = untrained_index.tokenizer.encode_markup(untrained_index.prompts.end)
        assert item["labels"][n - 1 :].tolist() == [*target, *end]


def test_default_mix_has_no_remember_examples(untrained_index):
    tasks = examples_of(untrained_index)
    before = {task: examples for task, examples in tasks.items() if task != "remember"}
    mix = {task: count for task, count in MIX.items() if task != "remember"}
    assert list(InterleavedExamples(tasks, 300, seed=1)) == list(InterleavedExamples(before, 300, seed=1, mix=mix))
    mixed = InterleavedExamples(tasks, 300, seed=1, mix=read_mix("retrieve=2,remember=1"))
    assert sum(example.task == "remember" for example in mixed) == 100
