"""Adding and removing identifiers: each edit makes a new `LiveTrie`, and leaves the one before as it is.

Knows token ids and keys; nothing of files or images.
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
    """Append `end_token` to each identifier that is the beginning of another, so that none is any more.

    Raises:
        IdentifierError: `end_token` stands inside an identifier.
    """
    names = [tuple(map(int, identifier)) for identifier in identifiers]
    for row, name in enumerate(names):
        if end_token in name[:-1]:
            raise IdentifierError(f"identifier {row}, {name}, holds the end token {end_token}: choose another one.")
    begins = {first for first, later in pairwise(sorted(set(names))) if later[: len(first)] == first}
    return [(*name, end_token) if name in begins else name for name in names]


def add_identifiers(
    trie: LiveTrie, identifiers: Sequence[Sequence[int]], keys: Sequence[int], *, end_token: int | None = None
) -> LiveTrie:
    """The version with more identifiers.

    Args:
        keys: what each stands for.
        end_token: closes an identifier that is the beginning of another, old or new; once closed it stays so.
    Raises:
        IdentifierCollision: one is there already or is given twice; or begins another, and `end_token` is None.
        IdentifierError: an identifier is empty, holds `end_token` or something that is no token id.
    """
    if len(identifiers) != len(keys):
        raise IdentifierError(f"{len(identifiers)} identifiers came with {len(keys)} keys: give each one.")
    if not len(keys):
        return trie
    names = [tuple(map(int, identifier)) for identifier in identifiers]
    known = _places_in_base(trie, _as_paths(names))
    old_paths, old_keys = _added(trie)
    begun = np.unique(known.begun_by[known.begun_by >= 0])
    moved = [trie.base.token_ids_of(int(leaf)) for leaf in begun]
    paths = [*old_paths, *moved, *names]
    if end_token is not None:
        closed = [False] * (len(old_paths) + len(moved)) + known.goes_on.tolist()
        paths = [(*path, end_token) if close else path for path, close in zip(paths, closed, strict=True)]
        paths = close_beginnings(paths, end_token)
    elif len(begun) or known.goes_on.any():
        at = int(((known.begun_by >= 0) | known.goes_on).argmax())
        raise IdentifierCollision(
            f"identifier {at}, {names[at]}, is the beginning of one that is there already, or the other way round: "
            "nothing would tell where the shorter one ends. Name an end token."
        )
    live = trie.live if trie.live or not len(begun) else LeafFilter.from_mask(np.ones(trie.n_leaves, np.bool_))
    kept = LiveTrie(trie.base, None, _of_base(trie, live.without(begun)) if live else None, trie.keys)
    first_new = len(old_paths) + len(moved)
    taken = set(paths[:first_new])
    in_base = _places_in_base(kept, _as_paths(paths[first_new:])).equals
    for row, path in enumerate(paths[first_new:]):
        if path in taken or in_base[row]:
            raise IdentifierCollision(f"identifier {row}, {names[row]}, is there already: remove it first.")
        taken.add(path)
    return _join(kept, paths, np.concatenate([old_keys, trie.key(begun), np.asarray(keys, np.int64)]))


def remove_identifiers(
    trie: LiveTrie, identifiers: Sequence[Sequence[int]], *, end_token: int | None = None
) -> LiveTrie:
    """The version without some identifiers.

    Raises:
        IdentifierError: one is not there, or is given twice; names it, and nothing is removed.
    """
    names = [tuple(map(int, identifier)) for identifier in identifiers]
    paths, keys = _added(trie)
    place = {path: row for row, path in enumerate(paths)}
    endings: list[Path] = [()] if end_token is None else [(), (end_token,)]
    in_base = np.stack([_places_in_base(trie, _as_paths([n + e for n in names])).leaf for e in endings])
    dead, gone = set[int](), set[int]()
    for row, name in enumerate(names):
        leaf = int(in_base[:, row].max())
        added = next((place[name + e] for e in endings if name + e in place), -1)
        if (leaf < 0 or leaf in dead) and (added < 0 or added in gone):
            raise IdentifierError(f"identifier {row}, {name}, is not there, or is removed twice. Nothing was removed.")
        if leaf >= 0:
            dead.add(leaf)
        else:
            gone.add(added)
    live = trie.live or LeafFilter.from_mask(np.ones(trie.n_leaves, np.bool_))
    live = _of_base(trie, live.without(np.array(sorted(dead), np.int64)))
    kept = LiveTrie(trie.base, None, live if live.n_allowed < live.n_leaves else None, trie.keys)
    rows = [row for row in range(len(paths)) if row not in gone]
    return _join(kept, [paths[row] for row in rows], keys[rows])


def compact(trie: LiveTrie) -> LiveTrie:
    """The same identifiers in one trie, without tombstones. Where none is left, the tombstones stay.

    Costs no sort: what was added is merged into the sorted order of the base.
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
        paths = np.insert(_widened(paths, width), at, _widened(added, width), axis=0)
        keys = np.insert(keys, at, _added_keys(trie))
    longest = int((paths >= 0).sum(axis=1).max())
    base, _ = build_trie_of_paths(paths[:, :longest])
    return LiveTrie(base, keys=keys)


