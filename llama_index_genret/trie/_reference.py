"""The definition of what the fast trie computes: plain loops and dicts, slow and obviously right.

The property tests hold the fast twins equal to it. Where the two differ, the fast one is wrong.
Depends on token ids; independent of NumPy, files and models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index_genret.errors import DeadEnd, IdentifierCollision, IdentifierError

Prefix = tuple[int, ...]


class DictTrie:
    """Nested dicts; the twin of `trie.Trie`. A node is named by the tokens that lead to it."""

    def __init__(self, identifiers: Sequence[Sequence[int]]) -> None:
        named = [tuple(identifier) for identifier in identifiers]
        if not named or not all(named) or any(token_id < 0 for identifier in named for token_id in identifier):
            raise IdentifierError("there must be identifiers, each of at least one token id, none negative.")
        for i, first in enumerate(named):
            for j, second in enumerate(named):
                if i != j and second[: len(first)] == first:
                    raise IdentifierCollision(f"identifier {i}, {first}, begins identifier {j}, {second}.")
        self.identifiers = sorted(named)
        self.order = [named.index(identifier) for identifier in self.identifiers]
        self._root: dict[int, Any] = {}
        for identifier in named:
            inside = self._root
            for token_id in identifier:
                inside = inside.setdefault(token_id, {})

    def nodes(self) -> list[Prefix]:
        """Every node in the order in which the fast trie numbers them: by depth, then by tokens."""
        prefixes = {identifier[:depth] for identifier in self.identifiers for depth in range(len(identifier) + 1)}
        return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))

    def children(self, prefix: Prefix) -> dict[int, Prefix]:
        """What may come next, and where it leads."""
        if self.is_leaf(prefix):
            raise DeadEnd(f"{prefix} ends an identifier, no token can follow.")
        inside = self._root
        for token_id in prefix:
            inside = inside[token_id]
        return {token_id: (*prefix, token_id) for token_id in sorted(inside)}

    def is_leaf(self, prefix: Prefix) -> bool:
        """Whether an identifier ends here."""
        return prefix in self.identifiers

    def leaf_range(self, prefix: Prefix) -> tuple[int, int]:
        """(lo, hi): lo .. hi - 1 are the ranks of the identifiers that begin with the prefix."""
        ranks = [rank for rank, ids in enumerate(self.identifiers) if ids[: len(prefix)] == prefix]
        return ranks[0], ranks[-1] + 1

    def leaf_rank(self, identifier: Prefix) -> int:
        """Rank among the sorted identifiers."""
        return self.identifiers.index(identifier)

    def token_ids(self) -> list[int]:
        """All distinct token ids, ascending."""
        return sorted({token_id for identifier in self.identifiers for token_id in identifier})


def count_allowed(mask: Sequence[bool], lo: int, hi: int) -> int:
    """How many of the leaves lo .. hi - 1 the mask allows; the twin of `trie.LeafFilter.count`."""
    return sum(1 for leaf in range(lo, hi) if mask[leaf])


def with_unknown_priors(log_priors: Mapping[Prefix, float | None]) -> dict[Prefix, float]:
    """Every identifier's prior, an unknown one as that of its least probable relative.

    Relatives are the known ones that share its longest beginning among those that any known one has.
    """
    known = {identifier: prior for identifier, prior in log_priors.items() if prior is not None}

    def least_relative(identifier: Prefix) -> float:
        for length in range(len(identifier), -1, -1):
            relatives = [p for other, p in known.items() if other[:length] == identifier[:length]]
            if relatives:
                return min(relatives)
        raise IdentifierError("no identifier has a known prior.")

    return {
        identifier: least_relative(identifier) if prior is None else prior for identifier, prior in log_priors.items()
    }


def prior_below(log_priors: Mapping[Prefix, float | None], prefix: Prefix) -> tuple[float, float]:
    """(log of the sum, least log) of the priors of the identifiers that begin so; the twin of `trie.TriePrior`."""
    below = [p for identifier, p in with_unknown_priors(log_priors).items() if identifier[: len(prefix)] == prefix]
    return math.log(math.fsum(math.exp(p - max(below)) for p in below)) + max(below), min(below)
