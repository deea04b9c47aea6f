"""Test the flat trie against its slow twin, and its size against a limit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration.bench.corpus import Corpus
from llama_index_genret.errors import DeadEnd, IdentifierCollision, IdentifierError, IndexDamaged, SearchError
from llama_index_genret.trie import Trie, build_trie
from llama_index_genret.trie import build as build_module
from llama_index_genret.trie._reference import DictTrie

TOKEN_IDS = st.sampled_from([0, 1, 2, 7, 300, 151_999, 2**31 - 1])

Identifiers = list[tuple[int, ...]]


@st.composite
def fixed_length_sets(draw: st.DrawFn) -> Identifiers:
    length = draw(st.integers(1, 4))
    return draw(st.lists(st.tuples(*[TOKEN_IDS] * length), min_size=1, max_size=25, unique=True))


@st.composite
def prefix_free_sets(draw: st.DrawFn) -> Identifiers:
    identifiers: Identifiers = []
    for new in draw(st.lists(st.lists(TOKEN_IDS, min_size=1, max_size=5).map(tuple), min_size=1, max_size=25)):
        if not any(new[: len(old)] == old or old[: len(new)] == new for old in identifiers):
            identifiers.append(new)
    return identifiers


identifier_sets = fixed_length_sets() | prefix_free_sets()

VARIABLE = [(5,), (6, 1), (6, 2, 9), (6, 2, 4), (7, 7, 7, 7)]


def all_nodes(trie: Trie) -> np.ndarray:
    return np.arange(trie.n_nodes)


def assert_equal_tries(trie: Trie, twin: DictTrie) -> None:
    """Compare every method for every node, with the node numbers that `DictTrie.nodes` defines."""
    prefixes = twin.nodes()
    number = {prefix: node for node, prefix in enumerate(prefixes)}
    assert (trie.n_nodes, trie.n_leaves) == (len(prefixes), len(twin.identifiers))
    assert trie.depth == max(map(len, prefixes))
    assert trie.level_sizes == tuple(sum(len(p) == d for p in prefixes) for d in range(1, trie.depth + 1))
    assert trie.token_ids().tolist() == twin.token_ids()
    nodes = all_nodes(trie)
    leaf = trie.is_leaf(nodes)
    assert leaf.tolist() == [twin.is_leaf(prefix) for prefix in prefixes]
    assert list(zip(*map(np.ndarray.tolist, trie.leaf_range(nodes)), strict=True)) == list(
        map(twin.leaf_range, prefixes)
    )
    assert trie.leaf_rank(nodes[leaf]).tolist() == [twin.leaf_rank(p) for p in prefixes if twin.is_leaf(p)]
    assert [trie.token_ids_of(rank) for rank in range(trie.n_leaves)] == twin.identifiers
    assert [trie.walk(prefix) for prefix in prefixes] == nodes.tolist()
    inner = [prefix for prefix in prefixes if not twin.is_leaf(prefix)]
    assert trie.first_leaf(nodes).tolist() == trie.leaf_range(nodes)[0].tolist()
    children = trie.children(nodes[~leaf])
    expected = [(r, t, number[c]) for r, p in enumerate(inner) for t, c in twin.children(p).items()]
    found = zip(children.row.tolist(), children.token_ids.tolist(), children.node.tolist(), strict=True)
    assert list(found) == expected
    assert children.offsets.tolist() == [0, *np.cumsum([len(twin.children(p)) for p in inner])]
    assert {a.dtype for a in (children.row, children.node, children.token_ids, children.offsets)} == {np.dtype("i8")}
    tokens = [*twin.token_ids(), 3]
    steps = [[number.get((*prefix, token), -1) for token in tokens] for prefix in prefixes]
    assert trie.advance(nodes[:, None], tokens).tolist() == steps


@given(identifier_sets)
def test_flat_trie_equals_nested_dicts(identifiers: Identifiers) -> None:
    trie, order = build_trie(identifiers)
    twin = DictTrie(identifiers)
    assert_equal_tries(trie, twin)
    assert order.tolist() == twin.order


@given(identifier_sets)
def test_paths_are_the_sorted_identifiers(identifiers: Identifiers) -> None:
    trie, _ = build_trie(identifiers)
    assert [tuple(t for t in path if t >= 0) for path in trie.paths().tolist()] == sorted(identifiers)


@given(identifier_sets, st.data())
def test_gather_returns_the_column_of_each_child(identifiers: Identifiers, data: st.DataObject) -> None:
    trie, _ = build_trie(identifiers)
    inner = all_nodes(trie)[~trie.is_leaf(all_nodes(trie))].tolist()
    children = trie.children(np.array(data.draw(st.lists(st.sampled_from(inner), min_size=1, max_size=6))))
    block = np.random.default_rng(0).normal(size=(len(children.first), len(children.alphabet)))
    columns = [children.alphabet.tolist().index(token) for token in children.token_ids]
    assert children.gather(block).tolist() == block[children.row, columns].tolist()


@given(fixed_length_sets())
def test_array_and_list_build_the_same_trie(identifiers: Identifiers) -> None:
    trie, order = build_trie(np.array(identifiers))
    assert_equal_tries(trie, DictTrie(identifiers))
    assert order.tolist() == build_trie(identifiers)[1].tolist()


@given(st.lists(st.lists(TOKEN_IDS, max_size=3).map(tuple), max_size=8))
def test_build_accepts_exactly_prefix_free_sets(identifiers: Identifiers) -> None:
    def outcome(build: object) -> type | None:
        try:
            build(identifiers)  # type: ignore[operator]
        except IdentifierError as error:
            return type(error)
        return None

    assert outcome(build_trie) == outcome(DictTrie)


@given(identifier_sets, st.data())
def test_repeated_unordered_nodes_give_children_per_row(identifiers: Identifiers, data: st.DataObject) -> None:
    trie, _ = build_trie(identifiers)
    inner = all_nodes(trie)[~trie.is_leaf(all_nodes(trie))]
    rows = data.draw(st.lists(st.sampled_from(inner.tolist()), max_size=6))
    together = trie.children(np.array(rows, np.int64))
    for row, node in enumerate(rows):
        alone, entries = trie.children(np.array([node])), slice(together.offsets[row], together.offsets[row + 1])
        assert together.node[entries].tolist() == alone.node.tolist()
        assert set(together.row[entries].tolist()) == {row}
    assert len(together.offsets) == len(rows) + 1


@pytest.mark.parametrize("n", [1, 256, 257, 65_537])
def test_alphabet_of_any_size_keeps_its_tokens(n: int) -> None:
    """One symbol per image needs codes of 1, 2 and 4 bytes."""
    identifiers = np.arange(n)[:, None] * 3 + 5
    trie, order = build_trie(identifiers[::-1])
    assert trie.children(np.zeros(1, np.int64)).token_ids.tolist() == identifiers[:, 0].tolist()
    assert trie.advance(0, identifiers[:, 0]).tolist() == list(range(1, n + 1))
    assert (trie.advance(0, identifiers[:, 0] + 1) == -1).all()
    assert order.tolist() == list(range(n))[::-1]


@given(identifier_sets)
def test_int64_offsets_equal_int32_offsets(identifiers: Identifiers) -> None:
    arrays = build_trie(identifiers)[0].arrays()
    wide = {name: a.astype(np.int64) if name in ("first_child", "leaf_lo") else a for name, a in arrays.items()}
    assert_equal_tries(Trie.from_arrays(wide), DictTrie(identifiers))


def test_offsets_beyond_int32_are_int64() -> None:
    assert [build_module._offset_dtype(n) for n in (2**31 - 1, 2**31)] == [np.int32, np.int64]


@pytest.mark.parametrize(
    ("identifiers", "match"),
    [
        ([], "no identifiers"),
        (np.empty((0, 4), np.int64), "no identifiers"),
        ([(1,), ()], "identifier 1 is empty"),
        ([(1, 2), (3,), (4, -5)], "identifier 2 has the token id -5"),
        ([(1,), (-2, 3)], "identifier 1 has the token id -2"),
        ([(1, 2), (3, 2**31)], "identifier 1 has the token id 2147483648"),
        ([(1,), (2**64,)], "integers"),
        ([(1.5,)], "integers"),
        (["ab"], "integers"),
        (np.arange(3), "shape"),
    ],
)
def test_invalid_identifier_is_reported(identifiers: object, match: str) -> None:
    with pytest.raises(IdentifierError, match=match):
        build_trie(identifiers)  # type: ignore[arg-type]


def test_duplicate_error_shows_rows_and_identifier() -> None:
    with pytest.raises(IdentifierCollision, match=r"identifiers 0 and 2 are both \(5, 6\).*Append"):
        build_trie([(5, 6), (4, 6), (5, 6)])


def test_prefix_error_shows_both_identifiers() -> None:
    with pytest.raises(IdentifierCollision, match=r"identifier 2, \(5,\), .* identifier 0, \(5, 6\).*end token"):
        build_trie([(5, 6), (4,), (5,)])


@pytest.mark.parametrize("identifiers", [VARIABLE, [(1, 2), (3, 4)]])
def test_children_of_a_leaf_raise_dead_end(identifiers: Identifiers) -> None:
    trie, _ = build_trie(identifiers)
    for identifier in identifiers:
        with pytest.raises(DeadEnd, match="row 1"):
            trie.children(np.array([0, trie.walk(identifier)]))


def test_invalid_nodes_and_leaves_raise_search_errors() -> None:
    trie, _ = build_trie(VARIABLE)
    for nodes in ([-1], [trie.n_nodes], [0.5]):
        with pytest.raises(SearchError, match="integers in 0"):
            trie.leaf_range(np.array(nodes))
    with pytest.raises(SearchError, match="node 0 is no leaf"):
        trie.leaf_rank(np.array([1, 0]))
    with pytest.raises(SearchError, match="shape"):
        trie.children(np.zeros((1, 1), np.int64))
    for leaf in (-1, trie.n_leaves):
        with pytest.raises(SearchError, match=f"no leaf {leaf}"):
            trie.token_ids_of(leaf)


def test_walk_error_shows_token_and_depth() -> None:
    trie, _ = build_trie(VARIABLE)
    with pytest.raises(IdentifierError, match=r"token 8 at depth 1 .*no identifier continues"):
        trie.walk((6, 8))
    with pytest.raises(IdentifierError, match=r"token 8 at depth 1 .*ends before it"):
        trie.walk((5, 8))


@pytest.mark.parametrize("name", build_trie(VARIABLE)[0].arrays())
def test_arrays_of_wrong_shape_or_dtype_are_rejected(name: str) -> None:
    arrays = build_trie(VARIABLE)[0].arrays()
    for wrong in (arrays[name][:-1], arrays[name].astype(np.float32), arrays[name][:, None]):
        with pytest.raises(IndexDamaged):
            Trie.from_arrays({**arrays, name: wrong})
    with pytest.raises(IndexDamaged, match="not"):
        Trie.from_arrays({**arrays, "more": arrays[name]})
    with pytest.raises(IndexDamaged, match=name):
        Trie.from_arrays({other: array for other, array in arrays.items() if other != name})


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("level_start", [0, 2]),
        ("level_start", [0, 1, 0]),
        ("first_child", [2]),
        ("alphabet_start", [0, 0]),
        ("alphabet_start", [1]),
    ],
)
def test_inconsistent_arrays_are_rejected(name: str, entries: list[int]) -> None:
    arrays = build_trie(VARIABLE)[0].arrays()
    wrong = arrays[name].copy()
    wrong[: len(entries)] = entries
    with pytest.raises(IndexDamaged, match=name):
        Trie.from_arrays({**arrays, name: wrong})


def test_level_without_alphabet_is_rejected() -> None:
    arrays = build_trie(VARIABLE)[0].arrays()
    with pytest.raises(IndexDamaged, match=r"alphabet_start is .* for 4 levels"):
        Trie.from_arrays({**arrays, "alphabet_start": np.delete(arrays["alphabet_start"], 1)})


def test_million_identifiers_take_at_most_4_5_bytes_each() -> None:
    trie, _ = build_trie(Corpus.sample(1_000_000, seed=0).token_ids)
    assert trie.n_leaves == 1_000_000
    assert sum(array.nbytes for array in trie.arrays().values()) / trie.n_leaves <= 4.5
