"""What a search asks of a scorer, and what it gives: rows, hits, rankings.

Knows token ids and numbers only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


class Normalise(str, Enum):
    """Over which tokens a step's probabilities sum to one.

    CHILDREN: over the valid next tokens of the trie. `p` is then a distribution over the images of the
        index, steps with one choice cost nothing, and a scorer needs only the children's logits.
    VOCABULARY: over the whole vocabulary, which is what the beams of Hugging Face and vLLM compare;
        `p` also carries how sure the model is that an identifier comes at all.
    """

    CHILDREN = "children"
    VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class Row:
    """One unfinished identifier whose next token is to be scored.

    query: position of its prompt among the prompts of the session.
    prefix: the identifier's tokens so far, which follow the prompt.
    token_ids: (m,) int64, the tokens to score: the children of the prefix in the trie.
    """

    query: int
    prefix: tuple[int, ...]
    token_ids: Int64


class Rows(Sequence[Row]):
    """The n rows of one step over all queries: a sequence of `Row`, and the same as arrays.

    query: (n,) int64, ascending. prefixes: (n, depth) int32, -1 after the end.
    offsets: (n + 1,) int64, the tokens of row i are token_ids[offsets[i] : offsets[i + 1]].
    """

    def __init__(self, query: Int64, prefixes: NDArray[np.int32], tokens: Tokens) -> None:
        self.query, self.prefixes, self.offsets = query, prefixes, tokens.offsets
        self._tokens = tokens

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Rows:
        """The arrays of some rows: for asking a scorer by hand."""
        prefixes = np.full((len(rows), max((len(row.prefix) for row in rows), default=0) + 1), -1, np.int32)
        for i, row in enumerate(rows):
            prefixes[i, : len(row.prefix)] = row.prefix
        token_ids = np.concatenate([row.token_ids for row in rows]) if rows else np.zeros(0, np.int64)
        offsets = np.cumsum([0, *(len(row.token_ids) for row in rows)])
        return cls(np.array([row.query for row in rows], np.int64), prefixes, _RaggedTokens(token_ids, offsets))

    @property
    def token_ids(self) -> Int64:
        """(m,) int64, the tokens to score, of all rows, one row after another."""
        return self._tokens.token_ids

    @property
    def alphabet(self) -> NDArray[np.integer]:
        """(a,) ascending: holds all `token_ids`, and few others."""
        return self._tokens.alphabet

    def gather(self, block: NDArray[np.floating]) -> NDArray[np.floating]:
        """(m,) scores out of a `block` (n, a) that has a column for each token of `alphabet`."""
        return self._tokens.gather(block)

    def split(self, scores: Float64) -> list[Float64]:
        """The scores of each row."""
        return np.split(scores, self.offsets[1:-1])

    def __len__(self) -> int:
        return len(self.query)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[place] for place in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        prefix = tuple(token for token in self.prefixes[i].tolist() if token >= 0)
        return Row(int(self.query[i]), prefix, self.token_ids[self.offsets[i] : self.offsets[i + 1]])


class Tokens(Protocol):
    """Ragged token ids; an `Expansion` computes them when they are asked for."""

    @property
    def offsets(self) -> Int64:
        """(rows + 1,): where each row's tokens begin and end."""

    @property
    def token_ids(self) -> Int64:
        """(tokens,): the rows' tokens, one row after another."""

    @property
    def alphabet(self) -> NDArray[np.integer]:
        """(a,) ascending: holds all `token_ids`, and few others."""

    def gather(self, block: NDArray[np.floating]) -> NDArray[np.floating]:
        """(tokens,): of (rows, alphabet) values those of each row's own tokens."""


@dataclass(frozen=True)
class _RaggedTokens:
    token_ids: Int64
    offsets: Int64

    @property
    def alphabet(self) -> Int64:
        return np.unique(self.token_ids)

    def gather(self, block: NDArray[np.floating]) -> NDArray[np.floating]:
        rows = np.repeat(np.arange(len(block)), np.diff(self.offsets))
        return np.asarray(block[rows, np.searchsorted(self.alphabet, self.token_ids)])


class Hit(NamedTuple):
    """One image found. `leaf` is its leaf number in the trie that was searched, `key` what the leaf stands for.

    log_prob: natural logarithm, <= 0, under the search's `Normalise`.
    ranked_by: what it is ranked by where that is not `log_prob`: `log_prob` less eta times the logarithm of the prior,
        and what a re-ranking adds (`scorers.rerank`). Natural logarithm, of any sign.
    """

    leaf: int
    key: int
    token_ids: tuple[int, ...]
    log_prob: float
    ranked_by: float | None = None

    @property
    def score(self) -> float:
        """In (0, 1], in the order of the ranking. Too small for a float, it is given as the smallest normal float.

        The probability; of a hit with `ranked_by` its logistic function, which is p / (p + prior ** eta): one half
        where the query made the image just as probable as its discounted prior. It is more comparable between queries
        than p, depends on no other hit, and is no probability of the image.
        """
        if self.ranked_by is None:
            return max(math.exp(min(self.log_prob, 0.0)), sys.float_info.min)
        odds = math.exp(-abs(self.ranked_by))
        return max((1.0 if self.ranked_by > 0 else odds) / (1.0 + odds), sys.float_info.min)


@dataclass(frozen=True)
class Ranking:
    """What a search found for one query, best first; ties in the order of the identifiers' token ids.

    exact: whether these are for certain the best of all identifiers, as scoring every one would rank them.
    nodes_expanded: prefixes whose children were scored.
    """

    hits: tuple[Hit, ...]
    exact: bool
    nodes_expanded: int


Steps = Generator[Rows, NDArray[np.floating], list[Ranking]]
