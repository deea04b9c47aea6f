"""Saves a trie to one file and memory-maps it: a header, arrays aligned to 64 bytes, a checksum.

Depends on files and arrays; independent of the queries that a trie answers.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import IndexDamaged, IndexVersionError
from llama_index_genret.files import write_file
from llama_index_genret.trie.flat import DTYPES, Trie

_MAGIC, _VERSION, _ALIGNMENT = b"genrTRIE", 2, 64
_PREAMBLE_BYTES, _DIGEST_BYTES = 16, 32


def save_trie(trie: Trie, path: Path | str) -> None:
    """Write one file that `open_trie` maps. The write is atomic and replaces an older file."""
    write_file(Path(path), _serialise(trie.arrays()))


def _serialise(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return the bytes of the file.

    The order is: magic, header length, JSON header padded with spaces, arrays, SHA-256 of all before it. Each array
    starts at a multiple of 64 bytes.
    """
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
    """Map the file that `save_trie` wrote, read-only. The cost does not depend on its size.

    Pages are read on first access. `verify_trie` compares the checksum.
    Raises:
        IndexDamaged: the file is missing, is no trie, has the wrong length, or has inconsistent arrays.
        IndexVersionError: the file has another version of the format.
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
                "install the version that wrote it, or rebuild the index."
            )
        if len(content) != start + header["payload_bytes"] + _DIGEST_BYTES:
            raise ValueError(f"it has {len(content)} bytes, its header declares a payload of {header['payload_bytes']}")
        arrays = {}
        for name, (dtype, length, offset) in dict(header["arrays"]).items():
            if dtype not in DTYPES.get(name, ()):
                raise ValueError(f"{name} of type {dtype}, expected one of {DTYPES.get(name, ())}")
            arrays[name] = np.frombuffer(content, dtype, length, start + offset)
        return Trie.from_arrays(arrays)
    except (IndexDamaged, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise IndexDamaged(f"no usable trie file {path}: {error}. Restore it or rebuild the index.") from error


def verify_trie(path: Path | str) -> None:
    """Read the whole file and compare its checksum.

    Raises:
        IndexDamaged: as in `open_trie`, or the content differs from its checksum.
        IndexVersionError: as in `open_trie`.
    """
    open_trie(path)
    content = Path(path).read_bytes()
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        raise IndexDamaged(f"the trie file {path} differs from its checksum. Restore it or rebuild the index.")
