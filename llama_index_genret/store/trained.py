"""Storing what was learnt: weights, and what was tuned of them. One write, whole or not at all, on top of the index as
it is by then.

Images may have been added or removed while it ran: they stay so.

Knows the index; nothing of torch or PEFT.
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
    """Store trained weights (the files of `source`) in place of any earlier ones, updates and new rows included.

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
    """Store an adapter on top of the trained weights, in place of an earlier update.

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
    """The index with the weights that it had before its update, to the byte.

    Raises:
        NotTrained: it has no update.
    """
    if not index.has_update:
        raise NotTrained(f"{index.folder} has no update to drop: its weights are those of `genret train`.")
    return _store(index, {"update": None}, (UPDATE,), {})


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


def _store(index: Index, fields: Mapping[str, Any], replaced: tuple[str, ...], sources: Mapping[str, Path]) -> Index:
    def write(into: Path) -> None:
        for prefix, source in sources.items():
            shutil.copytree(source, into / prefix.rstrip("/"))
            write_images(into / prefix.rstrip("/"), index.records, index.identifiers)

    now = load_index(index.folder)
    commit(
        index.folder,
        now.manifest.model_copy(update={**fields, "tuned": None}),
        write,
        keep=lambda name: not name.startswith((*replaced, PRIOR)),
    )
    return load_index(index.folder)
