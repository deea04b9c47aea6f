"""Score with a Hugging Face model in this process. This is the default and needs no server.

The prompt of each query is computed once, and all its beams share that KV cache. Each step appends the tokens of the
beams to the cache as a *tree*, in one forward pass. A 4-D attention mask lets each token attend only to the prompt and
to its own ancestors (tree attention, as in SpecInfer, arXiv:2305.09781). Nothing is copied when a beam forks.
Under `Normalise.CHILDREN` only the children's rows of the LM head are computed.

Needs torch; loads on first use.
"""

from __future__ import annotations

from llama_index_genret.models.mllm import Mllm  # isort: skip  # first: it names the extra that brings torch

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from llama_index_genret.corpus.images import load_image
from llama_index_genret.errors import ModelError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import AsyncSession, Scores, Session, ThreadSession
from llama_index_genret.scorers.rerank import Continuation, Float64
from llama_index_genret.search import Normalise, Row, Rows

LIKELIHOOD_BATCH = 16
"""Number of continuations in one forward pass."""


class TransformersScorer:
    """A scorer with an `Mllm`. Threads may share it; only one session computes at a time."""

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
        """See `Scorer.async_session`. Each step runs in a thread, one step at a time."""
        yield ThreadSession(_TreeSession(self, prompts, normalise), self._lock)

    def _prefill(self, prompts: Sequence[Prompt], cache: DynamicCache) -> _Prefilled:
        """Fill the cache with the prompts, left-padded."""
        if all(prompt.image for prompt in prompts):
            images = [load_image(prompt.image) for prompt in prompts if prompt.image]
            inputs = self.mllm.process([p.text for p in prompts], images, [p.rest for p in prompts])
            core = self.mllm.model.model
            output = core(**inputs, past_key_values=cache, use_cache=True)
            mask = inputs["attention_mask"].bool()
            # With three-dimensional positions (M-RoPE) an image has fewer positions than tokens.
            deltas = getattr(core, "rope_deltas", None)
            end = mask.sum(1, keepdim=True) + (0 if deltas is None else deltas)
            return _Prefilled(output.last_hidden_state, mask.cpu(), end.cpu())
        if any(prompt.image for prompt in prompts):
            raise ModelError("text and image queries cannot share one batch: recall them in separate batches.")
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
        return _Prefilled(output.last_hidden_state, mask.cpu(), mask.sum(1, keepdim=True).cpu())

    def _log_likelihoods(self, continuations: Sequence[Continuation]) -> torch.Tensor:
        """Return (n,) log-likelihoods of one batch. The scored tokens are the last ones of each left-padded row."""
        longest = max(len(one.token_ids) for one in continuations)
        hidden = self._prefill([one.whole for one in continuations], DynamicCache()).hidden[:, -longest - 1 : -1]
        places = [(row, column) for row, one in enumerate(continuations) for column in range(-len(one.token_ids), 0)]
        row, column = torch.tensor(places).T
        token_ids = torch.tensor([token for one in continuations for token in one.token_ids], device=hidden.device)
        log_probs = self._logits(hidden[row, column], None).log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
        return torch.zeros(len(continuations), dtype=torch.float64).index_add(0, row, log_probs.double().cpu())

    def _logits(self, hidden: torch.Tensor, token_ids: torch.Tensor | None) -> torch.Tensor:
        """Return (rows, tokens) float32 logits of the given tokens, or of the whole vocabulary for None."""
        rows = slice(None) if token_ids is None else token_ids
        logits: torch.Tensor = (hidden @ self._weight[rows].T).float()
        if self._bias is not None:
            logits = logits + self._bias[rows]
        if self._softcap:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


@dataclass(frozen=True)
class _Prefilled:
    """The hidden states of the prompts of one batch.

    hidden: (queries, length, h) hidden states of every token, on the model's device.
    mask: (queries, length) bool, on the CPU: False for padding.
    end: (queries, 1) int64, on the CPU: the position of the token that follows the prompt.
    """

    hidden: torch.Tensor
    mask: torch.Tensor
    end: torch.Tensor


class _TreeSession:
    """The KV cache of one batch of queries, and the position of each prefix in it.

    A query's slot 0 is the end of its prompt; slot i is the token at position prompt length + i - 1 of the cache.
    """

    def __init__(self, scorer: TransformersScorer, prompts: Sequence[Prompt], normalise: Normalise) -> None:
        self._scorer = scorer
        self._prompts = prompts
        self._normalise = normalise
        self._cache = DynamicCache()
        self._slots: list[dict[tuple[int, ...], int]] = [{(): 0} for _ in prompts]
        self._hidden = torch.zeros((0, 0, 0))  # (queries, slots, h)
        self._prompt_mask = torch.zeros((0, 0))
        self._prompt_end = torch.zeros((0, 0))

    @torch.inference_mode()
    def score(self, rows: Rows) -> Scores:
        row_list = list(rows)
        if self._hidden.shape[1] == 0:
            computed = self._scorer._prefill(self._prompts, self._cache)
            self._hidden, self._prompt_mask = computed.hidden[:, -1:], computed.mask
            self._prompt_end = computed.end
        self._append(row_list)
        slots = [self._slots[row.query][row.prefix] for row in row_list]
        hidden = self._hidden[torch.from_numpy(rows.query), slots]
        alphabet = torch.from_numpy(rows.alphabet.astype(np.int64)).to(hidden.device)
        if self._normalise is Normalise.VOCABULARY:
            block = self._scorer._logits(hidden, None).log_softmax(-1)[:, alphabet]
        else:
            block = self._scorer._logits(hidden, alphabet)
        return rows.gather(block.cpu().numpy())

    @torch.inference_mode()
    def log_likelihoods(self, continuations: Sequence[Continuation]) -> Float64:
        likelihoods = np.zeros(len(continuations))
        for with_image in (True, False):  # they cannot share a batch
            rows = [row for row, one in enumerate(continuations) if (one.prompt.image is not None) is with_image]
            for start in range(0, len(rows), LIKELIHOOD_BATCH):
                part = rows[start : start + LIKELIHOOD_BATCH]
                likelihoods[part] = self._scorer._log_likelihoods([continuations[row] for row in part]).numpy()
        return likelihoods

    def _append(self, rows: Sequence[Row]) -> None:
        """Compute the tokens of all prefixes that are not in the cache, ancestors included, in one forward pass."""
        known = self._hidden.shape[1]
        new: list[list[tuple[int, ...]]] = [[] for _ in self._prompts]
        for row in rows:
            slots = self._slots[row.query]
            if row.prefix in slots:
                continue
            for depth in range(1, len(row.prefix) + 1):
                prefix = row.prefix[:depth]
                if prefix not in slots:
                    slots[prefix] = known + len(new[row.query])
                    new[row.query].append(prefix)
        width = max(map(len, new))
        if width == 0:
            return
        prompt_length = self._prompt_mask.shape[1]
        first = prompt_length + known - 1
        places = [(query, column) for query, prefixes in enumerate(new) for column in range(len(prefixes))]
        ids = torch.zeros((len(new), width), dtype=torch.long)
        depths = torch.ones((len(new), width), dtype=torch.long)
        query, column = torch.tensor(places).T
        ids[query, column] = torch.tensor([prefix[-1] for prefixes in new for prefix in prefixes])
        depths[query, column] = torch.tensor([len(prefix) for prefixes in new for prefix in prefixes])
        ancestors = [
            (query, column, prompt_length + self._slots[query][prefix[:depth]] - 1)
            for query, prefixes in enumerate(new)
            for column, prefix in enumerate(prefixes)
            for depth in range(1, len(prefix))
        ]
        visible = torch.zeros((len(new), width, first + width), dtype=torch.bool)
        visible[:, :, :prompt_length] = self._prompt_mask[:, None]
        visible[:, range(width), range(first, first + width)] = True
        if ancestors:
            visible[tuple(torch.tensor(ancestors).T)] = True
        weight = self._scorer._weight
        mask = torch.zeros(visible.shape, dtype=weight.dtype).masked_fill(~visible, torch.finfo(weight.dtype).min)
        output = self._scorer._decoder(
            input_ids=ids.to(weight.device),
            attention_mask=mask[:, None].to(weight.device),
            position_ids=(self._prompt_end + depths - 1).to(weight.device),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._hidden = torch.cat([self._hidden, output.last_hidden_state], 1)
