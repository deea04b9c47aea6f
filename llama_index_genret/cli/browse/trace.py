"""Trace of a search: per level of an identifier, the children that the search scored, with their probabilities.

Depends on indexes and the steps of a `RecordingScorer`; independent of models and HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.scorers.recording import Prefix, Step
from llama_index_genret.search import Hit
from llama_index_genret.store import Index
from llama_index_genret.trie import LeafFilter, LiveTrie, Nodes

SHOWN = 6
"""Number of the most probable children that a level lists one by one."""

EXAMPLES = 3
"""Number of example images per child."""

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """One child of a prefix.

    symbol: readable text of the symbol, "" for the end of the identifier.
    probability: probability given the prefix, over all its children.
    chosen: whether the identifier of the hit goes on with this child.
    images: number of images below the child. allowed: number of them that pass the filters.
    examples: ids of at most `EXAMPLES` images that pass.
    """

    symbol: str
    probability: float
    chosen: bool
    images: int
    allowed: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Level:
    """The step from one prefix of an identifier to the next.

    choices: the `SHOWN` most probable children, and the chosen one.
    children: number of all children. rest: probability of the children that are not listed.
    scored: whether the model scored the children. An only child is not scored and has probability 1.
    """

    choices: tuple[Choice, ...]
    children: int
    rest: float
    scored: bool


def probabilities(steps: Sequence[Step]) -> dict[Prefix, NDArray[np.float64]]:
    """Return prefix -> probabilities of its children, by ascending token id.

    Args:
        steps: steps of a search for one query. Only expanded prefixes are in the result.
    """
    found = {}
    for step in steps:
        for row, score in zip(step.rows, step.rows.split(np.asarray(step.scores, np.float64)), strict=True):
            weights = np.exp(score - score.max())
            found[row.prefix] = weights / weights.sum()
    return found


def identifier_levels(
    index: Index, hit: Hit, expanded: dict[Prefix, NDArray[np.float64]], leaf_filter: LeafFilter | None
) -> tuple[Level, ...]:
    """Return the levels of a hit's identifier, first symbol first.

    Args:
        expanded: result of `probabilities` for the search that found the hit.
        leaf_filter: the leaves that pass the filters of the query. None for all.
    """
    trie, nodes, levels = index.trie, index.trie.roots(1), []
    for depth, token in enumerate(hit.token_ids):
        children = trie.expand(nodes)
        place = int(np.searchsorted(children.token_ids, token))
        given = expanded.get(hit.token_ids[:depth])
        probability = np.ones(1) if given is None else given
        shown = np.argsort(-probability, kind="stable")[:SHOWN].tolist()
        shown += [] if place in shown else [place]
        choices = []
        for entry in shown:
            below = leaves_below(trie, children.take(np.array([entry])))
            passing = below if leaf_filter is None else below[leaf_filter.contains(below)]
            examples = tuple(index.records[row].image_id for row in trie.key(passing[:EXAMPLES]).tolist())
            symbol = _read(index, int(children.token_ids[entry]))
            counts = len(below), len(passing)
            choices.append(Choice(symbol, float(probability[entry]), entry == place, *counts, examples))
        rest = max(0.0, 1.0 - sum(choice.probability for choice in choices))
        levels.append(Level(tuple(choices), len(children.token_ids), rest, given is not None))
        nodes = children.take(np.array([place]))
    return tuple(levels)


def leaves_below(trie: LiveTrie, nodes: Nodes) -> Int64:
    """Return the live leaves below one node, ascending."""
    parts = [(trie.base, nodes.base, 0)]
    if trie.added is not None and nodes.added is not None:
        parts.append((trie.added, nodes.added, trie.base.n_leaves))
    found = []
    for part, node, start in parts:
        if node[0] >= 0:
            (low,), (high,) = part.leaf_range(node)
            found.append(np.arange(low, high) + start)
    leaves = np.concatenate(found)
    return leaves if trie.live is None else np.asarray(leaves[trie.live.contains(leaves)], np.int64)


def _read(index: Index, token_id: int) -> str:
    return "" if token_id == index.end_token else index.tokenizer.read(index.tokenizer.pieces([token_id]))
