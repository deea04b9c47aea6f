"""Test the codes of image features: clusters, levels, and the next free code for collisions."""

import math
import sys
from itertools import pairwise, permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_index_genret.errors import IdentifierError
from llama_index_genret.identifiers import get_scheme
from llama_index_genret.identifiers.clustering import _shared_codes, kmeans
from llama_index_genret.identifiers.structured import StructuredScheme
from tests.identifiers.test_schemes import assert_prefix_free, assert_unique, facts, random_features

pytestmark = pytest.mark.torch


METHODS = st.sampled_from(["kmeans", "rq"])


def numbers(identifier):
    """`("<g0_3>", "<g1_0>")` as (3, 0)."""
    return tuple(int(symbol.strip("<>g").partition("_")[2]) for symbol in identifier)


def is_free(prefix, sizes, taken):
    below = sum(codes[: len(prefix)] == prefix for codes in taken)
    return below < math.prod(sizes[len(prefix) :])


def next_free(arrays, method, sizes, feature, own, taken):
    """The nearest free codes by definition, in plain loops over the stored arrays."""
    depth = max(depth for depth in range(len(own) + 1) if is_free(own[:depth], sizes, taken))
    codes = own[:depth]
    while len(codes) < len(sizes):
        distance = code_distances(arrays, method, sizes, feature, codes)
        free = [c for c in range(sizes[len(codes)]) if is_free((*codes, c), sizes, taken)]
        codes = (*codes, min(free, key=lambda c: (distance[c], c)))
    return codes


def code_distances(arrays, method, sizes, feature, prefix):
    """The squared distance to each code of the next level; infinity for a code without a place."""
    unit, centre, node = feature / np.linalg.norm(feature), np.zeros_like(feature), 0
    places = {}
    for level in range(len(prefix) + 1):
        if method == "rq":
            places = dict(enumerate(centre + arrays[f"centroids{level}"]))
            nodes = dict.fromkeys(places)
        else:
            places, nodes = dict(enumerate(centre + arrays[f"directions{level}"])), {}
            if node is not None:
                for child in range(*arrays[f"offsets{level}"][node : node + 2]):
                    code = int(arrays[f"codes{level}"][child])
                    places[code], nodes[code] = arrays[f"centroids{level}"][child], child
        if level < len(prefix):
            centre, node = places.get(prefix[level], centre), nodes.get(prefix[level])
    return [np.float32(((unit - places[c]) ** 2).sum()) if c in places else np.inf for c in range(sizes[len(prefix)])]


