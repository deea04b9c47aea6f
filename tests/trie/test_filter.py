"""Test that filters count leaves like a loop and combine like sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_index_genret.errors import FilterError
from llama_index_genret.trie import LeafFilter, build_trie
from llama_index_genret.trie import filter as filter_module
from llama_index_genret.trie._reference import count_allowed
from tests.trie.test_flat import Identifiers, all_nodes, identifier_sets


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_filters_combine_like_sets(bits: list[tuple[bool, bool, bool]]) -> None:
    first, second, removed = np.array(bits).T
    leaves = np.arange(len(bits))
    both = LeafFilter.from_mask(first) & LeafFilter.from_mask(second)
    assert both.contains(leaves).tolist() == (first & second).tolist()
    assert both.n_allowed == (first & second).sum()
    rest = LeafFilter.from_mask(first).without(np.flatnonzero(removed))
    assert rest.count(leaves, leaves + 1).tolist() == (first & ~removed).tolist()
    with pytest.raises(FilterError, match="different tries"):
        both & LeafFilter.from_mask(np.ones(len(bits) + 1, bool))


@given(identifier_sets, st.data())
def test_filter_counts_equal_a_loop_over_the_mask(identifiers: Identifiers, data: st.DataObject) -> None:
    trie, _ = build_trie(identifiers)
    mask = data.draw(st.lists(st.booleans(), min_size=trie.n_leaves, max_size=trie.n_leaves))
    lo, hi = trie.leaf_range(all_nodes(trie))
    counts = LeafFilter.from_mask(np.array(mask)).count(lo, hi)
    assert counts.tolist() == [count_allowed(mask, a, b) for a, b in zip(lo, hi, strict=True)]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 1000])
def test_filter_counts_are_exact_across_words(n: int) -> None:
    mask = np.random.default_rng(n).random(n) < 0.4
    before = np.array([count_allowed(mask.tolist(), 0, leaf) for leaf in range(n + 1)])
    lo, hi = np.triu_indices(n + 1)
    leaf_filter = LeafFilter.from_mask(mask)
    assert (leaf_filter.count(lo, hi) == before[hi] - before[lo]).all()
    assert leaf_filter.n_allowed == before[-1]


def test_popcount_without_numpy_2_equals_numpy_2() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, (3, 5), dtype=np.uint64)
    assert filter_module._popcount_by_table(words).tolist() == [[bin(w).count("1") for w in row] for row in words]
    assert filter_module._popcount(words).tolist() == filter_module._popcount_by_table(words).tolist()


@pytest.mark.parametrize(("lo", "hi"), [(0, 6), (-1, 2), (3, 2)])
def test_filter_rejects_ranges_of_another_trie(lo: int, hi: int) -> None:
    with pytest.raises(FilterError, match="over 5 leaves"):
        LeafFilter.from_mask(np.ones(5, bool)).count(np.array([lo]), np.array([hi]))


@pytest.mark.parametrize("mask", [np.ones(3, np.int64), np.ones((2, 2), bool)])
def test_mask_must_be_a_boolean_vector(mask: np.ndarray) -> None:
    with pytest.raises(FilterError, match="n_leaves"):
        LeafFilter.from_mask(mask)
