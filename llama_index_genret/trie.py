"""A set of token sequences, stored so that "what may come next?" is one array slice.

Knows token ids, node numbers and leaf numbers; nothing of text, tokenizers, images or models.
The slow twin is `_reference.DictTrie`; the tests hold the two equal.

Nodes are numbered breadth first: 0 is the root, the nodes of one level are contiguous and sorted by
(parent, token id). So the children of node v are the nodes first_child[v] .. first_child[v + 1], the next
state is the child's number, and nothing else needs storing: one small code per node, one offset per node
that has children. Leaves are numbered by the rank of their identifier, so every node is a range of leaves.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llama_index_genret.errors import (
    DeadEnd,
    FilterError,
    IdentifierCollision,
    IdentifierError,
    IndexDamaged,
    IndexVersionError,
    SearchError,
)

Int64 = NDArray[np.int64]

_DTYPES = {
    "level_start": ("<i8",),
    "first_child": ("<i4", "<i8"),
    "code": ("|u1", "<u2", "<u4"),
    "alphabet": ("<i4",),
    "alphabet_start": ("<i8",),
    "leaf_lo": ("<i4", "<i8"),
}
_MAX_TOKEN_ID = np.iinfo(np.int32).max
_MAGIC, _VERSION, _ALIGNMENT = b"genrTRIE", 1, 64
_PREAMBLE_BYTES, _DIGEST_BYTES = 16, 32
_EARLIER_BITS = (np.uint64(1) << np.arange(64, dtype=np.uint64)) - np.uint64(1)  # entry i: bits 0 .. i - 1


@dataclass(frozen=True)
class Children:
    """The children of n nodes, one after another: a ragged array of m entries.

    row: (m,) int64, position of the parent among the nodes that were asked for.
    node: (m,) int64, the child; siblings ascend by token id.
    token_ids: (m,) int64, the token that leads to it.
    offsets: (n + 1,) int64, the children of row i are the entries offsets[i] .. offsets[i + 1].
    """

    row: Int64
    node: Int64
    token_ids: Int64
    offsets: Int64


@dataclass(frozen=True, eq=False)
class Trie:
    """Immutable prefix tree over token-id sequences; made by `build_trie` or `open_trie`.

    Methods that take `nodes` take int64 arrays, keep their shape unless they say otherwise, and raise
    SearchError for a node that does not exist.

    level_start: (depth + 2,) int64, first node of every level, the root's included; ends with n_nodes.
    first_child: (nodes above the last level + 1,) int32 or int64.
    code: (n_nodes,) smallest unsigned type that fits, the token's position in its level's alphabet.
    alphabet: int32, sorted distinct token ids of level 1, then of level 2, ...
    alphabet_start: (depth + 1,) int64, where each level's alphabet begins.
    leaf_lo: (n_nodes,) first leaf below every node; None where all identifiers have one length, since the
        offsets then tell it.
    """

    level_start: Int64
    first_child: NDArray[np.integer]
    code: NDArray[np.unsignedinteger]
    alphabet: NDArray[np.int32]
    alphabet_start: Int64
    leaf_lo: NDArray[np.integer] | None = None

    @cached_property
    def n_nodes(self) -> int:
        """Number of nodes, the root included."""
        return int(self.level_start[-1])

    @cached_property
    def n_leaves(self) -> int:
        """Number of identifiers."""
        return int(self.leaf_range(np.zeros(1, np.int64))[1][0])

    @cached_property
    def depth(self) -> int:
        """Tokens in the longest identifier."""
        return len(self.level_start) - 2

    @cached_property
    def level_sizes(self) -> tuple[int, ...]:
        """Number of nodes that lie 1, 2, ..., depth tokens deep."""
        return tuple(int(size) for size in np.diff(self.level_start[1:]))

    @cached_property
    def _last_level(self) -> int:
        return int(self.level_start[-2])

    def children(self, nodes: Int64) -> Children:
        """All children of all nodes, in one gather.

            for row, node in enumerate(nodes):
                for token_id, child in sorted(children_of(node)): yield row, child, token_id

        Args:
            nodes: (n,) inner nodes; repeats are allowed.
        Raises:
            DeadEnd: one of the nodes is a leaf; a row without a next token would sample as NaN.
        """
        nodes = self._existing(nodes)
        if nodes.ndim != 1:
            raise SearchError(f"children() takes nodes of shape (n,), not {nodes.shape}.")
        ended = self._ends(nodes)
        if ended.any():
            at = int(ended.argmax())
            raise DeadEnd(
                f"node {nodes[at]} (row {at}) ends an identifier, no token can follow. "
                "Set rows aside when is_leaf() says that they are finished."
            )
        first = self.first_child[nodes].astype(np.int64)
        counts = self.first_child[nodes + 1] - first
        offsets = np.zeros(len(nodes) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        node = np.repeat(first - offsets[:-1], counts)
        node += np.arange(offsets[-1])
        alphabet_start = np.repeat(self.alphabet_start[self._level(nodes)], counts)
        row = np.repeat(np.arange(len(nodes)), counts)
        return Children(row, node, self._token_ids(node, alphabet_start), offsets)

    def is_leaf(self, nodes: Int64) -> NDArray[np.bool_]:
        """Whether an identifier ends at the node."""
        return self._ends(self._existing(nodes))

    def leaf_range(self, nodes: Int64) -> tuple[Int64, Int64]:
        """The leaves below each node, as (lo, hi): leaves lo .. hi - 1."""
        nodes = self._existing(nodes)
        lo = self._rank(self._descend(nodes, 0)) if self.leaf_lo is None else self._rank(nodes)
        return lo, self._rank(self._descend(nodes, 1)) + 1

    def leaf_rank(self, nodes: Int64) -> Int64:
        """The leaf number of each node, all of which must be leaves.

        Raises:
            SearchError: an identifier goes on after one of the nodes.
        """
        nodes = self._existing(nodes)
        inner = ~self._ends(nodes)
        if inner.any():
            raise SearchError(
                f"node {nodes[inner].flat[0]} is the beginning of several identifiers, it has no rank. "
                "Ask leaf_range() for the leaves below it."
            )
        return self._rank(nodes)

    def advance(self, nodes: ArrayLike, token_ids: ArrayLike) -> Int64:
        """The child that each node has for its token, or -1 where it has none (a leaf never has one).

            for node, token_id in zip(nodes, token_ids): yield dict(children_of(node)).get(token_id, -1)

        The two broadcast against each other. A binary search among the siblings: a wide root costs little more.
        """
        nodes, token_ids = np.broadcast_arrays(self._existing(nodes), token_ids)
        inner = ~self._ends(nodes)
        node, token_id = nodes[inner], token_ids[inner]
        alphabet_start = self.alphabet_start[self._level(node)]
        lo, hi = self.first_child[node].astype(np.int64), self.first_child[node + 1].astype(np.int64) - 1
        while (lo < hi).any():
            middle = (lo + hi + 1) // 2  # where lo >= hi already, this is lo, and lo stays
            fits = self._token_ids(middle, alphabet_start) <= token_id
            lo, hi = np.where(fits, middle, lo), np.where(fits, hi, middle - 1)
        child = np.full(nodes.shape, -1)
        child[inner] = np.where(self._token_ids(lo, alphabet_start) == token_id, lo, -1)
        return child

    def walk(self, token_ids: Sequence[int]) -> int:
        """The node that the tokens lead to from the root; the root itself for no tokens.

        Raises:
            IdentifierError: no identifier begins like this; names the first token that leads out, and its depth.
        """
        node = 0
        for depth, token_id in enumerate(token_ids):
            child = int(self.advance(node, token_id))
            if child < 0:
                ended = self.is_leaf(np.asarray(node))
                why = "the identifier ends before it" if ended else "no identifier continues with it"
                raise IdentifierError(f"token {token_id} at depth {depth} of {tuple(token_ids)}: {why}.")
            node = child
        return node

    def token_ids_of(self, leaf: int) -> tuple[int, ...]:
        """The identifier of a leaf number.

        Raises:
            SearchError: there is no such leaf.
        """
        if not 0 <= leaf < self.n_leaves:
            raise SearchError(f"there is no leaf {leaf}: the trie has {self.n_leaves}, numbered from 0.")
        node, token_ids = np.zeros(1, np.int64), []
        for _ in range(self.depth):
            if self._ends(node)[0]:
                break
            children = self.children(node)
            first_leaf, _ = self.leaf_range(children.node)
            child = int(np.searchsorted(first_leaf, leaf, side="right")) - 1
            token_ids.append(int(children.token_ids[child]))
            node = children.node[child : child + 1]
        return tuple(token_ids)

    def token_ids(self) -> Int64:
        """All distinct token ids of all identifiers, ascending."""
        return np.unique(self.alphabet).astype(np.int64)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that make up the trie, by field name, as `from_arrays` takes them."""
        return {name: array for name in _DTYPES if (array := getattr(self, name)) is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Trie:
        """A trie over the given arrays, not copied. Costs the same at any size: contents are not read.

        Raises:
            IndexDamaged: names, types or lengths do not fit together.
        """
        required = _DTYPES.keys() - {"leaf_lo"}
        if not required <= arrays.keys() <= _DTYPES.keys():
            raise IndexDamaged(f"a trie has the arrays {sorted(required)}, and may have 'leaf_lo': not {list(arrays)}.")
        for name, array in arrays.items():
            if array.ndim != 1 or array.dtype.str not in _DTYPES[name]:
                raise IndexDamaged(f"{name} is {array.dtype.str} {array.shape}: want (n,) of {_DTYPES[name]}.")
        trie = cls(**{name: _read_only(array) for name, array in arrays.items()})
        if complaint := _complaint(trie):
            raise IndexDamaged(f"the arrays of the trie do not fit together: {complaint}.")
        return trie

    def save(self, path: Path | str) -> None:
        """Write one file that `open_trie` maps. It appears whole or not at all, over an older one too."""
        path = Path(path)
        content = _serialise(self.arrays())
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _existing(self, nodes: ArrayLike) -> Int64:
        nodes = np.asarray(nodes)
        if nodes.size and (nodes.dtype.kind not in "iu" or nodes.min() < 0 or nodes.max() >= self.n_nodes):
            raise SearchError(f"nodes are integers in 0 .. {self.n_nodes - 1}, not {nodes}.")
        return nodes.astype(np.int64, copy=False)

    def _ends(self, nodes: Int64) -> NDArray[np.bool_]:
        on_last_level = np.asarray(nodes >= self._last_level)
        if self.leaf_lo is None:
            return on_last_level
        above = np.minimum(nodes, self._last_level - 1)
        return np.asarray(on_last_level | (self.first_child[above] == self.first_child[above + 1]))

    def _level(self, nodes: Int64) -> Int64:
        return np.asarray(np.searchsorted(self.level_start, nodes, side="right") - 1)

    def _token_ids(self, nodes: Int64, alphabet_start: Int64) -> Int64:
        return self.alphabet.take(self.code.take(nodes) + alphabet_start).astype(np.int64)

    def _descend(self, nodes: Int64, side: int) -> Int64:
        """The first (side 0) or the last (side 1) of the leaf nodes below each node."""
        for _ in range(self.depth):
            ended = self._ends(nodes)
            if ended.all():
                break
            above = np.minimum(nodes, self._last_level - 1) if ended.any() else nodes
            below = np.subtract(self.first_child.take(above + side), side, dtype=np.int64)
            nodes = np.where(ended, nodes, below) if ended.any() else below
        return nodes

    def _rank(self, nodes: Int64) -> Int64:
        return nodes - self._last_level if self.leaf_lo is None else self.leaf_lo[nodes].astype(np.int64)


def build_trie(identifiers: Sequence[Sequence[int]] | NDArray[np.integer]) -> tuple[Trie, Int64]:
    """Build the trie of n identifiers; fastest from sorted ones.

    Args:
        identifiers: n sequences of token ids in 0 .. 2^31 - 1, or one (n, L) integer array. Lengths may differ
            as long as no identifier is the beginning of another.
    Returns:
        The trie, and order: (n,) int64, the input row of every leaf.
    Raises:
        IdentifierError: there is no identifier, an empty one, or one with something that is no token id.
        IdentifierCollision: two are equal, or one is the beginning of another; names both.
    """
    columns, lengths = _columns(identifiers)
    order = np.arange(len(lengths))
    if not _is_sorted(columns):
        order = np.lexsort(columns[::-1])
        columns, lengths = columns[:, order], lengths[order]
    begins_node = np.zeros(len(lengths), np.bool_)
    begins_node[0] = True
    first_leaf = [np.zeros(1, np.int64)]
    first_child, codes, alphabets, level_start = [], [np.zeros(1, np.uint8)], [], [0, 1]
    for depth, column in enumerate(columns, 1):
        begins_node[1:] |= column[1:] != column[:-1]
        clash = np.flatnonzero(~begins_node[1:] & (lengths[:-1] == depth))
        if clash.size:
            raise _collision(columns, lengths, order, int(clash[0]))
        begins_child = begins_node & (column >= 0)
        first_leaf.append(np.flatnonzero(begins_child))
        children_before = np.cumsum(begins_child) - begins_child
        first_child.append(level_start[-1] + children_before[first_leaf[-2]])
        alphabet, code = _encode(column[first_leaf[-1]])
        alphabets.append(alphabet)
        codes.append(code)
        level_start.append(level_start[-1] + len(code))
    offset = _offset_dtype(level_start[-1])
    arrays: dict[str, NDArray[Any]] = {
        "level_start": np.array(level_start, np.int64),
        "first_child": np.concatenate([*first_child, [level_start[-1]]], dtype=offset, casting="same_kind"),
        "code": np.concatenate(codes),
        "alphabet": np.concatenate(alphabets),
        "alphabet_start": np.cumsum([0, *map(len, alphabets)], dtype=np.int64),
    }
    if lengths.min() != lengths.max():
        arrays["leaf_lo"] = np.concatenate(first_leaf, dtype=offset, casting="same_kind")
    return Trie.from_arrays(arrays), order


def _columns(identifiers: Sequence[Sequence[int]] | NDArray[np.integer]) -> tuple[NDArray[np.int32], Int64]:
    """(L, n) token ids, -1 after an identifier's end, and the (n,) lengths. -1 sorts before every token."""
    flat: NDArray[Any]
    if isinstance(identifiers, np.ndarray):
        if identifiers.ndim != 2:
            raise IdentifierError(f"an array of identifiers has the shape (n, L), not {identifiers.shape}.")
        lengths, flat = np.full(len(identifiers), identifiers.shape[1]), identifiers.reshape(-1)
    else:
        lengths = np.fromiter(map(len, identifiers), np.int64, len(identifiers))
        flat = np.array(list(chain.from_iterable(identifiers)))
    if not lengths.size:
        raise IdentifierError("there are no identifiers: a trie needs at least one.")
    if not lengths.all():
        raise IdentifierError(f"identifier {lengths.argmin()} is empty: give it at least one token.")
    if flat.dtype.kind not in "iu":
        raise IdentifierError(f"token ids are integers, these are {flat.dtype}: tokenize the identifiers first.")
    if flat.min() < 0 or flat.max() > _MAX_TOKEN_ID:
        at = int(np.argmax((flat < 0) | (flat > _MAX_TOKEN_ID)))
        row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        raise IdentifierError(f"identifier {row} has the token id {flat[at]}: want 0 .. {_MAX_TOKEN_ID}.")
    if lengths.min() == lengths.max():
        return np.ascontiguousarray(flat.reshape(len(lengths), -1).T, np.int32), lengths
    columns = np.full((lengths.max(), len(lengths)), -1, np.int32)
    depth = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    columns[depth, np.repeat(np.arange(len(lengths)), lengths)] = flat
    return columns, lengths


def _is_sorted(columns: NDArray[np.int32]) -> bool:
    undecided = np.ones(columns.shape[1] - 1, np.bool_)  # row i + 1 equals row i so far
    for column in columns:
        if (undecided & (column[1:] < column[:-1])).any():
            return False
        undecided &= column[1:] == column[:-1]
    return True


def _collision(columns: NDArray[np.int32], lengths: Int64, order: Int64, leaf: int) -> IdentifierCollision:
    first, second = (tuple(columns[: lengths[at], at].tolist()) for at in (leaf, leaf + 1))
    if first == second:
        return IdentifierCollision(
            f"identifiers {order[leaf]} and {order[leaf + 1]} are both {first}. Append a token to one of them."
        )
    return IdentifierCollision(
        f"identifier {order[leaf]}, {first}, is the beginning of identifier {order[leaf + 1]}, {second}: nothing "
        "would tell where the first one ends. Close every identifier with an end token, or give all one length."
    )


def _encode(token_ids: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.unsignedinteger]]:
    """The sorted distinct tokens, and every token's position among them."""
    alphabet = np.unique(token_ids)
    dtype = np.min_scalar_type(len(alphabet) - 1)
    low, span = int(alphabet[0]), int(alphabet[-1]) - int(alphabet[0]) + 1
    if span > 1 << 24:  # no vocabulary is that large, and a table over it would be
        return alphabet, np.searchsorted(alphabet, token_ids).astype(dtype)
    position = np.empty(span, dtype)  # ten times faster than the binary search
    position[alphabet - low] = np.arange(len(alphabet))
    return alphabet, position[token_ids - low]


