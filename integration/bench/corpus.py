"""The identifiers, prefixes and logits that every benchmark runs on. Knows NumPy only.

The setting: L = 4 symbols out of K = 256, each level with token ids of its own, the last 1,024 of a vocabulary of
152,000: `<a_0>` ... `<d_255>`. Rows are prefixes of random identifiers: these have the fan-outs that beams meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

LEVELS, SYMBOLS, VOCAB = 4, 256, 152_000
FIRST_TOKEN = VOCAB - LEVELS * SYMBOLS
BEAMS = 10
_LAWS = 4096
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


def vocabulary() -> list[str]:
    """Return every token's text: filler, then the identifier tokens."""
    filler = [f"token{token}" for token in range(FIRST_TOKEN)]
    return filler + [f"<{'abcd'[level]}_{symbol}>" for level in range(LEVELS) for symbol in range(SYMBOLS)]


def hierarchical_codes(n: int, seed: int) -> NDArray[np.uint8]:
    """(n, LEVELS) distinct symbols, sorted. Below each prefix they follow a Zipf law of its own order and skew.

    Prefixes share 4,096 such laws of exponent 0 to 1.6. The fan-outs are those that codes of clustered images have:
    full near the root, a few children near the leaves.
    """
    random = np.random.default_rng(seed)
    skew = random.uniform(0, 1.6, _LAWS)
    cumulative = np.cumsum(np.arange(1, SYMBOLS + 1) ** -skew[:, None], axis=1)
    cumulative /= cumulative[:, -1:]
    symbol_of_rank = random.permuted(np.tile(np.arange(SYMBOLS), (_LAWS, 1)), axis=1)
    table = (cumulative + np.arange(_LAWS)[:, None]).ravel()
    packed = np.zeros(int(n * 1.6), np.int64)
    for _ in range(LEVELS):
        law = (packed * 2_654_435_761 >> 7) % _LAWS
        rank = np.searchsorted(table, random.random(len(packed)) + law) - law * SYMBOLS
        packed = packed * SYMBOLS + symbol_of_rank[law, np.minimum(rank, SYMBOLS - 1)]
    distinct = np.unique(packed)
    kept = np.sort(random.permutation(distinct)[:n])
    if len(kept) < n:
        raise ValueError(f"the sampler found {len(kept)} distinct identifiers, not {n}: draw more.")
    return np.ascontiguousarray(kept.astype(">u4").view(np.uint8).reshape(n, LEVELS))


@dataclass(frozen=True)
class Corpus:
    """n sorted identifiers. `codes`: (n, LEVELS) uint8 symbols, `codes + first_tokens` are the token ids."""

    codes: NDArray[np.uint8]
    seed: int

    @classmethod
    def sample(cls, n: int, seed: int) -> Corpus:
        """Draw a corpus. The same arguments give the same corpus."""
        return cls(hierarchical_codes(n, seed), seed)

    @classmethod
    def balanced(cls, n: int, seed: int) -> Corpus:
        """All products of the first b symbols, b ** LEVELS as near to n as can be: every prefix has b children.

        Below a random prefix of a small corpus there is often one child only, and a search skips that step; here none
        can be skipped at any size.
        """
        b = max(2, round(n ** (1 / LEVELS)))
        codes = np.indices((b,) * LEVELS).reshape(LEVELS, -1).T
        return cls(np.ascontiguousarray(codes.astype(np.uint8)), seed)

    @cached_property
    def token_ids(self) -> Int64:
        """Return the (n, LEVELS) token ids."""
        return self.codes.astype(np.int64) + FIRST_TOKEN + SYMBOLS * np.arange(LEVELS)

    def __len__(self) -> int:
        return len(self.codes)

    def leaves(self, rows: int, batch: int, among: Int64 | None = None) -> Int64:
        """Draw (rows,) random identifiers, by rank."""
        random = np.random.default_rng((self.seed, rows, batch))
        return random.integers(0, len(self), rows) if among is None else random.choice(among, rows)

    def prefixes(self, leaves: Int64, depth: int) -> list[list[int]]:
        """Return the first `depth` token ids of the identifiers."""
        prefixes: list[list[int]] = self.token_ids[leaves, :depth].tolist()
        return prefixes

    def allowed(self, leaves: Int64, depth: int) -> list[Int64]:
        """Return the tokens that may follow each prefix, ascending, by brute force.

        It scans the identifiers between two bisections.
        """
        packed = self.codes.view(">u4").ravel().astype(np.int64)
        shift = 8 * (LEVELS - depth)
        low = packed[leaves] >> shift << shift
        lo, hi = np.searchsorted(packed, low), np.searchsorted(packed, low + (1 << shift))
        return [np.unique(self.token_ids[a:b, depth]) for a, b in zip(lo, hi, strict=True)]


def logits_matrix(rows: int, seed: int) -> Float32:
    """Draw (rows, VOCAB) logits: random for identifier tokens, 0 for the others, which no benchmark reads."""
    logits = np.zeros((rows, VOCAB), np.float32)
    logits[:, FIRST_TOKEN:] = np.random.default_rng(seed).standard_normal((rows, VOCAB - FIRST_TOKEN)) * 3
    return logits
