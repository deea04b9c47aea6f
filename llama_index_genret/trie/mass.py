"""Sums over the leaves below the children of an expansion: a distribution over images, as one over next tokens.

Depends on the live trie and numbers; independent of searches, models and encoders.
The slow twin is `trie._reference.mass_below`; the tests hold the two equal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.trie.flat import Int64
from llama_index_genret.trie.live import Expansion

Float64 = NDArray[np.float64]


def child_masses(expansion: Expansion, weights: Float64, query: Int64) -> Float64:
    """Return (m,) float64, the sum of the weights of the leaves below each child of an expansion.

        for row, child in expansion: yield sum(weights[query[row], leaf] for leaf in leaves_below(child))

    Neighbouring leaves are summed directly. Differences of running sums over all leaves would lose the precision of
    small masses.

    Args:
        weights: (queries, n_leaves + 1) float64, at least 0; 0 for a removed leaf and in the last column, where a range
            may end.
        query: (n,) int64, for each expanded prefix its row of `weights`.
    """
    masses = np.zeros(int(expansion.offsets[-1]))
    for nodes, trie, leaf_start in expansion.child_nodes():
        here = np.flatnonzero(nodes >= 0)
        if here.size:
            lo, hi = trie.leaf_range(nodes[here])
            masses[here] += _range_sums(weights, query[expansion.row[here]], lo + leaf_start, hi + leaf_start)
    return masses


def _range_sums(weights: Float64, rows: Int64, lo: Int64, hi: Int64) -> Float64:
    if (hi - lo == 1).all():
        return np.asarray(weights[rows, lo])
    ends = np.empty(2 * len(lo), np.int64)
    ends[::2], ends[1::2] = lo, hi
    ends += np.repeat(rows * weights.shape[1], 2)
    return np.asarray(np.add.reduceat(weights.reshape(-1), ends)[::2])