def _offset_dtype(largest: int) -> type[np.int32] | type[np.int64]:
    return np.int32 if largest <= np.iinfo(np.int32).max else np.int64


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def _complaint(trie: Trie) -> str:
    """What contradicts itself in the lengths, and in the few entries on the level boundaries; '' if nothing."""
    level_start, alphabet_start = trie.level_start, trie.alphabet_start
    if len(level_start) < 3 or level_start[0] != 0 or level_start[1] != 1 or (np.diff(level_start) < 1).any():
        return f"level_start is {level_start}, not 0, 1, ... ascending"
    if len(trie.code) != trie.n_nodes or (trie.leaf_lo is not None and len(trie.leaf_lo) != trie.n_nodes):
        return f"code or leaf_lo do not have one entry for each of {trie.n_nodes} nodes"
    if len(trie.first_child) != trie._last_level + 1:
        return f"first_child has {len(trie.first_child)} entries for {trie._last_level} nodes"
    if (trie.first_child[level_start[:-1]] != level_start[1:]).any():
        return "first_child does not lead from each level to the next"
    if len(alphabet_start) != trie.depth + 1 or alphabet_start[0] != 0 or (np.diff(alphabet_start) < 1).any():
        return f"alphabet_start is {alphabet_start} for {trie.depth} levels"
    if alphabet_start[-1] != len(trie.alphabet):
        return f"alphabet has {len(trie.alphabet)} entries, alphabet_start says {alphabet_start[-1]}"
    return ""


