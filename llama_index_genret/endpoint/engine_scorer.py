"""The engine of a vLLM server as a scorer, from inside the server's process: no HTTP between the steps.

Only vLLM's public surface: `engine_client.generate` and `SamplingParams`. Loads in the server only.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import SamplingParams

from llama_index_genret.errors import QueryError, ServerError
from llama_index_genret.images import load_image
from llama_index_genret.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Scores
from llama_index_genret.scorers.vllm import MAX_TOKENS_ASKED
from llama_index_genret.search import Normalise, Rows


class EngineScorer:
    """Scores with a vLLM engine client. `steps` counts the steps asked of it.

    Args:
        lora: vLLM's request of the adapter to score with, None for the served weights.
    """

    def __init__(self, engine: Any, max_model_len: int, lora: Any = None) -> None:
        self._engine = engine
        self._max_model_len = max_model_len
        self._lora = lora
        self.steps = 0

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """See `Scorer.async_session`. The engine answers log-probabilities over the vocabulary for either.

        Raises:
            QueryError: a prompt leaves no room for an identifier in the served context.
        """
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        if longest >= self._max_model_len:
            raise QueryError(
                f"the query's prompt has {longest} tokens, the model is served with --max-model-len "
                f"{self._max_model_len}: shorten the query or raise it."
            )
        images = await asyncio.gather(*(asyncio.to_thread(_image_input, prompt) for prompt in prompts))
        yield _EngineSession(self, prompts, images)

    async def ask(self, prompt: dict[str, Any], wanted: list[int]) -> list[float]:
        """Log-probabilities of `wanted`, at most MAX_TOKENS_ASKED tokens, after a prompt of vLLM's."""
        parameters = SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=wanted, detokenize=False)
        answer: Any = None
        request_id = f"recall-{uuid.uuid4().hex}"
        async for part in self._engine.generate(prompt, parameters, request_id, lora_request=self._lora):
            answer = part
        if answer is None or not answer.outputs or not answer.outputs[0].logprobs:
            raise ServerError("the engine gave no log-probabilities: start the server with --max-logprobs -1.")
        found = answer.outputs[0].logprobs[0]
        return [float(found[token].logprob) for token in wanted]


def _image_input(prompt: Prompt) -> dict[str, Any]:
    """What vLLM takes of a prompt's image. Its id, the hash of its bytes, lets every later step find it processed.

    Raises:
        ImageError: see `load_image`.
    """
    if prompt.image is None:
        return {}
    content = prompt.image if isinstance(prompt.image, bytes) else prompt.image.read_bytes()
    name = hashlib.sha256(content).hexdigest()
    return {"multi_modal_data": {"image": load_image(content)}, "multi_modal_uuids": {"image": name}}


@dataclass(frozen=True)
class _EngineSession:
    scorer: EngineScorer
    prompts: Sequence[Prompt]
    images: Sequence[dict[str, Any]]

    async def score(self, rows: Rows) -> Scores:
        self.scorer.steps += 1
        asked = [
            (
                {"prompt_token_ids": [*self.prompts[row.query].token_ids, *row.prefix], **self.images[row.query]},
                row.token_ids[start : start + MAX_TOKENS_ASKED].tolist(),
            )
            for row in rows
            for start in range(0, len(row.token_ids), MAX_TOKENS_ASKED)
        ]
        tasks = [asyncio.create_task(self.scorer.ask(*question)) for question in asked]
        try:
            return np.concatenate(await asyncio.gather(*tasks))
        finally:  # one that fails, or a client that leaves, ends them all
            for task in tasks:
                task.cancel()
