"""Builds the flat trie: sorts the identifiers, marks where each level's prefixes begin, derives the arrays.

Depends on token ids and arrays; independent of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import IdentifierCollision, IdentifierError
from llama_index_genret.trie.flat import Int64, Trie

_MAX_TOKEN_ID = np.iinfo(np.int32).max


def build_trie(identifiers: Sequence[Sequence[int]] | NDArray[np.integer]) -> tuple[Trie, Int64]:
    """Build the trie of n identifiers. Sorted input is fastest.

    Args:
        identifiers: n sequences of token ids in 0 .. 2^31 - 1, or one (n, L) integer array. Lengths may differ
            as long as no identifier is a prefix of another.
    Returns:
        (trie, order). order: (n,) int64, the input row of every leaf.
    Raises:
        IdentifierError: there is no identifier, or one is empty, or one holds a value that is no token id.
        IdentifierCollision: two identifiers are equal, or one is a prefix of another. The message shows both.
    """
    return _build(*_columns(identifiers))


def build_trie_of_paths(paths: NDArray[np.int32]) -> tuple[Trie, Int64]:
    """Build the trie from paths in the format of `Trie.paths`.

    Args:
        paths: (n, L) int32, -1 after the end of a short identifier.
    """
    return _build(np.ascontiguousarray(paths.T), (paths >= 0).sum(axis=1))


def _build(columns: NDArray[np.int32], lengths: Int64) -> tuple[Trie, Int64]:
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
        children_so_far = np.cumsum(begins_child, dtype=_offset_dtype(len(begins_child)))
        children_before = children_so_far[first_leaf[-2]] - begins_child[first_leaf[-2]]
        first_child.append(level_start[-1] + children_before)
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
    kept = first_leaf if lengths.min() != lengths.max() else first_leaf[:-2]
    arrays["leaf_lo"] = np.concatenate([*kept, []], dtype=offset, casting="unsafe")
    return Trie.from_arrays(arrays), order


def _columns(identifiers: Sequence[Sequence[int]] | NDArray[np.integer]) -> tuple[NDArray[np.int32], Int64]:
    """Return (L, n) token ids, -1 after an identifier's end, and the (n,) lengths. -1 sorts before every token."""
    flat: NDArray[Any]
    if isinstance(identifiers, np.ndarray):
        if identifiers.ndim != 2:
            raise IdentifierError(f"an array of identifiers must have the shape (n, L), not {identifiers.shape}.")
        lengths, flat = np.full(len(identifiers), identifiers.shape[1]), identifiers.reshape(-1)
    else:
        lengths = np.fromiter(map(len, identifiers), np.int64, len(identifiers))
        flat = np.array(list(chain.from_iterable(identifiers)))
    if not lengths.size:
        raise IdentifierError("there are no identifiers: a trie needs at least one.")
    if not lengths.all():
        raise IdentifierError(f"identifier {lengths.argmin()} is empty: it needs at least one token.")
    if flat.dtype.kind not in "iu":
        raise IdentifierError(f"token ids must be integers, not {flat.dtype}: tokenize the identifiers first.")
    if flat.min() < 0 or flat.max() > _MAX_TOKEN_ID:
        at = int(np.argmax((flat < 0) | (flat > _MAX_TOKEN_ID)))
        row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        raise IdentifierError(f"identifier {row} has the token id {flat[at]}: expected 0 .. {_MAX_TOKEN_ID}.")
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
        f"identifier {order[leaf]}, {first}, is a prefix of identifier {order[leaf + 1]}, {second}: "
        "a search could not tell where the first one ends. Close every identifier with an end token, "
        "or give all identifiers the same length."
    )


def _encode(token_ids: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.unsignedinteger]]:
    """Return the sorted distinct tokens, and every token's position among them."""
    low, span = int(token_ids.min()), int(token_ids.max()) - int(token_ids.min()) + 1
    if span > 1 << 24:  # larger than any vocabulary: a lookup table of this span would be too large
        tokens = np.unique(token_ids)
        return tokens, np.searchsorted(tokens, token_ids).astype(np.min_scalar_type(len(tokens) - 1))
    place = np.subtract(token_ids, low, dtype=np.int64)
    alphabet = np.flatnonzero(np.bincount(place, minlength=span))  # a lookup table is faster than a sort
    position = np.zeros(span, np.min_scalar_type(len(alphabet) - 1))
    position[alphabet] = np.arange(len(alphabet))
    return (alphabet + low).astype(np.int32), position.take(place)


def _offset_dtype(largest: int) -> type[np.int32] | type[np.int64]:
    return np.int32 if largest <= np.iinfo(np.int32).max else np.int64
