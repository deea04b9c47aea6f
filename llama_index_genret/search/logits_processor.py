"""For people who call `generate` of Hugging Face themselves: a model may only say identifiers of the trie.

    generate(**inputs, logits_processor=[TrieLogitsProcessor(trie, prompt_length, end_token_id)])

Greedy, sampling or beams, any batch. Knows the trie and tensors; nothing of models, prompts or search. For the best
identifiers of a query `scorers.base.recall` is faster: `generate` scores the whole vocabulary at every step.

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
_USE_COUNT = getattr(torch._C, "_storage_Use_Count", None)  # without it, no matrix is used again
_KEPT = 2  # `generate` still holds the tensor of the last step when it asks for the next one


class TrieLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Sets to -inf every score whose token would leave the trie; an identifier is followed by `end_token_id`.

        for row, token_ids in enumerate(input_ids[:, prompt_length:]):
            for token in range(vocab):
                if token not in allowed(token_ids): scores[row, token] = -inf

    On a CPU the processor keeps up to two of the matrices that it has returned: nearly all of one is -inf and stays
    so, and only the entries of the last step are written. A matrix is used again only when nothing refers to its
    storage any more (no view, no NumPy array, no `output_scores`), and is made anew when it was changed in place. The
    one thing that goes unnoticed is a change through `.data` or `.numpy()` by a caller who then drops the tensor.
    Nothing is remembered of rows, so beams may be reordered and one processor may serve several batches.
    """

    supports_continuous_batching = False

    def __init__(self, trie: Trie, prompt_length: int, end_token_id: int) -> None:
        """Constrain what follows the prompts.

        Args:
            trie: of an index, `compact(index.trie).base`.
            prompt_length: columns of the prompts in `input_ids`, left padding included; 0 after `inputs_embeds`.
            end_token_id: all that may follow a whole identifier, however long the row goes on: what `eos_token_id`
                of `generate` should be. What `generate` puts after it, such as padding, is not looked at.
        """
        self.trie, self.prompt_length, self.end_token_id = trie, prompt_length, end_token_id
        self._vocabulary = max(end_token_id, int(trie.token_ids()[-1])) + 1
        self._kept: deque[_Matrix] = deque()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Another tensor than `scores`, which is left as it is.

        Args:
            input_ids: (rows, prompt_length + generated) of prompts and what followed.
            scores: (rows, vocab), logits or log-probabilities.
        Raises:
            SearchError: a row has left the trie, an earlier processor has forbidden all that a row may take, or the
                trie has tokens beyond the vocabulary.
        """
        if scores.shape[1] < self._vocabulary:
            raise SearchError(
                f"identifiers have tokens up to {self._vocabulary - 1}, the model has scores for {scores.shape[1]}: "
                "resize its embeddings, or load the model that the index was made with."
            )
        row, token_ids = _allowed(self.trie, input_ids, self.prompt_length, self.end_token_id)
        places = torch.from_numpy(row * scores.shape[1] + token_ids).to(scores.device)
        values = scores.reshape(-1)[places]
        if values.isneginf().any():
            self._check_choice(row, values, len(scores))
        matrix = self._take(scores)
        answer = matrix.write(places, values)
        if scores.device.type == "cpu":  # elsewhere torch itself keeps memory, and a fill costs little
            self._kept.append(matrix)
            while len(self._kept) > _KEPT:
                self._kept.popleft()
        return answer  # type: ignore[return-value]

    def _take(self, scores: torch.Tensor) -> _Matrix:
        """A matrix that nobody sees, from those kept, or a new one. Taken out, so that threads cannot share it."""
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
                f"row {int(best.argmin())}: every token that may follow has the score -inf already. Leave out the "
                "other processor that forbids it, or build a trie of the identifiers that you want."
            )


def prefix_allowed_tokens_fn(
    trie: Trie, prompt_length: int, end_token_id: int
) -> Callable[[int, torch.Tensor], list[int]]:
    """The same constraint as `generate(prefix_allowed_tokens_fn=...)` takes it: row by row, so far slower.

    For code that accepts nothing else; arguments and errors of `TrieLogitsProcessor`.
    """

    def allowed(batch_id: int, input_ids: torch.Tensor) -> list[int]:
        _, token_ids = _allowed(trie, input_ids[None], prompt_length, end_token_id)
        return list(token_ids.tolist())

    return allowed


@dataclass
class _Matrix:
    """Scores that are -inf but for the places that were written last.

    version: torch's count of changes in place, as it stood after the last writing.
    """

    scores: torch.Tensor
    written: torch.Tensor
    version: int

    @classmethod
    def like(cls, scores: torch.Tensor) -> _Matrix:
        with torch.inference_mode(False):  # tensors of inference mode do not count their changes
            fresh = torch.full(scores.shape, -torch.inf, dtype=scores.dtype, device=scores.device)
        return cls(fresh, torch.zeros(0, dtype=torch.long, device=scores.device), fresh._version)

    def is_free_for(self, scores: torch.Tensor) -> bool:
        """Whether nobody else refers to the storage or has changed it, and `scores` would fit.

        A caller holds a tensor of his own over the storage, so its count tells of him and of all his views.
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
    """What may follow each row, as (row, token id) pairs: one flat array of each."""
    if input_ids.shape[1] < prompt_length:
        raise SearchError(
            f"the rows have {input_ids.shape[1]} tokens, their prompts alone should have {prompt_length}."
        )
    generated = input_ids[:, prompt_length : prompt_length + trie.depth + 1].cpu().numpy()  # no later one matters
    node, length = np.zeros(len(generated), np.int64), np.zeros(len(generated), np.int64)
    for token_ids in generated[:, : trie.depth].T:
        child = np.where(trie.is_leaf(node), node, trie.advance(node, token_ids))
        if child.min(initial=0) < 0:
            raise _strayed(generated, int(child.argmin()), "begins no identifier of the trie")
        length += child != node
        node = child
    ended = np.flatnonzero(length < generated.shape[1])
    wrong = ended[generated[ended, length[ended]] != end_token_id]
    if len(wrong):
        raise _strayed(generated, int(wrong[0]), f"goes on after a whole identifier, not with the end {end_token_id}")
    leaf = trie.is_leaf(node)
    inner, finished = np.flatnonzero(~leaf), np.flatnonzero(leaf)
    children = trie.children(node[inner])
    return (
        np.concatenate([inner[children.row], finished]),
        np.concatenate([children.token_ids, np.full(len(finished), end_token_id)]),
    )


def _strayed(generated: Int64, row: int, why: str) -> SearchError:
    return SearchError(
        f"row {row} has generated {generated[row].tolist()}, which {why}. prompt_length must be the padded length of "
        "the prompts, and no other processor may force a token."
    )
