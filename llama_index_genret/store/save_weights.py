"""Store trained weights and tuned scoring in an index, in place of earlier ones.

Images may be added or removed while a training runs: weights are stored on top of the current version of the index.
All functions raise IndexBusy and NotWritten if the index cannot be written. The index is then unchanged.

Depends on the index and files; independent of models.
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
        index: the version that was trained.
        source: folder of the adapter's files.
        training: options and history of the training.
    Raises:
        IndexChanged: images with new symbols were added meanwhile, for which the weights have no rows.
    """

    def check(now: Manifest) -> None:
        if now.tokenizer != index.manifest.tokenizer:
            raise IndexChanged(
                f"{index.folder} got images with symbols of their own while it was trained. The weights lack them. "
                f"Nothing was stored: run `genret train {index.folder}` again."
            )

    fields = {"training": dict(training), "update": None}
    return _store(index, fields, (ADAPTER, UPDATE, NEW_ROWS), {ADAPTER: source}, check)


def store_update(index: Index, source: Path, training: Mapping[str, Any]) -> Index:
    """Store an adapter on top of the trained weights, in place of an earlier update. Prior and tuning are dropped.

    Args:
        index: the version that was trained.
        source: folder of the adapter's files.
        training: options and history of the update.
    Raises:
        IndexChanged: the weights below the update were trained again meanwhile.
    """

    def check(now: Manifest) -> None:
        below = f"{ADAPTER}{MODEL}"
        if now.files.get(below) != index.manifest.files.get(below):
            raise IndexChanged(
                f"{index.folder} was trained again while an update of its earlier weights was trained. Nothing was "
                f"stored: run `genret train {index.folder} --update` again."
            )

    return _store(index, {"update": dict(training)}, (UPDATE,), {UPDATE: source}, check)


def drop_update(index: Index) -> Index:
    """Restore the exact weights from before the update. Prior and tuning are dropped.

    Raises:
        NotTrained: the index has no update.
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
    """Store other weights in one commit.

    Args:
        fields: manifest fields to set.
        replaced: prefixes of the logical names of files to drop.
        sources: folders of new files, keyed by their prefix.
        check: raises IndexChanged if the weights do not fit the current manifest.
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
    """Store the prior of every record and the default scoring of hits, in place of earlier ones.

    Args:
        log_prior: (records,) natural logarithms, finite; NaN for an image without a prior.
        tuned: the default scoring.
    Raises:
        IndexChanged: the index was trained or edited meanwhile, so that the prior is outdated.
        StoreError: `log_prior` has another shape or an infinite value.
    """
    if log_prior.shape != (len(index.records),) or np.isinf(log_prior).any():
        raise StoreError(
            f"log_prior must be finite numbers or NaN of shape ({len(index.records)},), got {log_prior!r}."
        )
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
