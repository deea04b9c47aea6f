"""The indexes that a server has loaded, each in its newest version on disk.

Knows index folders; nothing of HTTP or engines. A version is immutable: a search keeps the one that it began with.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path

from llama_index_genret.errors import GenretError, IndexNotFound, ModelMismatch
from llama_index_genret.store import Index, RecordFilters, load_index
from llama_index_genret.store.manifest import MANIFEST
from llama_index_genret.trie import LeafFilter

log = logging.getLogger(__name__)

CACHED_FILTERS = 64
"""For each index; a quarter of a byte for each image and filter."""


class LoadedIndex:
    """One version of an index, under its name on this server. The leaves of the filters asked last are kept."""

    def __init__(self, name: str, index: Index) -> None:
        self.name, self.index = name, index
        # no bound method: an older version and its mapped files go with its last search, not when garbage is collected
        self._leaves = lru_cache(maxsize=CACHED_FILTERS)(partial(_leaf_filter, index))

    @property
    def version(self) -> str:
        """See `Index.version`."""
        return self.index.version

    def leaf_filter(self, filters: RecordFilters | None) -> LeafFilter | None:
        """See `Index.leaf_filter`."""
        return None if filters is None else self._leaves(filters.model_dump_json())


class Registry:
    """Loads `folders`, and again whenever a manifest was replaced: `genret add` and `remove` need no restart.

    A newer version that cannot be served (damaged, or of other weights) leaves the older one in its place.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = dict(folders)
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._loaded: dict[str, LoadedIndex] = {}
        self._readings: dict[str, asyncio.Future[LoadedIndex]] = {}
        self.problems: dict[str, str] = dict.fromkeys(self._folders, "")
        for name in self._folders:
            self._load(name)

    @property
    def loaded(self) -> list[LoadedIndex]:
        """All indexes, as they are served now."""
        return [self._loaded[name] for name in self._folders]

    def is_current(self, name: str) -> bool:
        """Whether the manifest on disk is the one that was looked at last. Costs one `stat`."""
        return self._seen.get(name) == _stamp(self._folders[name])

    def name_of(self, wanted: str | None) -> str:
        """The name of the index that a request means.

        Raises:
            IndexNotFound: there is none of that name, or several and none was named.
        """
        names = list(self._folders)
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted is None or wanted not in self._folders:
            raise IndexNotFound(f"there is no index {wanted!r} on this server: name one of {names} as 'index'.")
        return wanted

    async def current(self, name: str) -> LoadedIndex:
        """A version that is no older than this call. The folder is read in a thread, once for all who wait for it.

        A reading that was begun before this call may miss its edit, so it is waited for, and the next one too.
        """
        for _ in range(2):
            if self.is_current(name):
                break
            reading = self._readings.get(name)
            if reading is None or reading.done():
                reading = self._readings[name] = asyncio.ensure_future(asyncio.to_thread(self.get, name))
            await asyncio.shield(reading)  # who leaves does not end it for the others
        return self._loaded[name]

    def get(self, name: str) -> LoadedIndex:
        """The newest version that can be served; reads the folder where it has changed."""
        if not self.is_current(name):
            with self._lock:
                if not self.is_current(name):
                    self._reload(name)
        return self._loaded[name]

    def _reload(self, name: str) -> None:
        try:
            self._load(name)
        except (GenretError, OSError) as error:
            self.problems[name] = str(error)
            log.warning("the index %s stays at version %s: %s", name, self._loaded[name].version, error)

    def _load(self, name: str) -> None:
        folder = self._folders[name]
        stamp = _stamp(folder)
        try:
            self._loaded[name], self.problems[name] = self._read(name, folder), ""
        finally:
            self._seen[name] = stamp  # only now: who asks meanwhile waits for the newer version

    def _read(self, name: str, folder: Path) -> LoadedIndex:
        index = load_index(folder)
        served = self._loaded.get(name)
        if served and index.weights_id != served.index.weights_id:
            raise ModelMismatch(
                f"{folder} has other weights now ({index.weights_id}, served {served.index.weights_id}): it was "
                "trained, or got images with symbols of their own. Restart `genret serve` on it."
            )
        loaded = LoadedIndex(name, index)
        loaded.leaf_filter(RecordFilters(filters=[]))  # reads the metadata now, in the thread that loads
        _ = index.prior  # the same of the prior of every node
        return loaded


def _leaf_filter(index: Index, filters: str) -> LeafFilter:
    return index.leaf_filter(RecordFilters.model_validate_json(filters))


def _stamp(folder: Path) -> tuple[int, int, int]:
    try:
        status = (folder / MANIFEST).stat()
    except FileNotFoundError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns
