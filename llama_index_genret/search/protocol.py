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
from llama_index_genret.trie import Expansion, LeafFilter, TriePrior

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


class Normalise(str, Enum):
    """The set of tokens over which the probabilities of one step sum to one.

    CHILDREN: the valid next tokens of the trie. The probabilities of all identifiers of the index then sum to one,
        steps with one choice cost nothing, and a scorer needs only the children's logits.
    VOCABULARY: the whole vocabulary, as in the beams of Hugging Face and vLLM. The probability of an identifier then
        includes the probability that the model generates an identifier at all.
    """

    CHILDREN = "children"
    VOCABULARY = "vocabulary"


Mode = Literal["beam", "exact"]
"""The way in which a search prunes; see `SearchOptions`."""


@dataclass(frozen=True)
class SearchOptions:
    """The options of a search. The constructor checks them, and they apply to each query alone.

    Args:
        k: number of results. A search returns fewer only if the trie or `leaf_filter` allows fewer identifiers.
        width: prefixes that are expanded together, never less than `k`; None: 10, or `k` if that is more.
        mode: "beam" drops all but the best `width` prefixes after each step. "exact" expands the best prefixes first,
            and drops none until the best `k` identifiers are certain.
        max_expansions: limits the prefixes that mode "exact" expands before it continues as a beam of `width`, from 1.
            `Ranking.exact` is then False unless the bounds prove the result. The default None sets no limit, and mode
            "exact" always returns the exact result. Mode "beam" allows only None.
        normalise: the tokens over which probabilities sum to one, default CHILDREN.
        leaf_filter: leaves that may be returned, None for all. The search prunes the other leaves and does not change
            the scores of those that remain.
        prior: log-priors of the images in the searched trie; required unless `eta` is 0.
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
                f"eta={self.eta} needs the prior of the images, but there is none: run `genret tune INDEX`."
            )


@dataclass(frozen=True)
class Row:
    """One unfinished identifier whose next token the scorer must score.

    query: position of its prompt among the prompts of the session.
    prefix: the tokens of the identifier so far; they follow the prompt.
    token_ids: (m,) int64, the tokens to score: the children of the prefix in the trie.
    """

    query: int
    prefix: tuple[int, ...]
    token_ids: Int64


class Rows(Sequence[Row]):
    """The n rows of one step over all queries: a sequence of `Row`, and the same as arrays.

    query: (n,) int64, ascending.
    prefixes: (n, depth) int32, filled with -1 after the last token.
    offsets: (n + 1,) int64; the tokens of row i are token_ids[offsets[i] : offsets[i + 1]].
    """

    def __init__(self, query: Int64, prefixes: NDArray[np.int32], tokens: Tokens) -> None:
        self.query, self.prefixes, self.offsets = query, prefixes, tokens.offsets
        self._tokens = tokens

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Rows:
        """Build the arrays from rows, for calling a session without a search."""
        prefixes = np.full((len(rows), max((len(row.prefix) for row in rows), default=0) + 1), -1, np.int32)
        for i, row in enumerate(rows):
            prefixes[i, : len(row.prefix)] = row.prefix
        token_ids = np.concatenate([row.token_ids for row in rows]) if rows else np.zeros(0, np.int64)
        offsets = np.cumsum([0, *(len(row.token_ids) for row in rows)])
        return cls(np.array([row.query for row in rows], np.int64), prefixes, _RaggedTokens(token_ids, offsets))

    @property
    def expansion(self) -> Expansion | None:
        """The trie nodes that the tokens lead to, or None for rows that no search has made."""
        return self._tokens if isinstance(self._tokens, Expansion) else None

    @property
    def token_ids(self) -> Int64:
        """Return (m,) int64, the tokens to score of all rows, one row after another."""
        return self._tokens.token_ids

    @property
    def alphabet(self) -> NDArray[np.integer]:
        """Return (a,) ascending token ids: all of `token_ids`, and few others."""
        return self._tokens.alphabet

    def gather(self, block: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the (m,) scores of `token_ids` from a `block` (n, a) with one column for each token of `alphabet`."""
        return self._tokens.gather(block)

    def split(self, scores: Float64) -> list[Float64]:
        """Return one array for each row from the (m,) scores of `token_ids`."""
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
    """Ragged token ids; an `Expansion` computes them on access."""

    @property
    def offsets(self) -> Int64:
        """Return (rows + 1,): the positions at which the tokens of each row begin and end."""

    @property
    def token_ids(self) -> Int64:
        """Return (tokens,): the tokens of all rows, one row after another."""

    @property
    def alphabet(self) -> NDArray[np.integer]:
        """Return (a,) ascending token ids: all of `token_ids`, and few others."""

    def gather(self, block: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return (tokens,): for each row, the values of its own tokens from a (rows, alphabet) block."""


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
    """One image that a search has found.

    leaf: its leaf number in the searched trie.
    key: the key that the trie holds for the leaf; in an index, the row of the record.
    log_prob: natural logarithm of its probability, <= 0, under the `Normalise` of the search.
    ranked_by: the value by which it is ranked, None if that is `log_prob`. It is `log_prob` less eta times the
        logarithm of the prior, plus the term that a re-ranking adds (`scorers.rerank`). Natural logarithm, any sign.
    """

    leaf: int
    key: int
    token_ids: tuple[int, ...]
    log_prob: float
    ranked_by: float | None = None

    @property
    def score(self) -> float:
        """Return the score of the hit, in (0, 1] and in the order of the ranking.

        Without `ranked_by` the score is the probability. With `ranked_by` it is the logistic function of that value,
        p / (p + prior ** eta) if nothing was re-ranked. It is then one half if the query makes the image as probable as
        its discounted prior. It is more comparable between queries than p and depends on no other hit, but it is not
        the probability of the image. A value too small for a float is returned as the smallest normal float.
        """
        if self.ranked_by is None:
            return max(math.exp(min(self.log_prob, 0.0)), sys.float_info.min)
        odds = math.exp(-abs(self.ranked_by))
        return max((1.0 if self.ranked_by > 0 else odds) / (1.0 + odds), sys.float_info.min)


@dataclass(frozen=True)
class Ranking:
    """The hits of a search for one query, best first, ties in the order of the identifiers' token ids.

    exact: True if the hits are certainly the best of all identifiers, in the order that scoring each of them gives.
    nodes_expanded: prefixes whose children were scored.
    """

    hits: tuple[Hit, ...]
    exact: bool
    nodes_expanded: int


Steps = Generator[Rows, NDArray[np.floating], list[Ranking]]
