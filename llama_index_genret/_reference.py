"""The definition of what the fast modules compute: plain loops and dicts, slow and obviously right.

The property tests hold the fast twins equal to it; where the two differ, the fast one is wrong.
Knows token ids; nothing of NumPy, files or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def rank_all(
    identifiers: Sequence[Prefix], logits: Callable[[Prefix], Sequence[float]], *, over_children: bool
) -> list[tuple[float, Prefix]]:
    """Every identifier with its log-probability, best first, ties by tokens; the twin of `search.search`.

    Args:
        logits: prefix -> one logit for every token of the vocabulary.
        over_children: whether a step's probabilities sum to one over the tokens that may come next, or over all.
    """
    trie = DictTrie(identifiers)
    ranked = []
    for identifier in identifiers:
        log_prob = 0.0
        for depth, token_id in enumerate(identifier):
            row = logits(identifier[:depth])
            rivals = trie.children(identifier[:depth]) if over_children else range(len(row))
            log_prob += row[token_id] - math.log(sum(math.exp(row[rival]) for rival in rivals))
        ranked.append((log_prob, identifier))
    return sorted(ranked, key=lambda found: (-found[0], found[1]))
