"""The engine of a vLLM server as a scorer, from inside the server's process: no HTTP between the steps.

Only vLLM's public surface: `engine_client.generate`, its renderer, `vllm.inputs` and `SamplingParams`. Loads in the
server only.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.inputs import TokensPrompt, tokens_input

from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import GenretError, QueryError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Scores
from llama_index_genret.scorers.rerank import Continuation, Float64
from llama_index_genret.scorers.vllm_http import ROOM_FOR_IDENTIFIER, RowSlice, row_slices
from llama_index_genret.scorers.vllm_request import likelihood, log_likelihood, scores, scoring
from llama_index_genret.search import Normalise, Rows


class EngineStopped(GenretError):
    """The engine takes no more requests, and ends those that it has."""


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
        yield _EngineSession(self, await self.render(prompts, room=ROOM_FOR_IDENTIFIER))

    async def render(self, prompts: Sequence[Prompt], *, room: int) -> list[Any]:
        """What the engine takes of prompts, made once: an image is processed here, and no more for each beam.

        Args:
            room: tokens that will follow.
        Raises:
            QueryError: the served context has no room for them. ImageError: see `load_image`.
        """
        rendered = await asyncio.gather(*map(self._render, prompts))
        longest = max((len(prompt["prompt_token_ids"]) for prompt in rendered), default=0)
        if longest > self._max_model_len - room:
            raise QueryError(
                f"the query's prompt has {longest} tokens, the model is served with --max-model-len "
                f"{self._max_model_len}: shorten the query or raise it."
            )
        return rendered

    async def _render(self, prompt: Prompt) -> Any:
        if prompt.image is None:
            return tokens_input(list(prompt.token_ids))
        image = await asyncio.to_thread(load_image, prompt.image)
        asked = TokensPrompt(prompt_token_ids=list(prompt.token_ids), multi_modal_data={"image": image})
        (rendered,) = await self._engine.renderer.render_cmpl_async([asked])
        return rendered

    async def ask(self, rendered: Any, part: RowSlice) -> list[float]:
        """Log-probabilities of the part's tokens after a rendered prompt."""
        prompt = {**rendered, "prompt_token_ids": [*rendered["prompt_token_ids"], *part.prefix]}
        return scores(await self._generate(prompt, scoring(part)), part)

    async def ask_likelihood(self, rendered: Any, token_ids: Sequence[int]) -> float:
        """Log-probability of the tokens after a rendered prompt."""
        prompt = {**rendered, "prompt_token_ids": [*rendered["prompt_token_ids"], *token_ids]}
        return log_likelihood(await self._generate(prompt, likelihood()), token_ids)

    async def _generate(self, prompt: Any, params: Any) -> Any:
        answer: Any = None
        request_id = f"recall-{uuid.uuid4().hex}"
        async for so_far in self._engine.generate(prompt, params, request_id, lora_request=self._lora):
            answer = so_far
        if answer is not None and answer.outputs and answer.outputs[0].finish_reason == "abort":
            raise EngineStopped("the engine ends what it was asked, unanswered: the server is being stopped.")
        return answer


@dataclass(frozen=True)
class _EngineSession:
    scorer: EngineScorer
    rendered: Sequence[Any]

    async def score(self, rows: Rows) -> Scores:
        self.scorer.steps += 1
        asked = [self.scorer.ask(self.rendered[part.query], part) for part in row_slices(rows)]
        return np.concatenate(await _all(asked))

    async def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        self.scorer.steps += 1
        prompts = list(dict.fromkeys(one.prompt for one in continuations))
        room = max(len(one.token_ids) for one in continuations) + 1  # vLLM makes one more
        rendered = dict(zip(prompts, await self.scorer.render(prompts, room=room), strict=True))
        asked = [self.scorer.ask_likelihood(rendered[one.prompt], one.token_ids) for one in continuations]
        return np.array(await _all(asked))


async def _all(asked: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """What all answer; one that fails, or a client that leaves, ends them all."""
    tasks = list(map(asyncio.create_task, asked))
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
