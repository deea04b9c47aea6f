"""Test the codes of image features: clusters, levels, and the suffix for collisions."""

import sys
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_index_genret.identifiers import get_scheme
from llama_index_genret.identifiers.base import suffix_collisions
from llama_index_genret.identifiers.clustering import _shared_codes, kmeans
from llama_index_genret.identifiers.structured import SUFFIX_SYMBOLS, StructuredScheme
from tests.identifiers.test_schemes import assert_prefix_free, assert_unique, facts, random_features

pytestmark = pytest.mark.torch


@given(st.sampled_from(["kmeans", "rq"]), st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_structured_identifiers_are_prefix_free(method, n_distinct, copies, seed):
    features = np.repeat(random_features(n_distinct, 5, seed), copies, axis=0)[:300]
    scheme = get_scheme("structured", method=method, levels=2, sizes=3)
    identifiers = scheme.fit(facts(len(features), features), seed=seed)
    assert_prefix_free(identifiers)
    assert {s for identifier in identifiers for s in identifier} <= set(scheme.new_symbols())


def test_suffix_is_added_only_where_codes_collide():
    codes = [("a",), ("b",), ("a",), ("c",)]
    named = suffix_collisions(codes, lambda count, size: (f"s{count}/{size}",))
    assert named == [("a", "s0/2"), ("b",), ("a", "s1/2"), ("c",)]


def test_added_image_with_taken_codes_gets_known_suffix():
    features = random_features(40)
    scheme = StructuredScheme()
    identifiers = scheme.fit(facts(40, features), seed=0)
    row = next(row for row, identifier in enumerate(identifiers) if len(identifier) == 2)
    symbols = scheme.new_symbols()
    added = scheme.extend(
        facts(SUFFIX_SYMBOLS + 1, np.repeat(features[[row]], SUFFIX_SYMBOLS + 1, axis=0)), identifiers
    )
    assert added[0] == (*identifiers[row], "<s_0>")
    assert added[-1] == (*identifiers[row], "<s_0>", "<s_0>")
    assert scheme.new_symbols() == symbols


@pytest.mark.parametrize("method", ["kmeans", "rq"])
def test_codes_are_the_nearest_centroids_by_definition(method):
    """Compare with plain loops over the stored arrays."""
    features = random_features(120)
    scheme = StructuredScheme(method, levels=3, sizes=[4, 3, 5])
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
        codes = _shared_codes(away, np.array([0, children, 2 * children]), 5, seed=0)
        for own, found in zip(np.split(distances, 2), np.split(codes, 2), strict=True):
            sums = [own[range(children), list(numbers)].sum() for numbers in permutations(range(5), children)]
            assert own[range(children), found].sum() == pytest.approx(min(sums))


def test_tree_stored_without_codes_numbers_children():
    features = random_features(60)
    scheme = StructuredScheme(levels=2, sizes=5, source="vectors")
    scheme.fit(facts(60, features), seed=0)
    stored = scheme.arrays()
    older = StructuredScheme(levels=2, sizes=5)
    older.restore({name: array for name, array in stored.items() if not name.startswith("codes")})
    codes, known = older.encode(features), scheme.encode(features)
    for parent in range(5):
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
    scheme = StructuredScheme(levels=3, sizes=10)
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
