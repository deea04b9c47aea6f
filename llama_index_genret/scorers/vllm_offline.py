"""`vllm.LLM` in this process as a scorer: batch recall without a server, text and image queries alike.

Only vLLM's public surface: `LLM`, `LLM.generate` and `SamplingParams`. A step is one `generate` with a request for
each row; vLLM batches them, and its prefix cache keeps the prompts. Needs vllm; loads on first use.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import MissingExtra, ModelError, QueryError
from llama_index_genret.models.prompts import PREFIX_BLOCK, Prompt
from llama_index_genret.scorers.base import AsyncSession, Scores, Session, ThreadSession
from llama_index_genret.scorers.rerank import Continuation, Float64
from llama_index_genret.scorers.vllm_http import ROOM_FOR_IDENTIFIER, row_slices
from llama_index_genret.scorers.vllm_request import likelihood, log_likelihood, scores, scoring
from llama_index_genret.search import Normalise, Rows

try:
    from vllm import LLM
    from vllm.platforms import current_platform
except ImportError as error:
    raise MissingExtra(
        "vllm.LLM in this process needs vLLM: pip install 'llama-index-genret[serve]', or [serve-cpu] without a GPU."
    ) from error

CPU_OPTIONS: dict[str, Any] = {
    **{"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": PREFIX_BLOCK},
    **{"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 2**29},
}
"""Arguments of `vllm.LLM` with which a small model starts on a small machine."""

GPU_OPTIONS: dict[str, Any] = {"dtype": "bfloat16"}


def start_vllm(model: str, **options: Any) -> LLM:
    """A `vllm.LLM` of a folder or hub id.

    Args:
        options: of `vllm.LLM`, before those that suit the machine.
    Raises:
        ModelError: vLLM does not start.
    """
    suited = CPU_OPTIONS if current_platform.is_cpu() else GPU_OPTIONS
    try:
        return LLM(model, **{**suited, **options})
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise ModelError(
            f"vLLM does not start on {model} with {options or 'its usual options'}: {error} "
            "What it wrote before this tells more."
        ) from error


class VllmOfflineScorer:
    """Scores with a `vllm.LLM`. Safe to share between threads: one step computes at a time.

    Args:
        llm: made with `max_logprobs=-1`; `load` makes one.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._lock = threading.Lock()

    @classmethod
    def load(cls, checkpoint: Path, **options: Any) -> VllmOfflineScorer:
        """Start vLLM on a checkpoint.

            if __name__ == "__main__":  # vLLM's processes may import the script again
                scorer = VllmOfflineScorer.load(served_checkpoint(index))

        vLLM puts its engine in a process that ends with this one, but not if this one is killed. With
        VLLM_ENABLE_V1_MULTIPROCESSING=0 in the environment it keeps the engine here, as `genret batch` does.

        Args:
            checkpoint: of `serving.served_checkpoint` or `export.export_checkpoint`.
            options: of `vllm.LLM`, before those that suit the machine.
        Raises:
            ModelError: vLLM does not start.
        """
        return cls(start_vllm(str(checkpoint), **{"max_logprobs": -1, **options}))

    @contextmanager
    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Iterator[Session]:
        """See `Scorer.session`. vLLM answers log-probabilities over the vocabulary for either `normalise`.

        Raises:
            QueryError: a prompt leaves no room for an identifier in the model's context.
        """
        with self._lock:
            yield self._session(prompts)

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """See `Scorer.async_session`: computes in a thread, one step at a time."""
        yield ThreadSession(self._session(prompts), self._lock)

    def _session(self, prompts: Sequence[Prompt]) -> _OfflineSession:
        self._check(prompts)
        return _OfflineSession(self, prompts, _images(prompts))

    def _check(self, prompts: Sequence[Prompt]) -> None:
        length = self._llm.model_config.max_model_len
        for prompt in prompts:
            if len(prompt.token_ids) > length - ROOM_FOR_IDENTIFIER:
                raise QueryError(
                    f"the query's prompt has {len(prompt.token_ids)} tokens, but the model is loaded with "
                    f"max_model_len {length}: shorten the query or raise it."
                )

    def generate(self, requests: Sequence[dict[str, Any]], params: Sequence[Any]) -> list[Any]:
        """vLLM's answers.

        Raises:
            QueryError: vLLM refuses a prompt.
        """
        try:
            return list(self._llm.generate(requests, params, use_tqdm=False))
        except ValueError as error:  # an image prompt is longer than its token ids tell
            raise QueryError(f"vLLM refuses a prompt: {error}") from error


@dataclass(frozen=True)
class _OfflineSession:
    """images: what vLLM takes as `multi_modal_data`, for each prompt; None for text."""

    scorer: VllmOfflineScorer
    prompts: Sequence[Prompt]
    images: Sequence[dict[str, Any] | None]

    def score(self, rows: Rows) -> Scores:
        parts = row_slices(rows)
        requests = [
            _request([*self.prompts[part.query].token_ids, *part.prefix], self.images[part.query]) for part in parts
        ]
        answers = self.scorer.generate(requests, list(map(scoring, parts)))
        return np.concatenate([scores(answer, part) for part, answer in zip(parts, answers, strict=True)])

    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        prompts = [one.whole for one in continuations]
        self.scorer._check(prompts)
        images = _images(prompts)
        requests = [_request(prompt.token_ids, image) for prompt, image in zip(prompts, images, strict=True)]
        answers = self.scorer.generate(requests, [likelihood()] * len(requests))
        pairs = zip(answers, continuations, strict=True)
        return np.array([log_likelihood(answer, one.token_ids) for answer, one in pairs])


def _images(prompts: Sequence[Prompt]) -> list[dict[str, Any] | None]:
    return [{"image": load_image(prompt.image)} if prompt.image else None for prompt in prompts]


def _request(token_ids: Sequence[int], image: dict[str, Any] | None) -> dict[str, Any]:
    request: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
    return {**request, "multi_modal_data": image} if image else request
