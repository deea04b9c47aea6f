"""The recall routes in an app with vLLM's guard and error handlers. A table replaces the engine."""

import asyncio
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import uvicorn
from fastapi import FastAPI
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from llama_index_genret import FakeScorer
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.serving.endpoint import RecallMiddleware


class TableScorer(FakeScorer):
    """The scorer of this process with the logits of a `TableEngine`, which sees one row of tokens and no image."""

    def logits(self, prompt, prefix):
        return super().logits(Prompt((*prompt.token_ids, *prefix)), ())


class TableEngine:
    """An engine whose `generate` answers with log-probabilities from a table, in vLLM's format.

    value: replaces the last log-probability, if given. wait_s: seconds until each answer. calls: number of answers.
    """

    def __init__(self, vocabulary):
        self.table, self.value, self.wait_s, self.calls = TableScorer(vocabulary), None, 0.0, 0
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=2000))
        self.renderer = SimpleNamespace(render_cmpl_async=self._render)

    async def _render(self, prompts):
        return [{"prompt_token_ids": list(prompt["prompt_token_ids"])} for prompt in prompts]

    async def generate(self, prompt, params, request_id, lora_request=None):
        self.calls += 1
        await asyncio.sleep(self.wait_s)
        logits = self.table.logits(Prompt(tuple(prompt["prompt_token_ids"])), ())
        token_ids = list(params.logprob_token_ids)
        values = (logits - np.logaddexp.reduce(logits))[token_ids].tolist()
        if self.value is not None:
            values[-1] = self.value
        flat = SimpleNamespace(token_ids=[0, *token_ids], logprobs=[0.0, *values])
        yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=flat, finish_reason="length")])


def recall_app(index, *, api_key=(), root_path=""):
    """Return the app. The environment sets the index."""
    app = FastAPI()
    app.root_path = root_path
    app.state.args = SimpleNamespace(api_key=list(api_key), log_error_stack=False)
    init_exception_handler(app)
    app.state.engine_client = TableEngine(index.tokenizer.vocab_size)
    app.state.openai_serving_models = SimpleNamespace(lora_requests={})
    if api_key:
        app.add_middleware(AuthenticationMiddleware, tokens=list(api_key))
    app.add_middleware(RecallMiddleware)
    return app


@contextmanager
def served(app):
    """Serve the app from a thread, and yield its port."""
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield running.servers[0].sockets[0].getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(30)
