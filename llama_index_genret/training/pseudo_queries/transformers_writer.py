"""A writer with the index's base model in this process.

Depends on torch and transformers, and loads on first use; independent of servers and vLLM.
"""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm  # isort: skip  # first: it names the extra that brings torch

from collections.abc import Sequence
from typing import Any

import torch

from llama_index_genret.corpus.images import load_image
from llama_index_genret.store import Index
from llama_index_genret.store.model_state import new_token_ids
from llama_index_genret.training.pseudo_queries.writer import Sampling, WriterReply, WriterRequest, seed_of


class InProcessWriter:
    """A writer that calls Hugging Face's `generate`. All replies to all requests are the rows of one batch.

    Args:
        mllm: the result of `model_loading.load_base`, which checks that it is the index's model.
    """

    def __init__(self, index: Index, mllm: Mllm) -> None:
        self.model, self.fingerprint = mllm.name_or_path, index.manifest.model.fingerprint
        self._index, self._mllm = index, mllm
        configured = mllm.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        self._ends = sorted({index.end_token, *(end for end in ends if end is not None)})

    @torch.inference_mode()
    def write(self, requests: Sequence[WriterRequest], sampling: Sampling) -> list[list[WriterReply]]:
        """Implement `Writer.write`. One seed of all requests is used, so that replies depend on the batch."""
        images = {path: load_image(path) for path in dict.fromkeys(request.image for request in requests)}
        prompts = [self._index.prompts.about_image(self._index.tokenizer, r.image, r.text) for r in requests]
        inputs = self._mllm.process(
            [prompt.text for prompt in prompts],
            [images[request.image] for request in requests],
            [prompt.rest for prompt in prompts],
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(*(request.seed for request in requests)))
            output = self._mllm.model.generate(**inputs, **self._generation(sampling))
        generated = output[:, inputs["input_ids"].shape[1] :]
        texts = self._mllm.processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
        ended = torch.isin(generated, torch.tensor(self._ends, device=generated.device)).any(1).tolist()
        replies = [WriterReply(text, end) for text, end in zip(texts, ended, strict=True)]
        return [replies[start : start + sampling.n] for start in range(0, len(replies), sampling.n)]

    def _generation(self, sampling: Sampling) -> dict[str, Any]:
        """Return the arguments of `generate`. They suppress the index's symbols, whose rows are untrained."""
        tokenizer = self._mllm.processor.tokenizer
        pad = tokenizer.pad_token_id
        return {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
            "max_new_tokens": sampling.max_tokens,
            "num_return_sequences": sampling.n,
            "suppress_tokens": new_token_ids(self._index) or None,
            "eos_token_id": self._ends,
            "pad_token_id": self._ends[0] if pad is None else pad,
        }
