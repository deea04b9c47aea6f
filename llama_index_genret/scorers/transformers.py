"""A model of Hugging Face in this process: the default, which needs no server.

The prompt of each query is computed once. All its beams share that KV cache: the tokens of the beams are appended
to it as a *tree*, one forward pass a step, and a 4-D attention mask lets each see the prompt and its own ancestors
only (tree attention, as in SpecInfer, arXiv:2305.09781). Nothing is copied when a beam forks.
Under `Normalise.CHILDREN` only the children's rows of the LM head are computed.

Needs torch; loads on first use.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import torch
from transformers import DynamicCache

from llama_index_genret.errors import ModelError
from llama_index_genret.images import load_image
from llama_index_genret.modeling import Mllm
from llama_index_genret.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Scores, Session
from llama_index_genret.search import Normalise, Rows


class TransformersScorer:
    """Scores with an `Mllm`. Safe to share between threads: one session computes at a time."""

    def __init__(self, mllm: Mllm) -> None:
        self.mllm = mllm
        self._lock = threading.Lock()
        self._decoder = mllm.model.get_decoder()
        head = mllm.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{mllm.name_or_path} has no language-model head.")
        self._weight, self._bias = head.weight, getattr(head, "bias", None)
        self._softcap = getattr(mllm.model.config.get_text_config(), "final_logit_softcapping", None)

    @contextmanager
    def session(self, prompts: Sequence[Prompt], normalise: Normalise) -> Iterator[Session]:
        """See `Scorer.session`. Text and image prompts cannot share a session."""
        with self._lock:
            yield _TreeSession(self, prompts, normalise)

    @asynccontextmanager
    async def async_session(self, prompts: Sequence[Prompt], normalise: Normalise) -> AsyncIterator[AsyncSession]:
        """See `Scorer.async_session`: computes in a thread, one step at a time."""
        yield _ThreadSession(self._lock, _TreeSession(self, prompts, normalise))

    def _prefill(self, prompts: Sequence[Prompt], cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill the cache with the prompts, left-padded.

        Returns:
            hidden (queries, h) of the last token, mask (queries, length) bool: False where padded.
        """
        if all(prompt.image for prompt in prompts):
            inputs = self.mllm.processed([p.text for p in prompts], [load_image(p.image) for p in prompts if p.image])
            output = self.mllm.model.model(**inputs, past_key_values=cache, use_cache=True)
            return torch.as_tensor(output.last_hidden_state[:, -1]), inputs["attention_mask"].bool()
        if any(prompt.image for prompt in prompts):
            raise ModelError("text and image queries cannot share one batch: recall them apart.")
        length = max(len(prompt.token_ids) for prompt in prompts)
        ids = torch.zeros((len(prompts), length), dtype=torch.long)
        mask = torch.zeros((len(prompts), length), dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
            mask[row, length - len(prompt.token_ids) :] = True
        device = self.mllm.model.device
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        output = self._decoder(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True
        )
        return torch.as_tensor(output.last_hidden_state[:, -1]), mask

    def _logits(self, hidden: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """(rows, tokens) float32 logits of the given tokens, or of all."""
        weight: torch.Tensor = self._weight if token_ids is None else self._weight[token_ids]
        logits = (hidden @ weight.T).float()
        if self._bias is not None:
            logits = logits + (self._bias if token_ids is None else self._bias[token_ids])
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


class _TreeSession:
    """The KV cache of one batch of queries, and where each prefix lies in it."""

    def __init__(self, scorer: TransformersScorer, prompts: Sequence[Prompt], normalise: Normalise) -> None:
        self._scorer = scorer
        self._prompts = prompts
        self._normalise = normalise
        self._cache = DynamicCache()
        self._slots: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]
        self._hidden: list[dict[tuple[int, ...], torch.Tensor]] = [{} for _ in prompts]
        self._prompt_mask = torch.zeros((0, 0))

    @torch.inference_mode()
    def score(self, rows: Rows) -> Scores:
        if self._cache.get_seq_length() == 0:
            last, self._prompt_mask = self._scorer._prefill(self._prompts, self._cache)
            self._hidden = [{(): hidden} for hidden in last]
        self._append(rows)
        hidden = torch.stack([self._hidden[row.query][row.prefix] for row in rows])
        if self._normalise is Normalise.VOCABULARY:
            log_probs = self._scorer._logits(hidden, None).log_softmax(-1).double().cpu().numpy()
            return log_probs[np.repeat(np.arange(len(rows)), np.diff(rows.offsets)), rows.token_ids]
        tokens = np.unique(rows.token_ids)
        logits = self._scorer._logits(hidden, torch.from_numpy(tokens).to(hidden.device)).double().cpu().numpy()
        return logits[np.repeat(np.arange(len(rows)), np.diff(rows.offsets)), np.searchsorted(tokens, rows.token_ids)]

    def _append(self, rows: Rows) -> None:
        """Compute the tokens of all prefixes that are not in the cache yet, ancestors included, in one pass."""
        new: list[list[tuple[int, ...]]] = [[] for _ in self._prompts]
        for row in rows:
            for depth in range(1, len(row.prefix) + 1):
                prefix = row.prefix[:depth]
                if prefix not in self._slots[row.query]:
                    self._slots[row.query][prefix] = self._cache.get_seq_length() + len(new[row.query])
                    new[row.query].append(prefix)
        width = max(map(len, new))
        if width == 0:
            return
        n_queries, past = len(self._prompts), self._cache.get_seq_length()
        prompt_length = self._prompt_mask.shape[1]
        ids = torch.zeros((n_queries, width), dtype=torch.long)
        visible = torch.zeros((n_queries, width, past + width), dtype=torch.bool)
        visible[:, :, :prompt_length] = self._prompt_mask.cpu()[:, None]
        visible[:, range(width), range(past, past + width)] = True
        positions = self._prompt_mask.sum(1).cpu()[:, None].repeat(1, width)
        for query, prefixes in enumerate(new):
            for column, prefix in enumerate(prefixes):
                ids[query, column] = prefix[-1]
                positions[query, column] += len(prefix) - 1
                ancestors = [self._slots[query][prefix[:depth]] for depth in range(1, len(prefix))]
                visible[query, column, ancestors] = True
        weight = self._scorer._weight
        mask = torch.zeros(visible.shape, dtype=weight.dtype).masked_fill(~visible, torch.finfo(weight.dtype).min)
        output = self._scorer._decoder(
            input_ids=ids.to(weight.device),
            attention_mask=mask[:, None].to(weight.device),
            position_ids=positions.to(weight.device),
            past_key_values=self._cache,
            use_cache=True,
        )
        for query, prefixes in enumerate(new):
            for column, prefix in enumerate(prefixes):
                self._hidden[query][prefix] = output.last_hidden_state[query, column]


class _ThreadSession:
    def __init__(self, lock: threading.Lock, session: _TreeSession) -> None:
        self._lock = lock
        self._session = session

    async def score(self, rows: Rows) -> Scores:
        return await asyncio.to_thread(self._score, rows)

    def _score(self, rows: Rows) -> Scores:
        with self._lock:
            return self._session.score(rows)
