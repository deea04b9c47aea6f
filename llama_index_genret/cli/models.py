"""Open the model of a command: in this process, on a server, or with `vllm.LLM`."""

from __future__ import annotations

import os
from typing import Any

from llama_index_genret.store import Index

VLLM_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a separate engine process survives if this one is killed
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # a fork would inherit the threads of torch
}


def open_scorer(loaded: Index, server: str | None, api_key: str, model: str | None, device: str) -> Any:
    """Return a `VllmScorer` if a server is given, else a `TransformersScorer`."""
    if server:
        from llama_index_genret.scorers.vllm_http import VllmScorer

        return VllmScorer(server, api_key=api_key, weights_id=loaded.weights_id)
    from llama_index_genret.scorers.transformers import TransformersScorer
    from llama_index_genret.store.model_loading import load_trained

    return TransformersScorer(load_trained(loaded, device=device, base=model))


def open_llm(scorer: Any, server: str | None, api_key: str) -> Any:
    """Return the LLM that answers with the model of `open_scorer`."""
    from llama_index_genret.llamaindex.llms import InProcessLLM, genret_llm

    if server:
        return genret_llm(server, model=scorer.served_model(), api_key=api_key)
    return InProcessLLM(scorer.mllm)


def open_offline_scorer(loaded: Index, options: dict[str, Any]) -> Any:
    """Return a scorer that runs vLLM in this process, with the trained weights of the index."""
    prepare_vllm()
    from llama_index_genret.scorers.vllm_offline import VllmOfflineScorer
    from llama_index_genret.serving.launch import served_checkpoint

    return VllmOfflineScorer.load(served_checkpoint(loaded), **options)


def prepare_vllm() -> None:
    """Set the environment of vLLM for a command line. Variables that are already set stay."""
    for variable, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)


def open_endpoint(loaded: Index, scorer: Any) -> Any:
    """Return a client of the recall endpoint, which recalls in one request instead of one per step."""
    from llama_index_genret.serving.endpoint.client import RecallClient

    return RecallClient(loaded, scorer.server)
