"""Adds and removes identifiers: each edit returns a new `LiveTrie` and leaves the old one unchanged.

Depends on token ids and keys; independent of files and images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import IdentifierCollision, IdentifierError
from llama_index_genret.trie.build import build_trie_of_paths
from llama_index_genret.trie.filter import LeafFilter
from llama_index_genret.trie.flat import Int64, Trie
from llama_index_genret.trie.live import LiveTrie, leaves_before

Path = tuple[int, ...]


def close_beginnings(identifiers: Sequence[Sequence[int]], end_token: int) -> list[Path]:
    """Append `end_token` to each identifier that is a prefix of another, so that the set becomes prefix-free.

    Raises:
        IdentifierError: `end_token` stands inside an identifier.
    """
    paths = [tuple(map(int, identifier)) for identifier in identifiers]
    for row, path in enumerate(paths):
        if end_token in path[:-1]:
            raise IdentifierError(f"identifier {row}, {path}, contains the end token {end_token}: choose another one.")
    prefixes = {first for first, later in pairwise(sorted(set(paths))) if later[: len(first)] == first}
    return [(*path, end_token) if path in prefixes else path for path in paths]


def add_identifiers(
    trie: LiveTrie, identifiers: Sequence[Sequence[int]], keys: Sequence[int], *, end_token: int | None = None
) -> LiveTrie:
    """Return a version with more identifiers.

    Args:
        keys: one integer for each identifier, which `LiveTrie.key` returns for its leaf.
        end_token: appended to an identifier that is a prefix of another, old or new. It then stays appended.
            Default None: such an identifier is an error.
    Raises:
        IdentifierCollision: one exists already or is given twice, or one is a prefix of another without `end_token`.
        IdentifierError: the numbers of identifiers and keys differ, or an identifier is empty, contains `end_token`
            or holds a value that is no token id.
    """
    if len(identifiers) != len(keys):
        raise IdentifierError(
            f"{len(identifiers)} identifiers came with {len(keys)} keys: pass one key for each identifier."
        )
    if not len(keys):
        return trie
    new_paths = [tuple(map(int, identifier)) for identifier in identifiers]
    places = _places_in_base(trie, _as_array(new_paths))
    old_paths, old_keys = _added_paths_and_keys(trie)
    prefix_leaves = np.unique(places.prefix_leaf[places.prefix_leaf >= 0])
    prefix_paths = [trie.base.token_ids_of(int(leaf)) for leaf in prefix_leaves]
    paths = [*old_paths, *prefix_paths, *new_paths]
    if end_token is not None:
        needs_end = [False] * (len(old_paths) + len(prefix_paths)) + places.is_prefix.tolist()
        paths = [(*path, end_token) if needed else path for path, needed in zip(paths, needs_end, strict=True)]
        paths = close_beginnings(paths, end_token)
    elif len(prefix_leaves) or places.is_prefix.any():
        at = int(((places.prefix_leaf >= 0) | places.is_prefix).argmax())
        raise IdentifierCollision(
            f"identifier {at}, {new_paths[at]}, is a prefix of an existing one, or the other way round: "
            "a search could not tell where the shorter one ends. Pass an end token."
        )
    live = trie.live if trie.live or not len(prefix_leaves) else LeafFilter.from_mask(np.ones(trie.n_leaves, np.bool_))
    base_only = LiveTrie(trie.base, None, _base_filter(trie, live.without(prefix_leaves)) if live else None, trie.keys)
    first_new = len(old_paths) + len(prefix_paths)
    taken = set(paths[:first_new])
    in_base = _places_in_base(base_only, _as_array(paths[first_new:])).equals
    for row, path in enumerate(paths[first_new:]):
        if path in taken or in_base[row]:
            raise IdentifierCollision(f"identifier {row}, {new_paths[row]}, exists already: remove it first.")
        taken.add(path)
    return _join(base_only, paths, np.concatenate([old_keys, trie.key(prefix_leaves), np.asarray(keys, np.int64)]))


def remove_identifiers(
    trie: LiveTrie, identifiers: Sequence[Sequence[int]], *, end_token: int | None = None
) -> LiveTrie:
    """Return a version without the given identifiers.

    Raises:
        IdentifierError: an identifier does not exist or is given twice. The message shows it.
    """
    targets = [tuple(map(int, identifier)) for identifier in identifiers]
    paths, keys = _added_paths_and_keys(trie)
    row_by_path = {path: row for row, path in enumerate(paths)}
    endings: list[Path] = [()] if end_token is None else [(), (end_token,)]
    in_base = np.stack([_places_in_base(trie, _as_array([t + e for t in targets])).leaf for e in endings])
    base_leaves, added_rows = set[int](), set[int]()
    for row, target in enumerate(targets):
        leaf = int(in_base[:, row].max())
        added = next((row_by_path[target + e] for e in endings if target + e in row_by_path), -1)
        if (leaf < 0 or leaf in base_leaves) and (added < 0 or added in added_rows):
            raise IdentifierError(
                f"identifier {row}, {target}, does not exist or is given twice. Nothing was removed: "
                "pass each existing identifier once."
            )
        if leaf >= 0:
            base_leaves.add(leaf)
        else:
            added_rows.add(added)
    live = trie.live or LeafFilter.from_mask(np.ones(trie.n_leaves, np.bool_))
    live = _base_filter(trie, live.without(np.array(sorted(base_leaves), np.int64)))
    base_only = LiveTrie(trie.base, None, live if live.n_allowed < live.n_leaves else None, trie.keys)
    rows = [row for row in range(len(paths)) if row not in added_rows]
    return _join(base_only, [paths[row] for row in rows], keys[rows])


def compact(trie: LiveTrie) -> LiveTrie:
    """Merge the live identifiers into one trie without tombstones. If none is live, return `trie` unchanged.

    No sort is needed: the added identifiers are merged into the sorted order of the base.
    """
    if (trie.added is None and trie.live is None) or trie.n_live == 0:
        return trie
    paths, leaves = trie.base.paths(), np.arange(trie.base.n_leaves)
    if trie.live:
        leaves = leaves[trie.live.contains(leaves)]
    paths, keys = paths[leaves], trie.key(leaves)
    if trie.added:
        added = trie.added.paths()
        at = np.searchsorted(leaves, leaves_before(trie.base, added))
        width = max(paths.shape[1], added.shape[1])
        paths = np.insert(_pad(paths, width), at, _pad(added, width), axis=0)
        keys = np.insert(keys, at, _added_keys(trie))
    longest = int((paths >= 0).sum(axis=1).max())
    base, _ = build_trie_of_paths(paths[:, :longest])
    return LiveTrie(base, keys=keys)


def edits_of(trie: LiveTrie) -> dict[str, NDArray[np.integer]]:
    """Return the difference between a version and its base, as arrays to store beside the base's file.

    removed: (r,) int64, leaves of the base.
    added: (n, L) int32 paths, -1 after the end.
    added_keys: (n,) int64.
    """
    leaves = np.arange(trie.base.n_leaves)
    removed = leaves[:0] if trie.live is None else leaves[~trie.live.contains(leaves)]
    added = trie.added.paths() if trie.added else np.zeros((0, trie.base.depth), np.int32)
    return {"removed": removed, "added": np.ascontiguousarray(added), "added_keys": _added_keys(trie)}


def with_edits(base: Trie, keys: Int64 | None, edits: Mapping[str, NDArray[np.integer]]) -> LiveTrie:
    """Return the version that has the given base and the edits that `edits_of` returned."""
    removed, added = edits["removed"].astype(np.int64), edits["added"].astype(np.int32)
    live = LeafFilter.from_mask(np.ones(base.n_leaves, np.bool_)).without(removed) if len(removed) else None
    base_only = LiveTrie(base, None, live, keys)
    paths = [tuple(token for token in path if token >= 0) for path in added.tolist()]
    return _join(base_only, paths, edits["added_keys"].astype(np.int64))


class _Places:
    """The positions of n paths in the live part of a base trie.

    leaf: (n,) int64, the leaf of the live identifier that equals the path, or -1.
    prefix_leaf: (n,) int64, the leaf of the live identifier that is a proper prefix of the path, or -1.
    is_prefix: (n,) bool, True if the path is a proper prefix of a live identifier.
    """

    def __init__(self, n: int) -> None:
        self.leaf, self.prefix_leaf = np.full(n, -1), np.full(n, -1)
        self.is_prefix = np.zeros(n, np.bool_)

    @property
    def equals(self) -> NDArray[np.bool_]:
        return self.leaf >= 0


def _places_in_base(trie: LiveTrie, paths: NDArray[np.int32]) -> _Places:
    places = _Places(len(paths))
    rows, node = np.arange(len(paths)), np.zeros(len(paths), np.int64)
    for column in [*paths.T, np.full(len(paths), -1, np.int32)]:
        lo, hi = trie.base.leaf_range(node)
        alive = hi > lo if trie.live is None else trie.live.count(lo, hi) > 0
        rows, node, lo = rows[alive], node[alive], lo[alive]
        token, ends = column[rows].astype(np.int64), trie.base.is_leaf(node)
        places.leaf[rows[ends & (token < 0)]] = lo[ends & (token < 0)]
        places.prefix_leaf[rows[ends & (token >= 0)]] = lo[ends & (token >= 0)]
        places.is_prefix[rows[~ends & (token < 0)]] = True
        continues = ~ends & (token >= 0)
        rows, node = rows[continues], trie.base.advance(node[continues], token[continues])
        rows, node = rows[node >= 0], node[node >= 0]
    return places


def _as_array(paths: Sequence[Path]) -> NDArray[np.int32]:
    """Return (n, L) int32, -1 after the end of a short path."""
    largest = np.iinfo(np.int32).max
    for row, path in enumerate(paths):
        if not path or min(path) < 0 or max(path) > largest:
            raise IdentifierError(f"identifier {row}, {path}, must have at least one token id, each in 0 .. {largest}.")
    array = np.full((len(paths), max(map(len, paths), default=1)), -1, np.int32)
    for row, path in enumerate(paths):
        array[row, : len(path)] = path
    return array


def _pad(paths: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    return np.pad(paths, ((0, 0), (0, width - paths.shape[1])), constant_values=-1)


def _added_paths_and_keys(trie: LiveTrie) -> tuple[list[Path], Int64]:
    """Return the paths and keys of the added identifiers."""
    if trie.added is None:
        return [], np.zeros(0, np.int64)
    paths = [tuple(token for token in path if token >= 0) for path in trie.added.paths().tolist()]
    return paths, _added_keys(trie)


def _added_keys(trie: LiveTrie) -> Int64:
    return trie.key(np.arange(trie.base.n_leaves, trie.n_leaves))


def _base_filter(trie: LiveTrie, live: LeafFilter) -> LeafFilter:
    return live.resized(trie.base.n_leaves)


def _join(base_only: LiveTrie, paths: list[Path], keys: Int64) -> LiveTrie:
    """Return a version with the base and tombstones of `base_only`, and `paths` as its added identifiers."""
    if not paths:
        return base_only
    added, order = build_trie_of_paths(_as_array(paths))
    live = base_only.live.resized(base_only.base.n_leaves + added.n_leaves) if base_only.live else None
    return LiveTrie(base_only.base, added, live, base_only.keys, keys[order])
