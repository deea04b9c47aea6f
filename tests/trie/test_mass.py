"""Sums over the leaves below children, held against their definition."""

import numpy as np
from hypothesis import given, settings

from llama_index_genret.trie import child_masses
from llama_index_genret.trie._reference import mass_below
from tests.trie.test_prior import edited_tries


@settings(max_examples=150, deadline=None)
@given(edited_tries())
def test_child_masses_equal_the_definition(edited):
    """Added leaves count, removed ones do not, and two queries keep apart."""
    live, priors, _ = edited
    n = live.n_leaves
    weights = np.zeros((2, n + 1))
    exists = np.ones(n, bool) if live.live is None else live.live.contains(np.arange(n))
    weights[:, :n] = np.random.default_rng(n).exponential(size=(2, n)) * exists
    named = [{}, {}]
    open_nodes, leaves = [(live.roots(1), ())], []
    while open_nodes:
        nodes, prefix = open_nodes.pop()
        if live.is_leaf(nodes)[0]:
            leaves.append(prefix)
            for query in (0, 1):
                named[query][prefix] = weights[query, live.leaf(nodes)[0]]
            continue
        expansion = live.expand(nodes)
        open_nodes += [
            (expansion.take(np.array([entry])), (*prefix, token))
            for entry, token in enumerate(expansion.token_ids.tolist())
        ]
    assert set(leaves) == set(priors)
    nodes, query = live.roots(2), np.arange(2)
    prefixes = [(), ()]
    while len(query):
        expansion = live.expand(nodes)
        masses = child_masses(expansion, weights, query)
        row, tokens = expansion.row, expansion.token_ids.tolist()
        prefixes = [(*prefixes[r], token) for r, token in zip(row, tokens, strict=True)]
        query = query[row]
        expected = [mass_below(named[q], prefix) for q, prefix in zip(query, prefixes, strict=True)]
        np.testing.assert_allclose(masses, expected, rtol=1e-12)
        children = expansion.take(np.arange(len(row)))
        inner = np.flatnonzero(~live.is_leaf(children))
        nodes, query, prefixes = children.take(inner), query[inner], [prefixes[place] for place in inner]
