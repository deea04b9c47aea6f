"""The engine of a vLLM server as a scorer, from inside the server's process: no HTTP between the steps.

Only vLLM's public surface: `engine_client.generate` and `SamplingParams`. Loads in the server only.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import SamplingParams

from llama_index_genret.errors import QueryError, ServerError
from llama_index_genret.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Scores
from llama_index_genret.scorers.vllm import Part, parts_of
from llama_index_genret.search import Normalise, Rows


class EngineScorer:
    """Scores with a vLLM engine client. `steps` counts the steps asked of it."""

    def __init__(self, engine: Any, max_model_len: int) -> None:
        self._engine = engine
        self._max_model_len = max_model_len
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
        yield _EngineSession(self, prompts)

    async def ask(self, part: Part) -> list[float]:
        """Log-probabilities of the part's tokens."""
        wanted = list(part.token_ids)
        parameters = SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=wanted, detokenize=False)
        answer: Any = None
        request_id = f"recall-{uuid.uuid4().hex}"
        async for so_far in self._engine.generate({"prompt_token_ids": list(part.prompt)}, parameters, request_id):
            answer = so_far
        if answer is None or not answer.outputs or not answer.outputs[0].logprobs:
            raise ServerError("the engine gave no log-probabilities: start the server with --max-logprobs -1.")
        found = answer.outputs[0].logprobs[0]
        return [float(found[token].logprob) for token in wanted]


@dataclass(frozen=True)
class _EngineSession:
    scorer: EngineScorer
    prompts: Sequence[Prompt]

    async def score(self, rows: Rows) -> Scores:
        self.scorer.steps += 1
        tasks = [asyncio.create_task(self.scorer.ask(part)) for part in parts_of(rows, self.prompts)]
        try:
            return np.concatenate(await asyncio.gather(*tasks))
        finally:  # one that fails, or a client that leaves, ends them all
            for task in tasks:
                task.cancel()
