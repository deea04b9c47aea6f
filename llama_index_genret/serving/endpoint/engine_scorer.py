"""A scorer that calls the vLLM engine inside the server's process, without HTTP between search steps.

Depends on vLLM's public surface only: `engine_client.generate`, its renderer, `vllm.inputs` and `SamplingParams`.
This module loads in the server only.
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
    """The engine is stopping: it accepts no requests and aborts pending ones."""


class EngineScorer:
    """A scorer over a vLLM engine client. `steps` counts the search steps it has scored.

    Args:
        engine: vLLM's engine client.
        max_model_len: context length of the served model, in tokens.
        lora: vLLM's LoRA request of the adapter to score with, None for the served weights.
    """

    def __init__(self, engine: Any, max_model_len: int, lora: Any = None) -> None:
        self._engine = engine
        self._max_model_len = max_model_len
        self._lora = lora
        self.steps = 0

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """Open a session; see `Scorer.async_session`.

        The engine returns log-probabilities over the whole vocabulary for either `normalise`.

        Raises:
            QueryError: a prompt leaves no room for an identifier in the served context.
        """
        yield _EngineSession(self, await self.render(prompts, room=ROOM_FOR_IDENTIFIER))

    async def render(self, prompts: Sequence[Prompt], *, room: int) -> list[Any]:
        """Return prompts in the engine's input format. An image is processed once here, not once per beam.

        Args:
            room: number of tokens that will follow each prompt.
        Raises:
            QueryError: a prompt and the tokens that follow exceed the served context.
            ImageError: see `load_image`.
        """
        rendered = await asyncio.gather(*map(self._render, prompts))
        longest = max((len(prompt["prompt_token_ids"]) for prompt in rendered), default=0)
        if longest > self._max_model_len - room:
            raise QueryError(
                f"the query's prompt has {longest} tokens and needs room for {room} more, the model is served with "
                f"--max-model-len {self._max_model_len}: shorten the query, or serve with a larger one."
            )
        return rendered

    async def _render(self, prompt: Prompt) -> Any:
        if prompt.image is None:
            return tokens_input(list(prompt.token_ids))
        image = await asyncio.to_thread(load_image, prompt.image)
        unrendered = TokensPrompt(prompt_token_ids=list(prompt.token_ids), multi_modal_data={"image": image})
        (rendered,) = await self._engine.renderer.render_cmpl_async([unrendered])
        return rendered

    async def log_probs(self, rendered: Any, part: RowSlice) -> list[float]:
        """Return the log-probabilities of the part's tokens after a rendered prompt."""
        prompt = {**rendered, "prompt_token_ids": [*rendered["prompt_token_ids"], *part.prefix]}
        return scores(await self._generate(prompt, scoring(part)), part)

    async def log_likelihood(self, rendered: Any, token_ids: Sequence[int]) -> float:
        """Return the log-probability of the token sequence after a rendered prompt."""
        prompt = {**rendered, "prompt_token_ids": [*rendered["prompt_token_ids"], *token_ids]}
        return log_likelihood(await self._generate(prompt, likelihood()), token_ids)

    async def _generate(self, prompt: Any, params: Any) -> Any:
        output: Any = None
        request_id = f"recall-{uuid.uuid4().hex}"
        async for partial_output in self._engine.generate(prompt, params, request_id, lora_request=self._lora):
            output = partial_output
        if output is not None and output.outputs and output.outputs[0].finish_reason == "abort":
            raise EngineStopped("the engine aborted the request, because the server is stopping: retry it.")
        return output


@dataclass(frozen=True)
class _EngineSession:
    scorer: EngineScorer
    rendered: Sequence[Any]

    async def score(self, rows: Rows) -> Scores:
        self.scorer.steps += 1
        requests = [self.scorer.log_probs(self.rendered[part.query], part) for part in row_slices(rows)]
        return np.concatenate(await _gather_or_cancel(requests))

    async def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        self.scorer.steps += 1
        prompts = list(dict.fromkeys(one.prompt for one in continuations))
        room = max(len(one.token_ids) for one in continuations) + 1  # vLLM generates one more token
        rendered = dict(zip(prompts, await self.scorer.render(prompts, room=room), strict=True))
        requests = [self.scorer.log_likelihood(rendered[one.prompt], one.token_ids) for one in continuations]
        return np.array(await _gather_or_cancel(requests))


async def _gather_or_cancel(requests: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Return all results. A failure, or cancellation after a disconnect, cancels all requests."""
    tasks = list(map(asyncio.create_task, requests))
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
