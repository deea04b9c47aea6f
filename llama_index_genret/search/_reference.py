"""Define the results of the fast modules with plain loops and dicts, slow and obviously right.

The property tests hold the fast twins equal to this module. Where the two differ, the fast one is wrong.
Depends on token ids; independent of NumPy, files and models.
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
    """Return every identifier with its score, best first, ties by tokens; the twin of `search.search`.

    The score is the log-probability of the identifier, less `eta` times the natural logarithm of its prior.

    Args:
        logits: prefix -> one logit for every token of the vocabulary.
        over_children: True if the probabilities of a step sum to one over the valid next tokens, False if they sum to
            one over the whole vocabulary.
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
    return sorted(ranked, key=lambda entry: (-entry[0], entry[1]))
