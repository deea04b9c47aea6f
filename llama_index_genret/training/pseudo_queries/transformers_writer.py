"""The index's base model in this process as a writer. Needs torch and transformers; loads on first use."""

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
    """Writes with `generate` of Hugging Face: all requests, and all answers of each, as the rows of one batch.

    Args:
        mllm: of `modeling.load_base`, which has checked that it is the index's own.
    """

    def __init__(self, index: Index, mllm: Mllm) -> None:
        self.model, self.fingerprint = mllm.name_or_path, index.manifest.model.fingerprint
        self._index, self._mllm = index, mllm
        configured = mllm.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        self._ends = sorted({index.end_token, *(end for end in ends if end is not None)})

    @torch.inference_mode()
    def write(self, requests: Sequence[WriterRequest], sampling: Sampling) -> list[list[WriterReply]]:
        """See `Writer.write`. Sampled with one seed of all requests: the answers are those of the batch."""
        pictures = {request.image: None for request in requests}
        images = {path: load_image(path) for path in pictures}
        prompts = [self._index.prompts.about_image(self._index.tokenizer, r.image, r.text) for r in requests]
        inputs = self._mllm.process(
            [prompt.text for prompt in prompts],
            [images[request.image] for request in requests],
            [prompt.rest for prompt in prompts],
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(*(request.seed for request in requests)))
            output = self._mllm.model.generate(**inputs, **self._generation(sampling))
        said = output[:, inputs["input_ids"].shape[1] :]
        texts = self._mllm.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
        ended = torch.isin(said, torch.tensor(self._ends, device=said.device)).any(1).tolist()
        answers = [WriterReply(text, end) for text, end in zip(texts, ended, strict=True)]
        return [answers[start : start + sampling.n] for start in range(0, len(answers), sampling.n)]

    def _generation(self, sampling: Sampling) -> dict[str, Any]:
        """The index's symbols have rows in the model that nobody has trained yet: it may not say them."""
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