@given(METHODS, st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_identifiers_are_distinct_and_of_one_length(method, n_distinct, copies, seed):
    features = np.repeat(random_features(n_distinct, 5, seed), copies, axis=0)[:300]
    scheme = get_scheme("structured", method=method, levels=2, sizes=3)
    identifiers = scheme.fit(facts(len(features), features), seed=seed)
    assert_unique(identifiers)
    assert {len(identifier) for identifier in identifiers} == {scheme.levels}
    assert math.prod(scheme.codes_per_level()) >= 2 * len(features)
    assert {s for identifier in identifiers for s in identifier} <= set(scheme.new_symbols())


@given(METHODS, st.integers(2, 40), st.integers(1, 30), st.integers(0, 99))
def test_one_of_equal_codes_keeps_them_the_nearest(method, n, copies, seed):
    """An image loses its codes only to one that is at least as near to their centroid."""
    draw = np.random.default_rng(seed)
    features = np.concatenate([random_features(n, 3, seed)] * copies)[:60]
    features = (features + draw.normal(0, 0.05, features.shape)).astype(np.float32)
    scheme = StructuredScheme(method)
    identifiers = scheme.fit(facts(len(features), features), seed=0)
    own, distance = scheme._codebooks.encode(features)
    holder = {numbers(identifier): row for row, identifier in enumerate(identifiers)}
    for row, codes in enumerate(map(tuple, own.tolist())):
        assert codes in holder
        keeper = holder[codes]
        assert tuple(own[keeper]) == codes
        assert (distance[keeper], keeper) <= (distance[row], row)


@given(METHODS, st.integers(1, 12), st.integers(0, 99), st.data())
def test_added_image_gets_the_next_free_code_by_definition(method, n, seed, data):
    scheme = StructuredScheme(method, levels=3, sizes=3)
    identifiers = scheme.fit(facts(n, random_features(n, 4, seed)), seed=0)
    every = sorted(product(range(3), repeat=3))
    others = data.draw(st.lists(st.sampled_from(every), unique=True, max_size=26))
    taken = {*map(numbers, identifiers), *others}
    if len(taken) == len(every):
        taken.discard(others[-1])
    (feature,) = random_features(1, 4, seed + 1000)
    symbols = [tuple(f"<g{level}_{code}>" for level, code in enumerate(codes)) for codes in taken]
    (added,) = scheme.extend(facts(1, feature[None]), symbols)
    (own,) = map(tuple, scheme.encode(feature[None]).tolist())
    assert numbers(added) == next_free(scheme.arrays(), method, (3, 3, 3), feature, own, taken)
    restored = get_scheme("structured", **scheme.options())
    restored.restore(scheme.arrays())
    assert restored.extend(facts(1, feature[None]), symbols) == [added]


@pytest.mark.parametrize("method", ["kmeans", "rq"])
def test_every_code_is_given_before_an_error_names_the_way_out(method):
    scheme = StructuredScheme(method, levels=2, sizes=4)
    identifiers = scheme.fit(facts(5, random_features(5)), seed=0)
    identifiers += scheme.extend(facts(11, random_features(11, seed=2)), identifiers)
    assert sorted(map(numbers, identifiers)) == sorted(product(range(4), repeat=2))
    with pytest.raises(IdentifierError, match=r"2 images .* 0 of 16 are free .*`genret remove`.*`genret index`"):
        scheme.extend(facts(2, random_features(2)), identifiers)
    assert scheme.extend(facts(1, random_features(1)), identifiers[1:]) == identifiers[:1]  # a removed one is free


@pytest.mark.parametrize(
    ("options", "n", "sizes"),
    [
        ({}, 100, (15, 15)),
        ({"sizes": 2}, 9, (2,) * 5),
        ({"sizes": [4, 3]}, 20, (4, 3, 3, 3)),
        ({"levels": 1}, 40_000, (2**16, 2**16)),
        ({"levels": 1, "sizes": 7}, 3, (7,)),
    ],
)
def test_new_index_has_two_codes_for_each_image(options, n, sizes):
    scheme = StructuredScheme(**options)
    scheme._choose_sizes(n)
    assert scheme.codes_per_level() == sizes


def test_older_index_keeps_suffix_symbols_and_gives_free_codes():
    """Codes that have a suffix somewhere are taken, so that no identifier is a prefix of another."""
    scheme = StructuredScheme(levels=2, sizes=3)
    scheme.fit(facts(4, random_features(4)), seed=0)
    older = StructuredScheme(levels=2, sizes=3, suffixes=32)
    older.restore({name: array for name, array in scheme.arrays().items() if not name.startswith("directions")})
    assert older.new_symbols() == [*scheme.new_symbols(), *(f"<s_{number}>" for number in range(32))]
    assert older.options() == {**scheme.options(), "suffixes": 32}
    taken = [("<g0_0>", "<g1_0>", "<s_0>"), ("<g0_0>", "<g1_0>", "<s_1>"), ("<g0_1>", "<g1_0>")]
    added = older.extend(facts(7, random_features(7)), taken)
    assert_prefix_free([*taken, *added])
    assert {len(identifier) for identifier in added} == {2}


@pytest.mark.parametrize("method", ["kmeans", "rq"])
def test_codes_are_the_nearest_centroids_by_definition(method):
    """Compare with plain loops over the stored arrays."""
    features = random_features(120)
    scheme = StructuredScheme(method, levels=3, sizes=[7, 6, 6])
    scheme.fit(facts(120, features), seed=0)
    arrays = scheme.arrays()
    for feature, found in zip(features, scheme.encode(features).tolist(), strict=True):
        rest, node, expected = feature / np.linalg.norm(feature), 0, []
        for level in range(3):
            centroids, first = arrays[f"centroids{level}"], 0
            if method == "kmeans":
                first, end = arrays[f"offsets{level}"][node : node + 2]
                centroids = centroids[first:end]
            nearest = int(np.argmin([np.sum((rest - c) ** 2) for c in centroids]))
            rest = rest - centroids[nearest] if method == "rq" else rest
            node = int(first) + nearest
            expected.append(arrays[f"codes{level}"][node] if method == "kmeans" else nearest)
        assert found == expected


def test_shared_code_means_one_direction_under_all_parents():
    """Six distant clusters have children in the same four directions; three of them lack one direction."""
    draw = np.random.default_rng(0)
    places, ways = np.eye(12, dtype=np.float32)[:6], 0.3 * np.eye(12, dtype=np.float32)[6:10]
    chosen = [(place, way) for place in range(6) for way in draw.permutation(4)[: 4 if place < 3 else 3]]
    features = np.stack([places[place] + ways[way] for place, way in chosen for _ in range(5)])
    scheme = StructuredScheme(levels=2, sizes=[6, 4], source="vectors")
    scheme.fit(facts(len(features), features), seed=0)
    codes = scheme.encode(features)[:, 1].reshape(len(chosen), 5)
    of_way = [
        {int(code) for (_, own), row in zip(chosen, codes, strict=True) if own == way for code in row}
        for way in range(4)
    ]
    assert sorted(map(sorted, of_way)) == [[0], [1], [2], [3]]


def test_shared_codes_minimise_the_sum_of_distances():
    draw = np.random.default_rng(1)
    for children in (1, 3, 5):
        away = draw.normal(size=(2 * children, 4)).astype(np.float32)
        shared = kmeans(away, 5, seed=0)
        distances = np.pad(((away[:, None] - shared) ** 2).sum(-1), ((0, 0), (0, 5 - len(shared))), constant_values=32)
        codes = _shared_codes(away, np.array([0, children, 2 * children]), shared)
        for own, found in zip(np.split(distances, 2), np.split(codes, 2), strict=True):
            sums = [own[range(children), list(numbers)].sum() for numbers in permutations(range(5), children)]
            assert own[range(children), found].sum() == pytest.approx(min(sums))


def test_tree_stored_without_codes_numbers_children():
    features = random_features(60)
    scheme = StructuredScheme(levels=2, sizes=11, source="vectors")
    scheme.fit(facts(60, features), seed=0)
    stored = scheme.arrays()
    older = StructuredScheme(levels=2, sizes=11)
    older.restore({name: array for name, array in stored.items() if not name.startswith("codes")})
    codes, known = older.encode(features), scheme.encode(features)
    for parent in range(11):
        below = codes[codes[:, 0] == parent, 1]
        assert set(below) == set(range(len(set(below))))
    assert len(np.unique(np.hstack([codes, known]), axis=0)) == len(
        np.unique(codes, axis=0)
    )  # different numbers, same tree


def test_only_occupied_nodes_of_the_tree_are_stored():
    """Four levels of 50 would need 6,250,000 nodes as a dense array."""
    features = random_features(200)
    scheme = StructuredScheme(levels=4, sizes=50)
    scheme.fit(facts(200, features), seed=0)
    codes = scheme.encode(features)
    for level in range(4):
        assert len(scheme.arrays()[f"centroids{level}"]) == len(np.unique(codes[:, : level + 1], axis=0))


def test_encode_calls_do_not_grow_with_images():
    features = random_features(2000, 64)
    scheme = StructuredScheme(levels=3, sizes=16)
    scheme.fit(facts(2000, features), seed=0)
    few, many = random_features(1000, 64, seed=2), random_features(100_000, 64, seed=2)
    assert calls_of(lambda: scheme.encode(many)) < 2 * calls_of(lambda: scheme.encode(few))


def calls_of(work):
    """Count the Python function calls during `work`, which do not depend on the speed of the machine."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def test_distant_clusters_do_not_share_first_symbols():
    """Similar images share prefixes, so that a wrong result is a similar image."""
    rng = np.random.default_rng(0)
    features = (np.repeat(np.eye(3)[:2], 20, axis=0) + rng.normal(0, 0.01, (40, 3))).astype(np.float32)
    for method in ("kmeans", "rq"):
        identifiers = get_scheme("structured", method=method, levels=2, sizes=6).fit(facts(40, features), seed=0)
        assert not {i[0] for i in identifiers[:20]} & {i[0] for i in identifiers[20:]}


def test_each_residual_level_reduces_the_error():
    features = random_features(300)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scheme = StructuredScheme("rq", levels=4, sizes=8)
    scheme.fit(facts(300, features), seed=0)
    codes, rest, errors = scheme.encode(features), unit, [1.0]
    for level in range(4):
        rest = rest - scheme.arrays()[f"centroids{level}"][codes[:, level]]
        errors.append(float((rest**2).sum(1).mean()))
    assert all(later < 0.95 * before for before, later in pairwise(errors))


def test_each_residual_centroid_is_a_cluster_mean():
    features = random_features(300)
    scheme = StructuredScheme("rq", levels=3, sizes=8)
    scheme.fit(facts(300, features), seed=0)
    rest, codes = features / np.linalg.norm(features, axis=1, keepdims=True), scheme.encode(features)
    for level in range(3):
        centroids, code = scheme.arrays()[f"centroids{level}"], codes[:, level]
        np.testing.assert_allclose(centroids, [rest[code == c].mean(0) for c in range(len(centroids))], atol=1e-3)
        rest = rest - centroids[code]


@pytest.mark.parametrize("method", ["kmeans", "rq"])
def test_images_that_differ_by_rounding_get_identifiers(method):
    """Centroids this close have no nearest image. They must not count as nodes."""
    features = 1 + random_features(60) * np.float32(1e-7)
    scheme = StructuredScheme(method, levels=3, sizes=20)
    identifiers = scheme.fit(facts(60, features), seed=0)
    assert_prefix_free(identifiers)
    assert_unique(identifiers + scheme.extend(facts(60, features), identifiers))
    first = scheme.encode(features)[:, 0]
    assert len(scheme.arrays()["centroids0"]) == len(np.unique(first))


def test_scale_of_features_has_no_effect():
    features = random_features(50)
    scheme = StructuredScheme()
    scheme.fit(facts(50, features), seed=0)
    np.testing.assert_array_equal(scheme.encode(features * 37.0), scheme.encode(features))


@pytest.mark.parametrize(("n", "levels"), [(1, 2), (100, 2), (1024, 2), (1025, 3)])
def test_depth_follows_the_number_of_images(n, levels):
    scheme = StructuredScheme()
    scheme.fit(facts(n, random_features(n, 2)), seed=0)
    assert scheme.levels == levels
