"""Defines the results of the fast trie with plain loops and dicts: slow and obviously right.

Property tests compare the fast twins with these definitions. Where the two differ, the fast one is wrong.
Depends on token ids; independent of NumPy, files and models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index_genret.errors import DeadEnd, IdentifierCollision, IdentifierError

Prefix = tuple[int, ...]


class DictTrie:
    """A trie of nested dicts: the twin of `trie.Trie`. The tokens that lead to a node identify it."""

    def __init__(self, identifiers: Sequence[Sequence[int]]) -> None:
        given = [tuple(identifier) for identifier in identifiers]
        if not given or not all(given) or any(token_id < 0 for identifier in given for token_id in identifier):
            raise IdentifierError("expected at least one identifier, each of at least one token id, none negative.")
        for i, first in enumerate(given):
            for j, second in enumerate(given):
                if i != j and second[: len(first)] == first:
                    raise IdentifierCollision(f"identifier {i}, {first}, is a prefix of identifier {j}, {second}.")
        self.identifiers = sorted(given)
        self.order = [given.index(identifier) for identifier in self.identifiers]
        self._root: dict[int, Any] = {}
        for identifier in given:
            inside = self._root
            for token_id in identifier:
                inside = inside.setdefault(token_id, {})

    def nodes(self) -> list[Prefix]:
        """Return every node in the order in which the fast trie numbers them: by depth, then by tokens."""
        prefixes = {identifier[:depth] for identifier in self.identifiers for depth in range(len(identifier) + 1)}
        return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))

    def children(self, prefix: Prefix) -> dict[int, Prefix]:
        """Map each token that may follow to the child that it leads to."""
        if self.is_leaf(prefix):
            raise DeadEnd(f"{prefix} ends an identifier: no token can follow.")
        inside = self._root
        for token_id in prefix:
            inside = inside[token_id]
        return {token_id: (*prefix, token_id) for token_id in sorted(inside)}

    def is_leaf(self, prefix: Prefix) -> bool:
        """Return True if the prefix is a complete identifier."""
        return prefix in self.identifiers

    def leaf_range(self, prefix: Prefix) -> tuple[int, int]:
        """Return (lo, hi): lo .. hi - 1 are the ranks of the identifiers that begin with the prefix."""
        ranks = [rank for rank, ids in enumerate(self.identifiers) if ids[: len(prefix)] == prefix]
        return ranks[0], ranks[-1] + 1

    def leaf_rank(self, identifier: Prefix) -> int:
        """Return the rank of the identifier among the sorted identifiers."""
        return self.identifiers.index(identifier)

    def token_ids(self) -> list[int]:
        """Return all distinct token ids, ascending."""
        return sorted({token_id for identifier in self.identifiers for token_id in identifier})


def count_allowed(mask: Sequence[bool], lo: int, hi: int) -> int:
    """Count the leaves lo .. hi - 1 that the mask allows; the twin of `trie.LeafFilter.count`."""
    return sum(1 for leaf in range(lo, hi) if mask[leaf])


def with_unknown_priors(log_priors: Mapping[Prefix, float | None]) -> dict[Prefix, float]:
    """Return every identifier's log prior; an unknown one is that of its least probable relative.

    Take the longest prefix of the identifier that some identifier of known prior shares. Its relatives are all
    identifiers of known prior with that prefix.
    """
    known = {identifier: prior for identifier, prior in log_priors.items() if prior is not None}

    def least_relative(identifier: Prefix) -> float:
        for length in range(len(identifier), -1, -1):
            relatives = [p for other, p in known.items() if other[:length] == identifier[:length]]
            if relatives:
                return min(relatives)
        raise IdentifierError("no identifier has a known prior: expected at least one.")

    return {
        identifier: least_relative(identifier) if prior is None else prior for identifier, prior in log_priors.items()
    }


def prior_below(log_priors: Mapping[Prefix, float | None], prefix: Prefix) -> tuple[float, float]:
    """Return (log of the sum, least log) of the priors below the prefix; the twin of `trie.TriePrior`."""
    below = [p for identifier, p in with_unknown_priors(log_priors).items() if identifier[: len(prefix)] == prefix]
    return math.log(math.fsum(math.exp(p - max(below)) for p in below)) + max(below), min(below)


def mass_below(weights: Mapping[Prefix, float], prefix: Prefix) -> float:
    """Return the sum of the weights of the identifiers that begin with `prefix`; the twin of `trie.child_masses`."""
    return math.fsum(weight for identifier, weight in weights.items() if identifier[: len(prefix)] == prefix)
