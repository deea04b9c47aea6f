"""Define the options of a search, the rows that it sends to a scorer, and its results.

Depends on the trie's filters and priors; independent of text and models.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, Protocol, get_args, overload

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import SearchError
from llama_index_genret.trie import LeafFilter, TriePrior

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


Mode = Literal["beam", "exact"]
"""How a search prunes; see `SearchOptions`."""


@dataclass(frozen=True)
class SearchOptions:
    """Hold the options of a search, which are checked when they are made and apply to each query alone.

    Args:
        k: results wanted; fewer come back only where `leaf_filter` allows fewer identifiers.
        width: prefixes that are expanded together; never less than `k`, 10 if not given.
        mode: "beam" drops all but the best `width` prefixes after each step. "exact" expands the best prefixes first,
            and drops none until the best `k` identifiers are certain.
        max_expansions: limits the prefixes that mode "exact" expands before it continues as a beam of `width`, from 1.
            `Ranking.exact` is then False unless the result is certain all the same. None, which is the default and
            the only value for mode "beam": no limit, and mode "exact" always returns the exact result.
        normalise: the tokens over which probabilities sum to one.
        leaf_filter: leaves that may be returned. It prunes, and leaves the scores of the others unchanged.
        prior: log-priors of the images in the searched trie; needed where `eta` is not 0.
        eta: weight of the log-prior that is subtracted from log p, 0 for none.
    Raises:
        SearchError: k, width or max_expansions is less than 1, the mode is unknown, mode "beam" has max_expansions,
            or eta is negative, not finite, or without a prior.
    """

    k: int
    width: int | None = None
    mode: Mode = "beam"
    max_expansions: int | None = None
    normalise: Normalise = Normalise.CHILDREN
    leaf_filter: LeafFilter | None = None
    prior: TriePrior | None = None
    eta: float = 0.0

    def __post_init__(self) -> None:
        for name in ("k", "width", "max_expansions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SearchError(f"{name}={value} must be at least 1.")
        if self.mode not in get_args(Mode):
            raise SearchError(f"unknown mode {self.mode!r}; choose from: {', '.join(get_args(Mode))}.")
        if self.mode == "beam" and self.max_expansions is not None:
            raise SearchError(
                f"max_expansions={self.max_expansions} is for mode='exact', got mode='beam': leave one of them out."
            )
        if not 0.0 <= self.eta < math.inf:
            raise SearchError(f"eta={self.eta} must be at least 0, and finite.")
        if self.eta and self.prior is None:
            raise SearchError(
                f"eta={self.eta} needs the prior of the images, which is not there: run `genret tune INDEX`."
            )


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
