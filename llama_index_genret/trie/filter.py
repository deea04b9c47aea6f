"""Stores the leaves that a search may return: a bitmap in leaf order with rank counts.

Depends on leaf numbers; independent of token ids, records and searches. The slow twin is `_reference.count_allowed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import FilterError
from llama_index_genret.trie.flat import Int64, read_only

_EARLIER_BITS = (np.uint64(1) << np.arange(64, dtype=np.uint64)) - np.uint64(1)  # entry i: bits 0 .. i - 1


@dataclass(frozen=True, eq=False)
class LeafFilter:
    """The set of allowed leaves: a bitmap in leaf order, with the number of allowed leaves before every word.

    n_leaves: number of leaves of the trie that the filter was made for.
    words: (n_leaves // 64 + 1,) uint64; bit i % 64 of word i // 64 stands for leaf i.
    before: (n_leaves // 64 + 1,) int64, number of allowed leaves before every word.
    """

    n_leaves: int
    words: NDArray[np.uint64]
    before: Int64

    @classmethod
    def from_mask(cls, mask: NDArray[np.bool_]) -> LeafFilter:
        """Pack a mask of shape (n_leaves,), in leaf order.

        Raises:
            FilterError: the mask is not a one-dimensional array of booleans.
        """
        if mask.ndim != 1 or mask.dtype != np.bool_:
            raise FilterError(f"a leaf mask must be (n_leaves,) of bool, not {mask.shape} of {mask.dtype}.")
        packed = np.packbits(mask, bitorder="little")
        words = np.zeros(len(mask) // 64 + 1, "<u8")
        words.view(np.uint8)[: len(packed)] = packed
        return cls._from_words(len(mask), words)

    @classmethod
    def _from_words(cls, n_leaves: int, words: NDArray[np.uint64]) -> LeafFilter:
        before = np.zeros(len(words), np.int64)
        np.cumsum(_popcount(words[:-1]), out=before[1:])
        return cls(n_leaves, read_only(words), read_only(before))

    @cached_property
    def n_allowed(self) -> int:
        """Return the number of allowed leaves."""
        return int(self.before_leaf(np.array(self.n_leaves)))

    def __and__(self, other: LeafFilter) -> LeafFilter:
        """Return the filter of the leaves that both filters allow.

        Raises:
            FilterError: the two were made for tries of different sizes.
        """
        if self.n_leaves != other.n_leaves:
            raise FilterError(
                f"filters over {self.n_leaves} and {other.n_leaves} leaves belong to different tries. "
                "Make both for the same trie."
            )
        return self._from_words(self.n_leaves, self.words & other.words)

    def without(self, leaves: Int64) -> LeafFilter:
        """Return a filter that also excludes the given leaves."""
        words = self.words.copy()
        np.bitwise_and.at(words, leaves >> 6, ~(np.uint64(1) << (leaves & 63).astype(np.uint64)))
        return self._from_words(self.n_leaves, words)

    def resized(self, n_leaves: int) -> LeafFilter:
        """Return the filter for a trie with fewer or more leaves at the end. Extra leaves are allowed."""
        bits = np.unpackbits(self.words.view(np.uint8), count=min(n_leaves, self.n_leaves), bitorder="little")
        return self.from_mask(np.pad(bits.view(np.bool_), (0, n_leaves - len(bits)), constant_values=True))

    def contains(self, leaves: Int64) -> NDArray[np.bool_]:
        """Return True for each leaf that is allowed."""
        bits = self.words.take(leaves >> 6) >> (leaves & 63).astype(np.uint64)
        return (bits & np.uint64(1)).astype(np.bool_)

    def count(self, lo: Int64, hi: Int64) -> Int64:
        """Count the allowed leaves in lo .. hi - 1, exactly, for two arrays of one shape.

            for first, end in zip(lo, hi): yield sum(mask[first:end])

        Raises:
            FilterError: a range is reversed or exceeds 0 .. n_leaves, as the filter was made for another trie.
        """
        lo, hi = np.asarray(lo), np.asarray(hi)
        if lo.size and (lo.min() < 0 or hi.max() > self.n_leaves or (hi < lo).any()):
            raise FilterError(
                f"cannot count leaves {lo.min()} .. {hi.max()} with a filter over {self.n_leaves} leaves. "
                "Rebuild the filter from the trie that is searched."
            )
        return self.before_leaf(hi) - self.before_leaf(lo)

    def before_leaf(self, leaves: Int64) -> Int64:
        """Count the allowed leaves before each given leaf. Leaf numbers are not checked."""
        word = leaves >> 6
        earlier = self.words.take(word) & _EARLIER_BITS.take(leaves & 63)
        return np.asarray(self.before.take(word) + _popcount(earlier))


def _popcount_by_table(words: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Count the set bits of every word, for NumPy 1, which has no `np.bitwise_count`."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
    by_byte = ones[np.ascontiguousarray(words).reshape(-1, 1).view(np.uint8)]
    return np.asarray(by_byte.sum(axis=1, dtype=np.uint8).reshape(np.shape(words)))


_popcount = np.bitwise_count if hasattr(np, "bitwise_count") else _popcount_by_table