def edits_of(trie: LiveTrie) -> dict[str, NDArray[np.integer]]:
    """What distinguishes a version from its base, as arrays to store beside the base's file.

    removed: (r,) int64 leaves. added: (n, L) int32 paths, -1 after the end. added_keys: (n,) int64.
    """
    leaves = np.arange(trie.base.n_leaves)
    removed = leaves[:0] if trie.live is None else leaves[~trie.live.contains(leaves)]
    added = trie.added.paths() if trie.added else np.zeros((0, trie.base.depth), np.int32)
    return {"removed": removed, "added": np.ascontiguousarray(added), "added_keys": _added_keys(trie)}


def with_edits(base: Trie, keys: Int64 | None, edits: Mapping[str, NDArray[np.integer]]) -> LiveTrie:
    """The version that `edits_of` described."""
    removed, added = edits["removed"].astype(np.int64), edits["added"].astype(np.int32)
    live = LeafFilter.from_mask(np.ones(base.n_leaves, np.bool_)).without(removed) if len(removed) else None
    kept = LiveTrie(base, None, live, keys)
    paths = [tuple(token for token in path if token >= 0) for path in added.tolist()]
    return _join(kept, paths, edits["added_keys"].astype(np.int64))


class _Places:
    """Where n paths lie in the live part of a base trie.

    leaf: (n,) the live identifier that equals the path, or -1. begun_by: (n,) the live identifier that is a proper
    beginning of the path, or -1. goes_on: (n,) whether the path is a proper beginning of a live identifier.
    """

    def __init__(self, n: int) -> None:
        self.leaf, self.begun_by = np.full(n, -1), np.full(n, -1)
        self.goes_on = np.zeros(n, np.bool_)

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
        places.begun_by[rows[ends & (token >= 0)]] = lo[ends & (token >= 0)]
        places.goes_on[rows[~ends & (token < 0)]] = True
        on = ~ends & (token >= 0)
        rows, node = rows[on], trie.base.advance(node[on], token[on])
        rows, node = rows[node >= 0], node[node >= 0]
    return places


def _as_paths(names: Sequence[Path]) -> NDArray[np.int32]:
    """(n, L) int32, -1 after the end of a short one."""
    for row, name in enumerate(names):
        if not name or min(name) < 0 or max(name) > np.iinfo(np.int32).max:
            raise IdentifierError(f"identifier {row}, {name}, must be token ids, at least one, none negative.")
    paths = np.full((len(names), max(map(len, names), default=1)), -1, np.int32)
    for row, name in enumerate(names):
        paths[row, : len(name)] = name
    return paths


def _widened(paths: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    return np.pad(paths, ((0, 0), (0, width - paths.shape[1])), constant_values=-1)


def _added(trie: LiveTrie) -> tuple[list[Path], Int64]:
    """Paths and keys of what was added."""
    if trie.added is None:
        return [], np.zeros(0, np.int64)
    paths = [tuple(token for token in path if token >= 0) for path in trie.added.paths().tolist()]
    return paths, _added_keys(trie)


def _added_keys(trie: LiveTrie) -> Int64:
    return trie.key(np.arange(trie.base.n_leaves, trie.n_leaves))


def _of_base(trie: LiveTrie, live: LeafFilter) -> LeafFilter:
    return live.resized(trie.base.n_leaves)


def _join(kept: LiveTrie, paths: list[Path], keys: Int64) -> LiveTrie:
    """A base with its tombstones, and what was added to it."""
    if not paths:
        return kept
    added, order = build_trie_of_paths(_as_paths(paths))
    live = kept.live.resized(kept.base.n_leaves + added.n_leaves) if kept.live else None
    return LiveTrie(kept.base, added, live, kept.keys, keys[order])
