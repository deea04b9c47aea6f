"""A writer with `vllm.LLM` in this process.

Depends on vllm, and loads on first use; independent of servers and torch models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import MissingExtra, ModelError
from llama_index_genret.models.tokenizer import IndexTokenizer
from llama_index_genret.scorers.vllm_offline import start_vllm
from llama_index_genret.store import Index
from llama_index_genret.store.model_state import check_tokenizer
from llama_index_genret.training.pseudo_queries.writer import Sampling, WriterReply, WriterRequest

try:
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform
except ImportError as error:
    raise MissingExtra(
        "vllm.LLM in this process needs vLLM: pip install 'llama-index-genret[serve]', or [serve-cpu] without a GPU."
    ) from error


class OfflineWriter:
    """A writer that uses a `vllm.LLM` of the index's base model. `load` starts one."""

    fingerprint = None

    def __init__(self, index: Index, llm: LLM, model: str) -> None:
        self.model = model
        self._index, self._llm = index, llm

    @classmethod
    def load(cls, index: Index, *, base: str | None = None, **options: Any) -> OfflineWriter:
        """Start vLLM with the base model; see `VllmOfflineScorer.load`.

        Args:
            base: the new location of the base model, if it has moved.
            options: further arguments of `vllm.LLM`.
        Raises:
            ModelMismatch: the model has another tokenizer.
            ModelError: vLLM does not start.
        """
        model = base or index.manifest.model.name_or_path
        if (Path(model) / "tokenizer.json").is_file():
            check_tokenizer(index, IndexTokenizer.from_file(Path(model) / "tokenizer.json"), model)
        # Chunked prefill rewinds the generator of a request with a seed, which torch does not support on a CPU.
        defaults = {"enable_chunked_prefill": False} if current_platform.is_cpu() else {}
        return cls(index, start_vllm(model, **{**defaults, **options}), model)

    def write(self, requests: Sequence[WriterRequest], sampling: Sampling) -> list[list[WriterReply]]:
        """Implement `Writer.write`."""
        images = {path: load_image(path) for path in {request.image for request in requests}}
        prompts = [
            {
                "prompt_token_ids": list(self._prompt(request)),
                "multi_modal_data": {"image": images[request.image]},
            }
            for request in requests
        ]
        parameters = [
            SamplingParams(
                n=sampling.n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=request.seed,
            )
            for request in requests
        ]
        try:
            outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        except ValueError as error:
            raise ModelError(f"vLLM refused a prompt: {error} Raise max_model_len with --vllm-option.") from error
        return [
            [WriterReply(reply.text, reply.finish_reason == "stop") for reply in output.outputs] for output in outputs
        ]

    def _prompt(self, request: WriterRequest) -> tuple[int, ...]:
        return self._index.prompts.about_image(self._index.tokenizer, request.image, request.text).token_ids
