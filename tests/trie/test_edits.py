"""Test that an edited trie equals a trie that is rebuilt after every edit."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama_index_genret.errors import FilterError, IdentifierCollision, IdentifierError
from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import Normalise, SearchOptions
from llama_index_genret.search._reference import rank_all
from llama_index_genret.trie import (
    LeafFilter,
    LiveTrie,
    add_identifiers,
    build_trie,
    close_beginnings,
    compact,
    edits_of,
    open_trie,
    remove_identifiers,
    save_trie,
    with_edits,
)

END = 5
SCORER = FakeScorer(vocab_size=6)
PROMPT = Prompt((1,))
IDENTIFIERS = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)
OPERATIONS = Counter()


def without_end(token_ids):
    """Return the identifier without its end token."""
    return token_ids[:-1] if token_ids[-1] == END else token_ids


def search_hits(trie, **options):
    """Return (key, identifier, log p) of each hit, and True if the ranking is exact."""
    (ranking,) = recall(SCORER, trie, [PROMPT], SearchOptions(**options))
    return [(hit.key, without_end(hit.token_ids), round(hit.log_prob, 9)) for hit in ranking.hits], ranking.exact


def live_of(trie):
    """Return {identifier: key} by walking the whole trie."""
    identifiers, ends, open_nodes = {}, [], [(trie.roots(1), ())] if trie.n_live else []
    while open_nodes:
        nodes, prefix = open_nodes.pop()
        if trie.is_leaf(nodes)[0]:
            identifiers[without_end(prefix)] = int(trie.key(trie.leaf(nodes))[0])
            ends.append((prefix, int(trie.order(nodes)[0])))
            continue
        expansion = trie.expand(nodes)
        assert len(expansion.token_ids), f"{prefix} leads nowhere"
        for entry, token in enumerate(expansion.token_ids.tolist()):
            open_nodes.append((expansion.take(np.array([entry])), (*prefix, token)))
    assert [prefix for prefix, _ in sorted(ends)] == [prefix for prefix, _ in sorted(ends, key=lambda end: end[1])]
    return identifiers


class Editing(RuleBasedStateMachine):
    """Edit in any order and compare with a dictionary of the expected identifiers."""

    @initialize(identifiers=st.sets(IDENTIFIERS, min_size=1, max_size=12))
    def build(self, identifiers):
        self.model = {identifier: key for key, identifier in enumerate(sorted(identifiers))}
        trie, order = build_trie(close_beginnings(list(self.model), END))
        self.trie = LiveTrie(trie, keys=order)
        self.next_key = len(self.model)

    @rule(identifiers=st.lists(IDENTIFIERS, min_size=1, max_size=3))
    def add(self, identifiers):
        OPERATIONS["add"] += 1
        keys = range(self.next_key, self.next_key + len(identifiers))
        if len(set(identifiers)) < len(identifiers) or self.model.keys() & set(identifiers):
            with pytest.raises(IdentifierCollision):
                add_identifiers(self.trie, identifiers, keys, end_token=END)
            return
        self.trie = add_identifiers(self.trie, identifiers, keys, end_token=END)
        self.model |= dict(zip(identifiers, keys, strict=True))
        self.next_key += len(identifiers)

    @rule(identifiers=st.lists(IDENTIFIERS, min_size=1, max_size=2), data=st.data())
    def remove(self, identifiers, data):
        OPERATIONS["remove"] += 1
        if self.model and data.draw(st.booleans()):
            identifiers = [data.draw(st.sampled_from(sorted(self.model)))]
        if len(set(identifiers)) < len(identifiers) or not set(identifiers) <= self.model.keys():
            with pytest.raises(IdentifierError):
                remove_identifiers(self.trie, identifiers, end_token=END)
            return
        self.trie = remove_identifiers(self.trie, identifiers, end_token=END)
        for identifier in identifiers:
            del self.model[identifier]

    @rule()
    def compact(self):
        OPERATIONS["compact"] += 1
        self.trie = compact(self.trie)
        assert not self.model or (self.trie.added is None and self.trie.live is None)

    @rule()
    def store_and_restore(self):
        OPERATIONS["store"] += 1
        self.trie = with_edits(self.trie.base, self.trie.keys, edits_of(self.trie))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), k=st.integers(1, 5), width=st.integers(1, 4))
    def search(self, data, k, width):
        """Compare beam and exact search, filtered or not, with a trie built from scratch."""
        OPERATIONS["search"] += 1
        identifiers = sorted(self.model)
        rebuilt, order = build_trie(close_beginnings(identifiers, END))
        kept = set(data.draw(st.lists(st.sampled_from(identifiers)))) if data.draw(st.booleans()) else set(identifiers)
        keys = {self.model[identifier] for identifier in kept}
        leaves = np.arange(self.trie.n_leaves)
        removed = np.zeros(len(leaves), bool) if self.trie.live is None else ~self.trie.live.contains(leaves)
        allowed = LeafFilter.from_mask(np.isin(self.trie.key(leaves), list(keys)) | removed)
        fresh = LiveTrie(rebuilt, keys=np.array([self.model[identifiers[row]] for row in order]))
        fresh_allowed = LeafFilter.from_mask(np.isin(fresh.keys, list(keys)))
        for mode in ("beam", "exact"):
            ours = search_hits(self.trie, k=k, width=width, mode=mode, leaf_filter=allowed)
            assert ours == search_hits(fresh, k=k, width=width, mode=mode, leaf_filter=fresh_allowed)
            assert len(ours[0]) == min(k, len(kept))
        everything = rank_all(
            close_beginnings(identifiers, END), lambda p: SCORER.logits(PROMPT, p), over_children=True
        )
        best = [without_end(path) for _, path in everything if without_end(path) in kept][:k]
        assert ([identifier for _, identifier, _ in ours[0]], ours[1]) == (best, True)

    @invariant()
    def trie_equals_the_model(self):
        assert self.trie.n_live == len(self.model)
        assert live_of(self.trie) == self.model


def test_edits_in_any_order_equal_a_rebuilt_trie():
    """Run ten thousand operations in CI."""
    OPERATIONS.clear()
    Editing.TestCase.settings = settings(max_examples=3 * settings.default.max_examples)
    Editing.TestCase("runTest").runTest()
    most = Editing.TestCase.settings.max_examples * Editing.TestCase.settings.stateful_step_count
    assert OPERATIONS.total() >= 2 / 3 * most, OPERATIONS


def test_edits_leave_earlier_versions_unchanged():
    trie, _ = build_trie([(0, 1), (2, 3)])
    first = LiveTrie(trie)
    second = add_identifiers(first, [(2, 4)], [7])
    third = remove_identifiers(second, [(0, 1)])
    assert [set(live_of(version)) for version in (first, second, third)] == [
        {(0, 1), (2, 3)},
        {(0, 1), (2, 3), (2, 4)},
        {(2, 3), (2, 4)},
    ]


def test_prefix_without_an_end_token_is_rejected():
    trie = LiveTrie(build_trie([(0, 1), (2,)])[0])
    for identifier in [(0,), (2, 3)]:
        with pytest.raises(IdentifierCollision, match="end token"):
            add_identifiers(trie, [identifier], [9])
    with pytest.raises(IdentifierCollision):
        add_identifiers(trie, [(1,), (1, 1)], [8, 9])


def test_end_token_inside_an_identifier_is_rejected():
    trie = LiveTrie(build_trie([(0, 1)])[0])
    with pytest.raises(IdentifierError, match="end token 5"):
        add_identifiers(trie, [(0, END, 2)], [1], end_token=END)


@pytest.mark.parametrize("bad", [[()], [(-1,)], [(2**31,)]])
def test_invalid_identifier_is_rejected(bad):
    with pytest.raises(IdentifierError, match="identifier 0"):
        add_identifiers(LiveTrie(build_trie([(0, 1)])[0]), bad, [1])


def test_add_needs_one_key_for_each_identifier():
    with pytest.raises(IdentifierError, match="2 identifiers came with 1 keys"):
        add_identifiers(LiveTrie(build_trie([(0, 1)])[0]), [(1,), (2,)], [1])


def test_filter_of_an_older_version_is_rejected():
    trie = LiveTrie(build_trie([(0, 1), (2, 3)])[0])
    allowed = LeafFilter.from_mask(np.ones(2, bool))
    newer = add_identifiers(trie, [(4, 4)], [2])
    with pytest.raises(FilterError, match="2 identifiers, the trie 3"):
        recall(SCORER, newer, [PROMPT], SearchOptions(k=1, leaf_filter=allowed))


def test_filter_selects_each_added_identifier():
    """Base and added identifiers have one length: test single leaves and ranges of leaves."""
    trie = LiveTrie(build_trie([(0, 1), (0, 2), (3, 1), (3, 2)])[0])
    trie = add_identifiers(trie, [(0, 3), (0, 4), (3, 3), (1, 1), (1, 2)], range(4, 9))
    for leaf in range(trie.n_leaves):
        allowed = LeafFilter.from_mask(np.arange(trie.n_leaves) == leaf)
        hits, _ = search_hits(trie, k=3, leaf_filter=allowed)
        assert [key for key, _, _ in hits] == [int(trie.key(np.array([leaf]))[0])]


def test_empty_trie_finds_nothing_and_accepts_additions():
    trie = remove_identifiers(LiveTrie(build_trie([(0, 1), (2, 3)])[0]), [(0, 1), (2, 3)])
    for version in (trie, compact(trie)):
        assert search_hits(version, k=3) == ([], True)
        assert live_of(add_identifiers(version, [(0, 1)], [9])) == {(0, 1): 9}


def test_removed_sibling_takes_no_probability():
    """Scores equal those of a trie without the sibling: the probability is 1."""
    trie = remove_identifiers(LiveTrie(build_trie([(0, 1), (0, 2)])[0]), [(0, 2)])
    (ranking,) = recall(SCORER, trie, [PROMPT], SearchOptions(k=2, normalise=Normalise.CHILDREN))
    assert [(hit.token_ids, hit.score) for hit in ranking.hits] == [((0, 1), 1.0)]


def test_compacted_trie_is_saved_and_opened(tmp_path):
    trie = add_identifiers(LiveTrie(build_trie([(9, 9)])[0]), [(1, row) for row in range(10, 80)], range(10, 80))
    trie = compact(remove_identifiers(trie, [(1, row) for row in range(10, 80, 3)]))
    save_trie(trie.base, tmp_path / "trie.bin")
    expected = {(9, 9): 0} | {(1, row): row for row in range(10, 80) if (row - 10) % 3}
    assert live_of(LiveTrie(open_trie(tmp_path / "trie.bin"), keys=trie.keys)) == expected
