"""What was learnt of an index, stored in place of what was learnt before: trained weights, and what was tuned of them.

Knows the index and files; nothing of models.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_index_genret.errors import StoreError
from llama_index_genret.store.folder import commit
from llama_index_genret.store.index import ADAPTER, PRIOR, Index, load_index
from llama_index_genret.store.scoring import Tuned


def store_adapter(index: Index, source: Path, training: Mapping[str, Any]) -> Index:
    """Store trained weights (the files of `source`) in place of earlier ones, whose prior and tuning are dropped."""

    def write(into: Path) -> None:
        shutil.copytree(source, into / ADAPTER.rstrip("/"))

    manifest = index.manifest.model_copy(update={"training": dict(training), "tuned": None})
    commit(index.folder, manifest, write, keep=lambda name: not name.startswith(ADAPTER) and name != PRIOR)
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
