"""The indexes that a server has loaded, each in its newest version on disk.

A version is immutable: a search keeps the version that it started with.

Depends on index folders; independent of HTTP and engines.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path

from llama_index_genret.errors import (
    EncoderError,
    EncoderUnavailable,
    GenretError,
    IndexNotFound,
    MissingExtra,
    ModelMismatch,
)
from llama_index_genret.models.encoder import Encoder
from llama_index_genret.scorers.blend import Blender
from llama_index_genret.store import Index, RecordFilters, load_index
from llama_index_genret.store.manifest import MANIFEST
from llama_index_genret.store.vectors import EncoderEntry, open_encoder
from llama_index_genret.trie import LeafFilter

log = logging.getLogger(__name__)

CACHED_FILTERS = 64
"""Number of cached filters per index. Each takes a quarter of a byte per image."""


class LoadedIndex:
    """One version of an index, its name on this server, and its encoder. Leaf bitmaps of recent filters are cached."""

    def __init__(self, name: str, index: Index, encoder: Encoder | None = None) -> None:
        self.name, self.index, self.encoder = name, index, encoder
        self.blender = Blender(index, encoder)
        # a bound method would form a reference cycle and keep an old version's mapped files until garbage collection
        self._leaves = lru_cache(maxsize=CACHED_FILTERS)(partial(_leaf_filter, index))

    @property
    def version(self) -> str:
        """Return the version of the index; see `Index.version`."""
        return self.index.version

    def leaf_filter(self, filters: RecordFilters | None) -> LeafFilter | None:
        """Return the cached bitmap of the leaves that pass, or None without filters; see `Index.leaf_filter`."""
        return None if filters is None else self._leaves(filters.model_dump_json())


class Registry:
    """The indexes of `folders`, which reload when their manifest changes: `genret add` and `remove` need no restart.

    If a newer version cannot be served because it is damaged or has other weights, the older one stays. Each encoder is
    loaded once, for all indexes and versions that have it. If it does not load, `problems` has the reason, and the
    trained model recalls alone until the server restarts.

    Args:
        encoder: another place of the encoder, default the place in the index.
        device: torch device of the encoder.
    Raises:
        GenretError: an index cannot be served, or has neither trained weights nor an encoder that loads.
    """

    def __init__(self, folders: Mapping[str, Path], *, encoder: str | None = None, device: str = "cpu") -> None:
        self._folders = dict(folders)
        self._place, self._device = encoder, device
        self._encoders: dict[EncoderEntry, Encoder | None] = {}
        self._failures: dict[EncoderEntry, str] = {}
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._loaded: dict[str, LoadedIndex] = {}
        self._readings: dict[str, asyncio.Future[LoadedIndex]] = {}
        self.problems: dict[str, str] = dict.fromkeys(self._folders, "")
        for name in self._folders:
            self._load(name)

    @property
    def loaded(self) -> list[LoadedIndex]:
        """Return all indexes in their served versions."""
        return [self._loaded[name] for name in self._folders]

    def is_current(self, name: str) -> bool:
        """Tell whether the manifest on disk is unchanged since the last load. Costs one `stat`."""
        return self._seen.get(name) == _stamp(self._folders[name])

    def name_of(self, wanted: str | None) -> str:
        """Return the name of the requested index. None stands for the only index.

        Raises:
            IndexNotFound: the name is unknown, or it is missing and there are several indexes.
        """
        names = list(self._folders)
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted is None or wanted not in self._folders:
            raise IndexNotFound(f"unknown index {wanted!r}; set 'index' to one of {names}.")
        return wanted

    async def current(self, name: str) -> LoadedIndex:
        """Return a version that is at least as new as this call. One thread reads the folder for all waiting callers.

        A read that started before this call may miss the newest edit. The call then waits for the next read as well.
        """
        for _ in range(2):
            if self.is_current(name):
                break
            reading = self._readings.get(name)
            if reading is None or reading.done():
                reading = self._readings[name] = asyncio.ensure_future(asyncio.to_thread(self.get, name))
            await asyncio.shield(reading)  # a cancelled caller must not cancel it for the others
        return self._loaded[name]

    def get(self, name: str) -> LoadedIndex:
        """Return the newest version that can be served. The folder is read again if it has changed."""
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
            log.warning("the index %s is still served in version %s: %s", name, self._loaded[name].version, error)

    def _load(self, name: str) -> None:
        folder = self._folders[name]
        stamp = _stamp(folder)
        try:
            self._loaded[name] = loaded = self._read(name, folder)
            self.problems[name] = self._problem(loaded)
        finally:
            self._seen[name] = stamp  # set last, so that concurrent callers wait for the newer version

    def _read(self, name: str, folder: Path) -> LoadedIndex:
        index = load_index(folder)
        served = self._loaded.get(name)
        if served and index.weights_id != served.index.weights_id:
            raise ModelMismatch(
                f"{folder} now has other weights ({index.weights_id}, served {served.index.weights_id}): it was "
                "trained, or got images with symbols of their own. Restart `genret serve` on it."
            )
        loaded = LoadedIndex(name, index, self._encoder(index))
        loaded.leaf_filter(RecordFilters(filters=[]))  # fills the cached metadata columns in the loading thread
        _ = index.prior  # fills the cached prior in the loading thread
        return loaded

    def _encoder(self, index: Index) -> Encoder | None:
        """Return the encoder of an index, or None if it has none or the encoder does not load.

        Raises:
            EncoderUnavailable: it does not load, and the index has no trained weights to recall with.
        """
        entry = index.manifest.encoder
        if entry is None:
            return None
        if entry not in self._encoders:
            self._encoders[entry] = self._open(entry)
        if self._encoders[entry] is None and not index.is_trained:
            raise EncoderUnavailable(f"{index.folder} is not trained, so it needs its encoder. {self._failures[entry]}")
        return self._encoders[entry]

    def _open(self, entry: EncoderEntry) -> Encoder | None:
        try:
            return open_encoder(entry, name=self._place, device=self._device)
        except (EncoderError, MissingExtra) as error:
            self._failures[entry] = f"The encoder {entry.name!r} is not loaded: {error}"
            log.warning("%s Indexes that need it are recalled by their trained model alone.", self._failures[entry])
            return None

    def _problem(self, loaded: LoadedIndex) -> str:
        entry = loaded.index.manifest.encoder
        return self._failures.get(entry, "") if entry else ""


def _leaf_filter(index: Index, filters: str) -> LeafFilter:
    return index.leaf_filter(RecordFilters.model_validate_json(filters))


def _stamp(folder: Path) -> tuple[int, int, int]:
    try:
        status = (folder / MANIFEST).stat()
    except FileNotFoundError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns
