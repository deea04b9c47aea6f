"""Constrain `generate` of Hugging Face to the identifiers of a trie.

    generate(**inputs, logits_processor=[TrieLogitsProcessor(trie, prompt_length, end_token_id)])

It supports greedy decoding, sampling, beams and any batch. To find the best identifiers of a query,
`scorers.base.recall` is faster: `generate` scores the whole vocabulary at every step.

Depends on the trie and on tensors; independent of models, prompts and search.
Needs torch and transformers; loads on first use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import MissingExtra, SearchError
from llama_index_genret.trie import Trie

try:
    import torch
    from transformers import LogitsProcessor
except ImportError as error:
    raise MissingExtra(
        "`generate` of Hugging Face needs torch and transformers: pip install 'llama-index-genret[train]'."
    ) from error

Int64 = NDArray[np.int64]
_USE_COUNT = getattr(torch._C, "_storage_Use_Count", None)  # without it, no matrix is reused
_KEPT = 2  # `generate` still holds the tensor of the last step when it calls for the next one


class TrieLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Set to -inf every score whose token would leave the trie; `end_token_id` follows an identifier.

        for row, token_ids in enumerate(input_ids[:, prompt_length:]):
            for token in range(vocab):
                if token not in allowed(token_ids): scores[row, token] = -inf

    On a CPU the processor keeps up to two of the matrices that it has returned, to avoid filling new ones with -inf. A
    matrix is reused only when nothing else refers to its storage (no view, no NumPy array, no `output_scores`). The
    processor then resets only the entries of the step that wrote the matrix. A matrix that was changed in place is
    replaced. One change stays undetected: the caller changes a matrix through `.data` or `.numpy()` and then drops it.
    The processor keeps no state of rows, so beams may be reordered and one processor may serve several batches.
    """

    supports_continuous_batching = False

    def __init__(self, trie: Trie, prompt_length: int, end_token_id: int) -> None:
        """Constrain the tokens that follow the prompts.

        Args:
            trie: the allowed identifiers; for all of an index pass `compact(index.trie).base`.
            prompt_length: columns of the prompts in `input_ids`, left padding included; 0 after `inputs_embeds`.
            end_token_id: the only token that may follow a complete identifier. Pass the same as `eos_token_id` of
                `generate`. The processor ignores tokens after the first one, such as padding.
        """
        self.trie, self.prompt_length, self.end_token_id = trie, prompt_length, end_token_id
        self._vocabulary = max(end_token_id, int(trie.token_ids()[-1])) + 1
        self._kept: deque[_Matrix] = deque()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the constrained scores in another tensor; `scores` is unchanged.

        Args:
            input_ids: (rows, prompt_length + generated) token ids of the prompts and of the generated tokens.
            scores: (rows, vocab), logits or log-probabilities.
        Raises:
            SearchError: a row has left the trie, an earlier processor has forbidden every valid token of a row, or
                the trie has tokens beyond the vocabulary.
        """
        if scores.shape[1] < self._vocabulary:
            raise SearchError(
                f"the identifiers have tokens up to {self._vocabulary - 1}, but the model has scores for "
                f"{scores.shape[1]}: resize its embeddings, or load the model of the index."
            )
        row, token_ids = _allowed(self.trie, input_ids, self.prompt_length, self.end_token_id)
        places = torch.from_numpy(row * scores.shape[1] + token_ids).to(scores.device)
        values = scores.reshape(-1)[places]
        if values.isneginf().any():
            self._check_choice(row, values, len(scores))
        matrix = self._take(scores)
        answer = matrix.write(places, values)
        if scores.device.type == "cpu":  # on a GPU torch caches memory, and a fill costs little
            self._kept.append(matrix)
            while len(self._kept) > _KEPT:
                self._kept.popleft()
        return answer  # type: ignore[return-value]

    def _take(self, scores: torch.Tensor) -> _Matrix:
        """Return a kept matrix that nothing else refers to, or a new one.

        A kept matrix is removed from the queue, so that threads cannot share it.
        """
        for _ in range(len(self._kept)):
            try:
                matrix = self._kept.popleft()
            except IndexError:  # another thread took it
                break
            if matrix.is_free_for(scores):
                return matrix
            self._kept.append(matrix)
        return _Matrix.like(scores)

    def _check_choice(self, row: Int64, values: torch.Tensor, n_rows: int) -> None:
        best = np.full(n_rows, -np.inf)
        np.maximum.at(best, row, values.double().cpu().numpy())
        if np.isneginf(best).any():
            raise SearchError(
                f"row {int(best.argmin())}: every token that may follow already has the score -inf. Leave out the "
                "other processor that forbids it, or build a trie of the identifiers that you want."
            )


def prefix_allowed_tokens_fn(
    trie: Trie, prompt_length: int, end_token_id: int
) -> Callable[[int, torch.Tensor], list[int]]:
    """Return the same constraint for `generate(prefix_allowed_tokens_fn=...)`. It works row by row and is far slower.

    Use it for code that accepts no logits processor. Arguments and errors are those of `TrieLogitsProcessor`.
    """

    def allowed(batch_id: int, input_ids: torch.Tensor) -> list[int]:
        _, token_ids = _allowed(trie, input_ids[None], prompt_length, end_token_id)
        return list(token_ids.tolist())

    return allowed


@dataclass
class _Matrix:
    """Scores that are -inf except at the positions that were written last.

    version: torch's count of in-place changes after the last write.
    """

    scores: torch.Tensor
    written: torch.Tensor
    version: int

    @classmethod
    def like(cls, scores: torch.Tensor) -> _Matrix:
        with torch.inference_mode(False):  # torch does not count changes of tensors made in inference mode
            fresh = torch.full(scores.shape, -torch.inf, dtype=scores.dtype, device=scores.device)
        return cls(fresh, torch.zeros(0, dtype=torch.long, device=scores.device), fresh._version)

    def is_free_for(self, scores: torch.Tensor) -> bool:
        """Return True if the matrix fits `scores` and nothing else refers to its storage or has changed it.

        Each tensor and view that a caller holds raises the use count of the storage.
        """
        storage = self.scores.untyped_storage()
        return (
            _USE_COUNT is not None
            and _USE_COUNT(storage._cdata) <= 2  # our tensor, and the line above
            and self.scores._version == self.version
            and (self.scores.shape, self.scores.dtype, self.scores.device)
            == (scores.shape, scores.dtype, scores.device)
        )

    @torch.no_grad()
    def write(self, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        flat = self.scores.view(-1)
        flat.index_fill_(0, self.written, -torch.inf)
        flat.index_copy_(0, places, values)
        self.written, self.version = places, self.scores._version
        return self.scores.detach()


def _allowed(trie: Trie, input_ids: torch.Tensor, prompt_length: int, end_token_id: int) -> tuple[Int64, Int64]:
    """Return the valid next tokens as two flat arrays: the rows, and the token ids."""
    if input_ids.shape[1] < prompt_length:
        raise SearchError(
            f"the rows have {input_ids.shape[1]} tokens, but their prompts alone should have {prompt_length}. "
            "Pass the padded length of the prompts as prompt_length."
        )
    generated = input_ids[:, prompt_length : prompt_length + trie.depth + 1].cpu().numpy()  # later tokens are ignored
    node, length = np.zeros(len(generated), np.int64), np.zeros(len(generated), np.int64)
    for token_ids in generated[:, : trie.depth].T:
        child = np.where(trie.is_leaf(node), node, trie.advance(node, token_ids))
        if child.min(initial=0) < 0:
            raise _off_trie(generated, int(child.argmin()), "begins no identifier of the trie")
        length += child != node
        node = child
    ended = np.flatnonzero(length < generated.shape[1])
    wrong = ended[generated[ended, length[ended]] != end_token_id]
    if len(wrong):
        why = f"continues after a complete identifier with another token than the end token {end_token_id}"
        raise _off_trie(generated, int(wrong[0]), why)
    leaf = trie.is_leaf(node)
    inner, finished = np.flatnonzero(~leaf), np.flatnonzero(leaf)
    children = trie.children(node[inner])
    return (
        np.concatenate([inner[children.row], finished]),
        np.concatenate([children.token_ids, np.full(len(finished), end_token_id)]),
    )


def _off_trie(generated: Int64, row: int, why: str) -> SearchError:
    return SearchError(
        f"row {row} has generated {generated[row].tolist()}, which {why}. prompt_length must be the padded length of "
        "the prompts, and no other processor may force a token."
    )
