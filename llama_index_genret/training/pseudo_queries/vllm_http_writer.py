"""A running vLLM server as a writer, through `/v1/chat/completions`. Needs httpx only."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from llama_index_genret.corpus.images import to_data_url
from llama_index_genret.errors import ServerError
from llama_index_genret.scorers.http_client import Connection, Server, json_object
from llama_index_genret.scorers.vllm_http import VllmScorer
from llama_index_genret.training.pseudo_queries.writer import Sampling, WriterReply, WriterRequest

CONCURRENT = 32
"""Requests that a server has at once; it batches their tokens."""

TIMEOUT_S = 600.0
"""Of one request: it waits for others of its batch, and a server on a CPU is slow."""


class ServerWriter:
    """Writes with the model that a vLLM server serves, which should be the index's base model: that is not checked.

    It samples by the server's seed, so that the same requests get other answers. A request with a seed of its own kills
    vLLM's engine on a CPU, when the prompt is read in parts ("CPU Generator does not use offset", vLLM 0.32).

    Args:
        api_base: address up to `/v1`.
        model: the served name; the server's only model if not given.
    Raises:
        ServerUnreachable, ServerError: nothing answers, or the model is not served.
    """

    fingerprint = None

    def __init__(self, api_base: str, *, model: str | None = None, api_key: str = "EMPTY") -> None:
        self._server = Server(api_base.rstrip("/"), api_key, TIMEOUT_S)
        self.model = VllmScorer(api_base, model=model, api_key=api_key).served_model()

    def write(self, requests: Sequence[WriterRequest], sampling: Sampling) -> list[list[WriterReply]]:
        """See `Writer.write`."""
        with self._server.connection() as connection, ThreadPoolExecutor(CONCURRENT) as pool:
            try:
                return list(pool.map(partial(self._ask, connection, sampling), requests))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error the others are not wanted any more

    def _ask(self, connection: Connection, sampling: Sampling, request: WriterRequest) -> list[WriterReply]:
        picture = {"type": "image_url", "image_url": {"url": to_data_url(request.image)}}
        message = {"role": "user", "content": [picture, {"type": "text", "text": request.text}]}
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [message],
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        answer = connection.request("POST", "/chat/completions", body)
        try:
            choices = json_object(answer)["choices"]
            return [WriterReply(c["message"]["content"] or "", c["finish_reason"] == "stop") for c in choices]
        except (KeyError, TypeError) as error:
            raise ServerError(f"{answer.url} answered no chat completion ({error!r}). Is it a vLLM server?") from error
