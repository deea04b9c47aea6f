"""Score with `vllm.LLM` in this process: batch recall without a server, for text queries and image queries.

The module uses only vLLM's public interface: `LLM`, `LLM.generate` and `SamplingParams`. A step is one `generate` call
with a request for each row. vLLM batches the requests, and its prefix cache keeps the prompts.

Needs vllm; loads on first use.
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
"""Arguments of `vllm.LLM` for starting a small model on a small machine."""

GPU_OPTIONS: dict[str, Any] = {"dtype": "bfloat16"}


def start_vllm(model: str, **options: Any) -> LLM:
    """Start a `vllm.LLM`.

    Args:
        model: folder or hub id of the model.
        options: arguments of `vllm.LLM`; they override the defaults for the machine.
    Raises:
        ModelError: vLLM does not start.
    """
    suited = CPU_OPTIONS if current_platform.is_cpu() else GPU_OPTIONS
    try:
        return LLM(model, **{**suited, **options})
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise ModelError(
            f"vLLM does not start on {model} with {options or 'default options'}: {error} "
            "See the output of vLLM above for the cause."
        ) from error


class VllmOfflineScorer:
    """A scorer with a `vllm.LLM`. Threads may share it; only one step computes at a time.

    Args:
        llm: an engine with `max_logprobs=-1`, for example from `load`.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._lock = threading.Lock()

    @classmethod
    def load(cls, checkpoint: Path, **options: Any) -> VllmOfflineScorer:
        """Start vLLM on a checkpoint.

            if __name__ == "__main__":  # vLLM's processes may import the script again
                scorer = VllmOfflineScorer.load(served_checkpoint(index))

        vLLM runs its engine in another process. That process ends with this one, but not if this one is killed. With
        VLLM_ENABLE_V1_MULTIPROCESSING=0 in the environment it runs the engine in this process, as `genret batch` does.

        Args:
            checkpoint: folder from `served_checkpoint` or `export_checkpoint`.
            options: arguments of `vllm.LLM`; they override the defaults for the machine.
        Raises:
            ModelError: vLLM does not start.
        """
        return cls(start_vllm(str(checkpoint), **{"max_logprobs": -1, **options}))

    @contextmanager
    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Iterator[Session]:
        """See `Scorer.session`. vLLM returns log-probabilities over the vocabulary for either `normalise`.

        Raises:
            QueryError: a prompt leaves no room for an identifier in the model's context.
        """
        with self._lock:
            yield self._session(prompts)

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """See `Scorer.async_session`. Each step runs in a thread, one step at a time."""
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
                    f"max_model_len {length}, of which {ROOM_FOR_IDENTIFIER} are for the identifier: shorten the query "
                    "or raise the limit."
                )

    def generate(self, requests: Sequence[dict[str, Any]], params: Sequence[Any]) -> list[Any]:
        """Return the outputs of vLLM, one for each request.

        Raises:
            QueryError: vLLM rejects a prompt.
        """
        try:
            return list(self._llm.generate(requests, params, use_tqdm=False))
        except ValueError as error:  # an image prompt is longer than its token ids, so `_check` may miss it
            raise QueryError(f"vLLM rejected a prompt: {error}") from error


@dataclass(frozen=True)
class _OfflineSession:
    """A session with a `vllm.LLM`.

    images: `multi_modal_data` of vLLM for each prompt, None for a text prompt.
    """

    scorer: VllmOfflineScorer
    prompts: Sequence[Prompt]
    images: Sequence[dict[str, Any] | None]

    def score(self, rows: Rows) -> Scores:
        parts = row_slices(rows)
        requests = [
            _request([*self.prompts[part.query].token_ids, *part.prefix], self.images[part.query]) for part in parts
        ]
        outputs = self.scorer.generate(requests, list(map(scoring, parts)))
        return np.concatenate([scores(output, part) for part, output in zip(parts, outputs, strict=True)])

    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        prompts = [one.whole for one in continuations]
        self.scorer._check(prompts)
        images = _images(prompts)
        requests = [_request(prompt.token_ids, image) for prompt, image in zip(prompts, images, strict=True)]
        outputs = self.scorer.generate(requests, [likelihood()] * len(requests))
        pairs = zip(outputs, continuations, strict=True)
        return np.array([log_likelihood(output, one.token_ids) for output, one in pairs])


def _images(prompts: Sequence[Prompt]) -> list[dict[str, Any] | None]:
    return [{"image": load_image(prompt.image)} if prompt.image else None for prompt in prompts]


def _request(token_ids: Sequence[int], image: dict[str, Any] | None) -> dict[str, Any]:
    request: dict[str, Any] = {"prompt_token_ids": list(token_ids)}
    return {**request, "multi_modal_data": image} if image else request
