"""A server with vLLM's protocol that answers from a table and records its requests.

It serves `/v1/models`, `/v1/completions` with the log-probabilities of requested tokens, and `/v1/chat/completions`,
whole or as a stream, with scripted replies.
"""

import base64
import contextlib
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Thread

import numpy as np
from PIL import Image

from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.fake import FakeScorer

ANSWER = "It is a red circle."


class OpenAIServer(ThreadingHTTPServer):
    """A server that records its requests in `requests` (completions) and `chats`.

    table: logits after each of `prompts`, and after the first token of any other prompt.
    script: replies by key. The first key that occurs in a chat's text or tool names selects the reply, else it is
        `ANSWER`. A reply is a text, or a call `{"tool": name, "arguments": {...}}` until the tool has answered.
    spoil: a function that changes a response body.
    cut: number of bytes after which a response breaks off, None for whole responses.
    delay_s: seconds before a chat is answered.
    """

    daemon_threads = True

    def __init__(self, *, vocabulary=400, prompts=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.table, self.prompts = FakeScorer(vocabulary), list(prompts)
        self.requests, self.chats, self.script = [], [], {}
        self.models = [{"id": "only", "max_model_len": 100}]
        self.spoil = lambda answer: answer
        self.status, self.cut, self.delay_s = 200, None, 0.0

    @property
    def api_base(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def images(self):
        """Return size and pixels of the images in the messages of each chat, in order."""
        return [[pixels(from_url(url)) for url in image_urls(chat)] for chat in self.chats]

    def texts(self):
        """Return the whole text of each chat."""
        return [text_of(chat) for chat in self.chats]


@contextlib.contextmanager
def running(server):
    """Serve in a thread, within the context."""
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def parts(chat):
    for message in chat["messages"]:
        content = message.get("content") or []
        yield from [{"type": "text", "text": content}] if isinstance(content, str) else content


def image_urls(chat):
    return [part["image_url"]["url"] for part in parts(chat) if part["type"] == "image_url"]


def text_of(chat):
    return "\n".join(part["text"] for part in parts(chat) if part["type"] == "text")


def from_url(url):
    head, _, body = url.partition(",")
    assert head.startswith("data:image/"), f"not an image: {url[:60]}"
    return BytesIO(base64.b64decode(body, validate=True))


def pixels(file):
    """Return size and RGB pixels of an image file of any format."""
    with Image.open(file) as image:
        return image.size, image.convert("RGB").tobytes()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open, as a real server does

    def log_message(self, *_):
        pass

    def answer(self, status, body, content_type="application/json"):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.close_connection = self.server.cut is not None
        with contextlib.suppress(OSError):  # the client may disconnect
            self.end_headers()
            self.wfile.write(content[: self.server.cut])

    def do_GET(self):
        if self.path.endswith("/models"):
            self.answer(200, {"data": self.server.models})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/chat/completions"):
            self.chat(request)
        elif self.path.endswith("/completions"):
            self.complete(request)
        else:
            self.answer(404, {"detail": "Not Found"})

    def complete(self, request):
        self.server.requests.append(request)
        if "prompt_logprobs" in request:
            choices = [
                {"index": i, "prompt_logprobs": self.prompt_logprobs(ids)} for i, ids in enumerate(request["prompt"])
            ]
        else:
            choices = [self.choice(i, ids, request["logprob_token_ids"]) for i, ids in enumerate(request["prompt"])]
        self.answer(self.server.status, self.server.spoil({"choices": choices[::-1]}))

    def prompt_logprobs(self, ids):
        """Return the log-probability of each token given the previous ones, None for the first."""
        first, *rest = ids
        logits = [self.server.table.logits(Prompt((first,)), tuple(rest[:place])) for place in range(len(rest))]
        values = [float(row[token] - np.logaddexp.reduce(row)) for row, token in zip(logits, rest, strict=True)]
        return [None, *({str(token): {"logprob": value}} for token, value in zip(rest, values, strict=True))]

    def choice(self, i, ids, token_ids):
        """Return the table's log-probabilities after the first matching prompt, over the whole vocabulary."""
        known = (p for p in self.server.prompts if tuple(ids[: len(p.token_ids)]) == p.token_ids)
        prompt = next(known, Prompt(tuple(ids[:1])))
        logits = self.server.table.logits(prompt, tuple(ids[len(prompt.token_ids) :]))
        log_probs = logits - np.logaddexp.reduce(logits)
        return {"index": i, "logprobs": {"top_logprobs": [{f"token_id:{t}": float(log_probs[t]) for t in token_ids}]}}

    def chat(self, request):
        self.server.chats.append(request)
        time.sleep(self.server.delay_s)
        if self.server.status != 200:
            self.answer(self.server.status, {"error": {"message": "refused", "code": self.server.status}})
            return
        reply = self.scripted_reply(request)
        whole = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"]}
        finish = "tool_calls" if reply.get("tool_calls") else "stop"
        if not request.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", **reply}, "finish_reason": finish}
            self.answer(200, self.server.spoil({**whole, "choices": [choice]}))
            return
        pieces = [{"content": word} for word in (reply.get("content") or "").split(" ")]
        pieces = [{"content": piece["content"] + " "} for piece in pieces[:-1]] + pieces[-1:]
        deltas = [{"role": "assistant", "tool_calls": reply["tool_calls"]}] if finish == "tool_calls" else pieces
        chunks = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
        chunks.append({"index": 0, "delta": {}, "finish_reason": finish})
        lines = [json.dumps({**whole, "object": "chat.completion.chunk", "choices": [chunk]}) for chunk in chunks]
        self.answer(200, "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode(), "text/event-stream")

    def scripted_reply(self, request):
        """Return the message of the script for a request."""
        names = [tool["function"]["name"] for tool in request.get("tools", [])]
        text = "\n".join([text_of(request), *names, json.dumps(request.get("response_format", ""))])
        answered = any(message["role"] == "tool" for message in request["messages"])
        for key, reply in self.server.script.items():
            if key in text and not (isinstance(reply, dict) and answered):
                return {"content": reply} if isinstance(reply, str) else call(**reply)
        return {"content": ANSWER}


def call(tool, arguments):
    function = {"name": tool, "arguments": json.dumps(arguments)}
    return {"content": None, "tool_calls": [{"index": 0, "id": "call-1", "type": "function", "function": function}]}
