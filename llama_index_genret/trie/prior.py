"""Stores the probability of the images below each prefix without a query: per node the sum and the minimum.

Depends on the live trie and numbers; independent of models. `tuning.image_prior` computes the priors of the images.
The slow twin is `_reference.prior_below`; tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.trie.flat import Int64, Trie
from llama_index_genret.trie.live import LiveTrie, Nodes

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

LOG_MASS, LEAST = 0, 1
"""Columns of the prior of a node."""

_NONE = (-np.inf, np.inf)
"""The prior of a prefix without images: neutral in a sum and in a minimum."""


@dataclass(frozen=True, eq=False)
class TriePrior:
    """The prior of every prefix of one version of a trie.

    base: (n_nodes, 2) float32, for each node of `LiveTrie.base` two natural logarithms. LOG_MASS: the sum of the
        probabilities of the live images below it. LEAST: the smallest of these probabilities.
    added: the same for `LiveTrie.added`; None if no identifiers were added.
    """

    base: Float32
    added: Float32 | None

    @classmethod
    def of_leaves(cls, trie: LiveTrie, log_prior: Float32) -> TriePrior | None:
        """Sum up the priors of the live images.

        An image that was added after the priors were computed has an unknown prior. It gets the least prior below the
        longest prefix that it shares with an image of known prior. The model was not trained on its identifier, so its
        true prior is hardly larger. A smaller prior would rank it above all images with that prefix.

        Args:
            log_prior: (n_leaves,) natural logarithms, finite, or NaN where unknown.
        Returns:
            The prior, or None if no live image has a known prior.
        """
        live = np.ones(trie.n_leaves, np.bool_) if trie.live is None else trie.live.contains(np.arange(trie.n_leaves))
        known = live & ~np.isnan(log_prior)
        if not known.any():
            return None
        prior = cls._sum_leaves(trie, log_prior, known)
        if (unknown := np.flatnonzero(live & ~known)).size:
            log_prior = log_prior.copy()
            log_prior[unknown] = prior._least_relative(trie, unknown)
            prior = cls._sum_leaves(trie, log_prior, live)
        return prior

    def of(self, nodes: Nodes) -> Float64:
        """Return (n, 2) float64, columns LOG_MASS and LEAST, for n prefixes.

        for prefix in nodes: yield log(sum(p of images below)), log(min(p of images below))
        """
        if self.added is None or nodes.added is None:
            return self.base.take(nodes.base, axis=0).astype(np.float64)
        base, added = _at(self.base, nodes.base), _at(self.added, nodes.added)
        mass = np.logaddexp(base[:, LOG_MASS], added[:, LOG_MASS])
        return np.stack([mass, np.minimum(base[:, LEAST], added[:, LEAST])], axis=1)

    @classmethod
    def _sum_leaves(cls, trie: LiveTrie, log_prior: Float32, mask: NDArray[np.bool_]) -> TriePrior:
        leaves = np.where(mask[:, None], log_prior[:, None], _NONE)
        n_base = trie.base.n_leaves
        added = _sum_below_nodes(trie.added, leaves[n_base:]) if trie.added else None
        return cls(_sum_below_nodes(trie.base, leaves[:n_base]), added)

    def _least_relative(self, trie: LiveTrie, leaves: Int64) -> Float64:
        """Return (n,) the least prior below the longest prefix of each leaf that has a prior. The root has one."""
        paths = np.concatenate([_pad(t.paths(), trie.depth) for t in (trie.base, trie.added) if t])[leaves]
        nodes = trie.roots(len(leaves))
        least = self.of(nodes)[:, LEAST]
        for column in paths.T:
            added = None if trie.added is None or nodes.added is None else _step(trie.added, nodes.added, column)
            nodes = Nodes(_step(trie.base, nodes.base, column), added)
            there = nodes.base >= 0 if nodes.added is None else (nodes.base >= 0) | (nodes.added >= 0)
            below = self.of(nodes)[:, LEAST]
            least = np.where(there & np.isfinite(below), below, least)
        return least


def _sum_below_nodes(trie: Trie, leaves: Float64) -> Float32:
    """Reduce (n_leaves, 2) to (n_nodes, 2), bottom up, one level at a time. Each sum spans siblings only.

    Such sums keep the precision that differences of running sums over all leaves would lose.
    """
    below = np.empty((trie.n_nodes, 2))
    for level in range(trie.depth, -1, -1):
        nodes = np.arange(trie.level_start[level], trie.level_start[level + 1])
        ends = trie.is_leaf(nodes)
        below[nodes[ends]] = leaves[trie.first_leaf(nodes[ends])]
        if (inner := nodes[~ends]).size:
            first = trie.first_child[inner].astype(np.int64)
            children = below[first[0] : trie.level_start[level + 2]]
            below[inner, LOG_MASS] = _log_sums(children[:, LOG_MASS], first - first[0])
            below[inner, LEAST] = np.minimum.reduceat(children[:, LEAST], first - first[0])
    return below.astype(np.float32)


def _log_sums(values: Float64, starts: Int64) -> Float64:
    """Return the logarithm of the sum of the exponentials of each segment."""
    top = np.maximum.reduceat(values, starts)
    top[np.isneginf(top)] = 0.0
    shifted = np.exp(values - np.repeat(top, np.diff(starts, append=len(values))))
    with np.errstate(divide="ignore"):
        return np.asarray(top + np.log(np.add.reduceat(shifted, starts)))


def _pad(paths: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    return np.pad(paths, ((0, 0), (0, width - paths.shape[1])), constant_values=-1)


def _at(values: Float32, nodes: Int64) -> Float64:
    """Return (n, 2) the priors of the nodes, `_NONE` where a node is -1."""
    rows = values.take(np.maximum(nodes, 0), axis=0).astype(np.float64)
    rows[nodes < 0] = _NONE
    return rows


def _step(trie: Trie, nodes: Int64, token_ids: NDArray[np.int32]) -> Int64:
    """Return the child of each node for its token, -1 where it has none."""
    there = (nodes >= 0) & (token_ids >= 0)
    child = np.full(len(nodes), -1)
    child[there] = trie.advance(nodes[there], token_ids[there])
    return child
