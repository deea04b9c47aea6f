"""A writer with a running vLLM server, through `/v1/chat/completions`.

Depends on httpx; independent of torch and of the index.
"""

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
"""Maximum number of concurrent requests, which the server batches."""

TIMEOUT_S = 600.0
"""Timeout of one request, which waits for its batch. A server on a CPU is slow."""


class ServerWriter:
    """A writer that uses the model of a vLLM server. It does not check that this is the index's base model.

    The server samples with its own seed, so that equal requests get different replies. On a CPU, a seed per request
    kills vLLM's engine during chunked prefill ("CPU Generator does not use offset", vLLM 0.32).

    Args:
        api_base: address up to `/v1`.
        model: the served model name. Default: the server's only model.
        api_key: key of the server.
    Raises:
        ServerUnreachable: no server answers.
        ServerError: the model is not served.
    """

    fingerprint = None

    def __init__(self, api_base: str, *, model: str | None = None, api_key: str = "EMPTY") -> None:
        self._server = Server(api_base.rstrip("/"), api_key, TIMEOUT_S)
        self.model = VllmScorer(api_base, model=model, api_key=api_key).served_model()

    def write(self, requests: Sequence[WriterRequest], sampling: Sampling) -> list[list[WriterReply]]:
        """Implement `Writer.write`."""
        with self._server.connection() as connection, ThreadPoolExecutor(CONCURRENT) as pool:
            try:
                return list(pool.map(partial(self._complete, connection, sampling), requests))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error, do not wait for the others

    def _complete(self, connection: Connection, sampling: Sampling, request: WriterRequest) -> list[WriterReply]:
        image = {"type": "image_url", "image_url": {"url": to_data_url(request.image)}}
        message = {"role": "user", "content": [image, {"type": "text", "text": request.text}]}
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [message],
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        response = connection.request("POST", "/chat/completions", body)
        try:
            choices = json_object(response)["choices"]
            return [WriterReply(c["message"]["content"] or "", c["finish_reason"] == "stop") for c in choices]
        except (KeyError, TypeError) as error:
            raise ServerError(
                f"{response.url} returned no chat completion ({error!r}). Is it a vLLM server?"
            ) from error
