"""What was learnt of an index, stored in place of what was learnt before: trained weights, and what was tuned of them.

Images may be added or removed while a training runs: weights are stored on top of the index as it is by then.

Knows the index and files; nothing of models.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import NotTrained, StoreError
from llama_index_genret.store.folder import commit
from llama_index_genret.store.index import PRIOR, Index, load_index
from llama_index_genret.store.scoring import Tuned
from llama_index_genret.store.weights import ADAPTER, MODEL, NEW_ROWS, UPDATE, write_images


def store_adapter(index: Index, source: Path, training: Mapping[str, Any]) -> Index:
    """Store trained weights (the files of `source`) in place of earlier ones, updates and new rows included.

    The prior and the tuning of earlier weights are dropped.

    Args:
        index: as it was trained.
    Raises:
        StoreError: images with symbols of their own joined meanwhile, for which the weights have no rows.
    """
    if load_index(index.folder).manifest.tokenizer != index.manifest.tokenizer:
        raise StoreError(
            f"{index.folder} got images with symbols of their own while it was trained, which the weights lack. "
            f"Nothing was stored: run `genret train {index.folder}` again."
        )
    fields = {"training": dict(training), "update": None}
    return _store(index, fields, (ADAPTER, UPDATE, NEW_ROWS), {ADAPTER: source})


def store_update(index: Index, source: Path, training: Mapping[str, Any]) -> Index:
    """Store an adapter on top of the trained weights, in place of an earlier update; prior and tuning are dropped.

    Args:
        index: as it was trained.
    Raises:
        StoreError: the weights below it were trained again meanwhile.
    """
    below = f"{ADAPTER}{MODEL}"
    if load_index(index.folder).manifest.files.get(below) != index.manifest.files.get(below):
        raise StoreError(
            f"{index.folder} was trained again while an update of its earlier weights was made. Nothing was stored: "
            f"run `genret train {index.folder} --update` again."
        )
    return _store(index, {"update": dict(training)}, (UPDATE,), {UPDATE: source})


def drop_update(index: Index) -> Index:
    """The index with the weights that it had before its update, to the byte; prior and tuning are dropped.

    Raises:
        NotTrained: it has no update.
    """
    if not index.has_update:
        raise NotTrained(f"{index.folder} has no update to drop: its weights are those of `genret train`.")
    return _store(index, {"update": None}, (UPDATE,), {})


def _store(index: Index, fields: Mapping[str, Any], replaced: tuple[str, ...], sources: Mapping[str, Path]) -> Index:
    """Other weights: `replaced` are prefixes of logical names, `sources` the folders that take their place."""

    def write(into: Path) -> None:
        for prefix, source in sources.items():
            shutil.copytree(source, into / prefix.rstrip("/"))
            write_images(into / prefix.rstrip("/"), index.records, index.identifiers)

    manifest = load_index(index.folder).manifest.model_copy(update={**fields, "tuned": None})
    commit(index.folder, manifest, write, keep=lambda name: not name.startswith((*replaced, PRIOR)))
    return load_index(index.folder)


def store_tuned(index: Index, log_prior: NDArray[np.float32], tuned: Tuned) -> Index:
    """Store the prior of every record, and how hits are ranked from now on, in place of earlier ones.

    Args:
        log_prior: (records,) natural logarithms, finite; NaN of an image without one.
    Raises:
        StoreError: the index was trained or edited meanwhile: the prior is of what it was.
    """
    if load_index(index.folder).version != index.version:
        raise StoreError(f"{index.folder} was changed while it was tuned. Nothing was stored: run `genret tune` again.")
    if log_prior.shape != (len(index.records),) or np.isinf(log_prior).any():
        raise StoreError(f"a prior is ({len(index.records)},) of finite numbers or NaN, not {log_prior!r}.")
    manifest = index.manifest.model_copy(update={"tuned": tuned})
    commit(
        index.folder,
        manifest,
        lambda into: np.save(into / PRIOR, log_prior.astype(np.float32)),
        keep=lambda name: name != PRIOR,
    )
    return load_index(index.folder)
