"""Build the sampling parameters with which vLLM scores a row or a text, and read its outputs.

The engine of a server and `vllm.LLM` use the same functions.

Needs vllm; loads on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index_genret.errors import MissingExtra, ServerError
from llama_index_genret.scorers.vllm_http import RowSlice

try:
    from vllm import SamplingParams
except ImportError as error:
    raise MissingExtra(
        "vLLM in this process needs vllm: pip install 'llama-index-genret[serve]', or [serve-cpu] without a GPU."
    ) from error


def scoring(part: RowSlice) -> SamplingParams:
    """Return parameters for scoring the tokens of a slice; vLLM must also generate one token."""
    wanted = list(part.token_ids)
    return SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=wanted, detokenize=False, flat_logprobs=True)


def likelihood() -> SamplingParams:
    """Return parameters for scoring every token of the prompt; vLLM must also generate one token, which is unused."""
    return SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)


def log_likelihood(output: Any, token_ids: Sequence[int]) -> float:
    """Return the log-probability of the last tokens of the prompt, over the vocabulary, from an output of vLLM.

    Raises:
        ServerError: the output does not contain it.
    """
    places = list(getattr(output, "prompt_logprobs", None) or [])[-len(token_ids) :]
    if len(places) != len(token_ids) or any(t not in (p or {}) for p, t in zip(places, token_ids, strict=True)):
        raise ServerError(
            "vLLM returned no log-probabilities of the prompt's tokens, which re-ranking needs: use vLLM 0.30 or newer."
        )
    return sum(float(place[token].logprob) for place, token in zip(places, token_ids, strict=True))


def scores(output: Any, part: RowSlice) -> list[float]:
    """Return the log-probabilities of the tokens of a slice, over the vocabulary, from an output of vLLM.

    Raises:
        ServerError: the output does not contain them.
    """
    if output is None or not output.outputs or not output.outputs[0].logprobs:
        raise ServerError("vLLM returned no log-probabilities: start it with --max-logprobs -1.")
    log_probs, end = output.outputs[0].logprobs, len(part.token_ids) + 1
    if tuple(log_probs.token_ids[1:end]) != part.token_ids:  # the sampled token comes first, and padding last
        raise ServerError("vLLM returned log-probabilities of other tokens than requested: use vLLM 0.30 or newer.")
    return list(log_probs.logprobs[1:end])