def _serialise(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Magic, header length, JSON header padded with spaces, each array from a multiple of 64 bytes, SHA-256."""
    entries, payload = {}, bytearray()
    for name, array in arrays.items():
        entries[name] = (array.dtype.str, len(array), len(payload))
        payload += array.tobytes()
        payload += bytes(-len(payload) % _ALIGNMENT)
    header = json.dumps({"version": _VERSION, "payload_bytes": len(payload), "arrays": entries}).encode()
    header += b" " * (-(_PREAMBLE_BYTES + len(header)) % _ALIGNMENT)
    content = _MAGIC + len(header).to_bytes(8, "little") + header + payload
    return content + hashlib.sha256(content).digest()


def open_trie(path: Path | str) -> Trie:
    """Map the file that `Trie.save` wrote, read only: the cost is the same at any size.

    Contents are read as they are needed; `verify_trie` compares the checksum.
    Raises:
        IndexDamaged: the file is missing, no trie, cut short, or contradicts itself.
        IndexVersionError: another version of the format.
    """
    try:
        with Path(path).open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if content[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"it begins with {content[: len(_MAGIC)]!r}, not {_MAGIC!r}")
        start = _PREAMBLE_BYTES + int.from_bytes(content[len(_MAGIC) : _PREAMBLE_BYTES], "little")
        header = json.loads(content[_PREAMBLE_BYTES:start])
        if header["version"] != _VERSION:
            raise IndexVersionError(
                f"{path} has the trie format {header['version']!r}, this package reads {_VERSION}: "
                "install the version that wrote it, or build the index anew."
            )
        if len(content) != start + header["payload_bytes"] + _DIGEST_BYTES:
            raise ValueError(f"it has {len(content)} bytes, its header speaks of {header['payload_bytes']}")
        arrays = {}
        for name, (dtype, length, offset) in dict(header["arrays"]).items():
            if dtype not in _DTYPES.get(name, ()):
                raise ValueError(f"{name} of type {dtype}")
            arrays[name] = np.frombuffer(content, dtype, length, start + offset)
        return Trie.from_arrays(arrays)
    except (IndexDamaged, FileNotFoundError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise IndexDamaged(f"no usable trie file {path}: {error}. Restore it or build the index anew.") from error


def verify_trie(path: Path | str) -> None:
    """Read the whole file and compare its checksum.

    Raises:
        IndexDamaged, IndexVersionError: as `open_trie`, or a byte differs from what was written.
    """
    open_trie(path)
    content = Path(path).read_bytes()
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        raise IndexDamaged(f"the trie file {path} differs from its checksum. Restore it or build the index anew.")


@dataclass(frozen=True, eq=False)
class LeafFilter:
    """Which leaves are allowed: a bitmap in leaf order, with the number of allowed leaves before every word.

    n_leaves: size of the trie that it was made for.
    words: (n_leaves // 64 + 1,) uint64, the bit of leaf i is bit i % 64 of word i // 64.
    before: int64, of the same shape.
    """

    n_leaves: int
    words: NDArray[np.uint64]
    before: Int64

    @classmethod
    def from_mask(cls, mask: NDArray[np.bool_]) -> LeafFilter:
        """Pack a mask of shape (n_leaves,), in leaf order.

        Raises:
            FilterError: it is not a one-dimensional array of booleans.
        """
        if mask.ndim != 1 or mask.dtype != np.bool_:
            raise FilterError(f"a leaf mask is (n_leaves,) of bool, not {mask.shape} of {mask.dtype}.")
        packed = np.packbits(mask, bitorder="little")
        words = np.zeros(len(mask) // 64 + 1, "<u8")
        words.view(np.uint8)[: len(packed)] = packed
        before = np.zeros(len(words), np.int64)
        np.cumsum(_popcount(words[:-1]), out=before[1:])
        return cls(len(mask), _read_only(words), _read_only(before))

    @property
    def n_allowed(self) -> int:
        """Number of allowed leaves."""
        return int(self._allowed_before(np.array(self.n_leaves)))

    def count(self, lo: Int64, hi: Int64) -> Int64:
        """How many of the leaves lo .. hi - 1 are allowed, exactly, for arrays of ranges of one shape.

            for first, end in zip(lo, hi): yield sum(mask[first:end])

        Raises:
            FilterError: a range leaves 0 .. n_leaves: the filter was made for another trie.
        """
        lo, hi = np.asarray(lo), np.asarray(hi)
        if lo.size and (lo.min() < 0 or hi.max() > self.n_leaves or (hi < lo).any()):
            raise FilterError(
                f"leaves {lo.min()} .. {hi.max()} were asked of a filter over {self.n_leaves} leaves. "
                "Make the filter anew from the trie that is searched."
            )
        return self._allowed_before(hi) - self._allowed_before(lo)

    def _allowed_before(self, leaves: Int64) -> Int64:
        word = leaves >> 6
        earlier = self.words.take(word) & _EARLIER_BITS.take(leaves & 63)
        return np.asarray(self.before.take(word) + _popcount(earlier))


def _popcount_by_table(words: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """`np.bitwise_count` for NumPy 1."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
    by_byte = ones[np.ascontiguousarray(words).reshape(-1, 1).view(np.uint8)]
    return np.asarray(by_byte.sum(axis=1, dtype=np.uint8).reshape(np.shape(words)))


_popcount = np.bitwise_count if hasattr(np, "bitwise_count") else _popcount_by_table
