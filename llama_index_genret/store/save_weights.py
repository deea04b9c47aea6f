"""What was learnt of an index, stored in place of what was learnt before: trained weights, and what was tuned of them.

Images may be added or removed while a training runs: weights are stored on top of the index as it is by then.
All raise IndexBusy and NotWritten where the index cannot be written now; it is as it was then.

Knows the index and files; nothing of models.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import IndexChanged, NotTrained, StoreError
from llama_index_genret.store.index import PRIOR, Index
from llama_index_genret.store.manifest import Manifest, commit, only_writer_of, read_manifest
from llama_index_genret.store.model_state import has_update
from llama_index_genret.store.open import load_index
from llama_index_genret.store.scoring import TunedScoring
from llama_index_genret.store.weights import ADAPTER, MODEL, NEW_ROWS, UPDATE, write_images


def store_adapter(index: Index, source: Path, training: Mapping[str, Any]) -> Index:
    """Store trained weights (the files of `source`) in place of earlier ones, updates and new rows included.

    The prior and the tuning of earlier weights are dropped.

    Args:
        index: as it was trained.
    Raises:
        IndexChanged: images with symbols of their own joined meanwhile, for which the weights have no rows.
    """

    def check(now: Manifest) -> None:
        if now.tokenizer != index.manifest.tokenizer:
            raise IndexChanged(
                f"{index.folder} got images with symbols of their own while it was trained, which the weights lack. "
                f"Nothing was stored: run `genret train {index.folder}` again."
            )

    fields = {"training": dict(training), "update": None}
    return _store(index, fields, (ADAPTER, UPDATE, NEW_ROWS), {ADAPTER: source}, check)


def store_update(index: Index, source: Path, training: Mapping[str, Any]) -> Index:
    """Store an adapter on top of the trained weights, in place of an earlier update; prior and tuning are dropped.

    Args:
        index: as it was trained.
    Raises:
        IndexChanged: the weights below it were trained again meanwhile.
    """

    def check(now: Manifest) -> None:
        below = f"{ADAPTER}{MODEL}"
        if now.files.get(below) != index.manifest.files.get(below):
            raise IndexChanged(
                f"{index.folder} was trained again while an update of its earlier weights was made. Nothing was "
                f"stored: run `genret train {index.folder} --update` again."
            )

    return _store(index, {"update": dict(training)}, (UPDATE,), {UPDATE: source}, check)


def drop_update(index: Index) -> Index:
    """The index with the weights that it had before its update, to the byte; prior and tuning are dropped.

    Raises:
        NotTrained: it has no update.
    """
    if not has_update(index):
        raise NotTrained(f"{index.folder} has no update to drop: its weights are those of `genret train`.")
    return _store(index, {"update": None}, (UPDATE,), {})


def _store(
    index: Index,
    fields: Mapping[str, Any],
    replaced: tuple[str, ...],
    sources: Mapping[str, Path],
    check: Callable[[Manifest], None] = lambda now: None,
) -> Index:
    """Other weights: `replaced` are prefixes of logical names, `sources` the folders that take their place.

    Args:
        check: raises where they do not go with the index as it is now.
    """

    def write(into: Path) -> None:
        for prefix, source in sources.items():
            shutil.copytree(source, into / prefix.rstrip("/"))
            write_images(into / prefix.rstrip("/"), index.records, index.identifiers)

    with only_writer_of(index.folder):
        now = read_manifest(index.folder)
        check(now)
        manifest = now.model_copy(update={**fields, "tuned": None})
        commit(index.folder, manifest, write, keep=lambda name: not name.startswith((*replaced, PRIOR)))
    return load_index(index.folder)


def store_tuning(index: Index, log_prior: NDArray[np.float32], tuned: TunedScoring) -> Index:
    """Store the prior of every record, and how hits are ranked from now on, in place of earlier ones.

    Args:
        log_prior: (records,) natural logarithms, finite; NaN of an image without one.
    Raises:
        IndexChanged: the index was trained or edited meanwhile: the prior is of what it was.
    """
    if log_prior.shape != (len(index.records),) or np.isinf(log_prior).any():
        raise StoreError(f"a prior is ({len(index.records)},) of finite numbers or NaN, not {log_prior!r}.")
    manifest = index.manifest.model_copy(update={"tuned": tuned})
    with only_writer_of(index.folder):
        if read_manifest(index.folder) != index.manifest:
            raise IndexChanged(
                f"{index.folder} was changed while it was tuned. Nothing was stored: run `genret tune` again."
            )
        commit(
            index.folder,
            manifest,
            lambda into: np.save(into / PRIOR, log_prior.astype(np.float32)),
            keep=lambda name: name != PRIOR,
        )
    return load_index(index.folder)
