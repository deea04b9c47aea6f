"""What is asked of vLLM's engine to score a row or a text, and what it answers.

The same for a server's engine and `vllm.LLM`.

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
    """Parameters with which one token is made, and the part's tokens are scored."""
    wanted = list(part.token_ids)
    return SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=wanted, detokenize=False, flat_logprobs=True)


def likelihood() -> SamplingParams:
    """Parameters with which every token of the prompt gets its own log-probability; one token is made in vain."""
    return SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)


def log_likelihood(answer: Any, token_ids: Sequence[int]) -> float:
    """Log-probability of the last tokens of the prompt, over the vocabulary, in an answer of vLLM's.

    Raises:
        ServerError: it is not there.
    """
    places = list(getattr(answer, "prompt_logprobs", None) or [])[-len(token_ids) :]
    if len(places) != len(token_ids) or any(t not in (p or {}) for p, t in zip(places, token_ids, strict=True)):
        raise ServerError("vLLM gave no log-probabilities of the prompt's tokens, which a re-ranking asks for.")
    return sum(float(place[token].logprob) for place, token in zip(places, token_ids, strict=True))


def scores(answer: Any, part: RowSlice) -> list[float]:
    """Log-probabilities of the part's tokens, over the vocabulary, in an answer of vLLM's.

    Raises:
        ServerError: they are not there.
    """
    if answer is None or not answer.outputs or not answer.outputs[0].logprobs:
        raise ServerError("vLLM gave no log-probabilities: start it with --max-logprobs -1.")
    found, end = answer.outputs[0].logprobs, len(part.token_ids) + 1
    if tuple(found.token_ids[1:end]) != part.token_ids:  # the sampled token comes first, and padding last
        raise ServerError("vLLM gave log-probabilities of other tokens than were asked for.")
    return list(found.logprobs[1:end])
