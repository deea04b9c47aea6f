"""The definition of what the fast modules compute: plain loops and dicts, slow and obviously right.

The property tests hold the fast twins equal to it; where the two differ, the fast one is wrong.
Knows token ids; nothing of NumPy, files or models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from llama_index_genret.trie._reference import DictTrie, Prefix, with_unknown_priors


def rank_all(
    identifiers: Sequence[Prefix],
    logits: Callable[[Prefix], Sequence[float]],
    *,
    over_children: bool,
    log_priors: Mapping[Prefix, float | None] | None = None,
    eta: float = 0.0,
) -> list[tuple[float, Prefix]]:
    """Every identifier with its score, best first, ties by tokens; the twin of `search.search`.

    The score is its log-probability, less `eta` times the logarithm of its prior.

    Args:
        logits: prefix -> one logit for every token of the vocabulary.
        over_children: whether a step's probabilities sum to one over the tokens that may come next, or over all.
    """
    priors = with_unknown_priors(log_priors) if log_priors else dict.fromkeys(identifiers, 0.0)
    trie = DictTrie(identifiers)
    ranked = []
    for identifier in identifiers:
        log_prob = 0.0
        for depth, token_id in enumerate(identifier):
            row = logits(identifier[:depth])
            rivals = trie.children(identifier[:depth]) if over_children else range(len(row))
            log_prob += row[token_id] - math.log(sum(math.exp(row[rival]) for rival in rivals))
        ranked.append((log_prob - eta * priors[identifier], identifier))
    return sorted(ranked, key=lambda found: (-found[0], found[1]))
