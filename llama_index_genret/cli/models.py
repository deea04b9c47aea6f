"""Open the model of a command: in this process, on a server, or with `vllm.LLM`."""

from __future__ import annotations

import os
from typing import Any

from llama_index_genret.cli.output import log, visible
from llama_index_genret.errors import EncoderUnavailable, MissingExtra
from llama_index_genret.models.encoder import DEFAULT_ENCODER, Encoder, load_encoder
from llama_index_genret.store import Index, Scoring
from llama_index_genret.store.vectors import open_encoder

VLLM_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a separate engine process survives if this one is killed
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # a fork would inherit the threads of torch
}


def open_scorer(
    loaded: Index, server: str | None, api_key: str, model: str | None, device: str, scoring: Scoring | None = None
) -> Any:
    """Return the trained model of an index, in this process or on a server, blended with the index's encoder."""
    scoring = scoring or loaded.scoring()
    trained = open_trained(loaded, server, api_key, model, device) if scoring.model_weight > 0.0 else None
    return blended(loaded, trained, device, scoring)


def server_scorer(loaded: Index, server: str, api_key: str) -> Any:
    """Return a scorer with the model of a server, without the encoder."""
    from llama_index_genret.scorers.vllm_http import VllmScorer

    return VllmScorer(server, api_key=api_key, weights_id=loaded.weights_id)


def blended(loaded: Index, trained: Any, device: str, scoring: Scoring) -> Any:
    """Return a scorer that blends a model with the index's encoder, as a scoring says.

    Args:
        trained: a scorer with the trained weights, None without.
    """
    from llama_index_genret.scorers.blend import Blender

    encoder = index_encoder(loaded, device) if trained is None or scoring.model_weight < 1.0 else None
    return Blender(loaded, encoder).scorer(trained, scoring)


def open_trained(loaded: Index, server: str | None, api_key: str, model: str | None, device: str) -> Any:
    """Return a scorer with the trained model on a server or in this process, None for an index that was not trained."""
    if not loaded.is_trained:
        return None
    if server:
        return server_scorer(loaded, server, api_key)
    from llama_index_genret.scorers.transformers import TransformersScorer
    from llama_index_genret.store.model_loading import load_trained

    return TransformersScorer(load_trained(loaded, device=device, base=model))


def open_llm(loaded: Index, scorer: Any, server: str | None, api_key: str, model: str | None, device: str) -> Any:
    """Return the LLM that answers: the model of `open_scorer`, or the base model of an index that was not trained."""
    from llama_index_genret.llamaindex.llms import InProcessLLM, genret_llm

    if server:
        return genret_llm(server, model=server_scorer(loaded, server, api_key).served_model(), api_key=api_key)
    mllm = getattr(getattr(scorer, "model", scorer), "mllm", None)
    if mllm is None:
        from llama_index_genret.store.model_loading import load_base, load_trained

        mllm = (load_trained if loaded.is_trained else load_base)(loaded, device=device, base=model)
    return InProcessLLM(mllm)


def index_encoder(loaded: Index, device: str = "auto") -> Encoder | None:
    """Return the encoder of an index, None for an index without. One that does not load is logged, and left out.

    Raises:
        EncoderUnavailable: it does not load, and the index has no trained weights to recall with instead.
    """
    entry = loaded.manifest.encoder
    if entry is None:
        return None
    try:
        return open_encoder(entry, device="cpu" if device == "auto" else device)
    except (EncoderUnavailable, MissingExtra) as error:
        if not loaded.is_trained:
            raise
        log.print(visible(f"recalling by the trained model alone: {error}"), style="yellow")
        return None


def new_encoder(name: str | None, device: str = "auto") -> Encoder | None:
    """Return the encoder for a new index: the named one, else the default one if it is available.

    Args:
        name: a folder, a hub id or an address; "none" for no encoder; None for the default.
    """
    if name == "none":
        return None
    try:
        return load_encoder(name or DEFAULT_ENCODER, device="cpu" if device == "auto" else device)
    except (EncoderUnavailable, MissingExtra) as error:
        if name is not None:
            raise
        message = f"the index is made without an encoder, and recalls after training only: {error}"
        log.print(visible(message), style="yellow")
        return None


def open_offline_scorer(loaded: Index, options: dict[str, Any]) -> Any:
    """Return the trained model of an index in a vLLM of this process, blended with the index's encoder."""
    scoring, trained = loaded.scoring(), None
    if loaded.is_trained and scoring.model_weight > 0.0:
        prepare_vllm()
        from llama_index_genret.scorers.vllm_offline import VllmOfflineScorer
        from llama_index_genret.serving.launch import served_checkpoint

        trained = VllmOfflineScorer.load(served_checkpoint(loaded), **options)
    return blended(loaded, trained, "cpu", scoring)


def prepare_vllm() -> None:
    """Set the environment of vLLM for a command line. Variables that are already set stay."""
    for variable, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)


def open_endpoint(loaded: Index, server: str, api_key: str) -> Any:
    """Return a client of the recall endpoint, which recalls in one request instead of one per step."""
    from llama_index_genret.serving.endpoint.client import RecallClient

    return RecallClient(loaded, server_scorer(loaded, server, api_key).server)
