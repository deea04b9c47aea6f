"""Files of trained weights in an index, and the id of the weights that result from them.

    adapter/                adapter of `genret train`, with the list of images it was trained on
    update/                 adapter of `genret train --update` on top of it, with its list of images; at most one
    new_rows.safetensors    rows of symbols that were added after `genret train`

The weights are the base model's with the new rows set, then the adapter and the update merged in. Trained rows thus
replace predicted ones.

Depends on files; independent of torch, PEFT and a loaded index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llama_index_genret.corpus import Record
from llama_index_genret.identifiers import Identifier
from llama_index_genret.store.array_files import read_safetensors
from llama_index_genret.store.manifest import FileEntry

ADAPTER, UPDATE = "adapter/", "update/"
"""Prefixes of the logical names of an adapter's files."""

MODEL = "adapter_model.safetensors"
IMAGES = "images.json"
NEW_ROWS = "new_rows.safetensors"
_VECTORS, _CAPTIONS, _TEACHER = "vectors/", "captions/", "teacher"
_ROWS = "rows"


@dataclass(frozen=True)
class NewRows:
    """Rows of symbols that were added after the training, and the regressions that predict rows of further symbols.

    token_ids: (m,) int64, the symbols.
    rows: (m, d) float32, keyed by module name (embeddings or LM head).
    regressions: arrays of a `RowRegression` on image features, keyed by module name. They are stored because fitting
        needs the features of many images. Empty if no row was predicted from an image.
    of_vectors: arrays of a `RowRegression` on vectors of the index's encoder, keyed by module name; empty without any.
    """

    token_ids: NDArray[np.int64]
    rows: Mapping[str, NDArray[np.float32]]
    regressions: Mapping[str, Mapping[str, NDArray[np.float32]]]
    of_vectors: Mapping[str, Mapping[str, NDArray[np.float32]]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the rows and regressions as safetensors."""
        arrays: dict[str, NDArray[Any]] = {"token_ids": self.token_ids}
        for module, rows in self.rows.items():
            arrays[f"{module}/{_ROWS}"] = rows
            arrays |= {f"{module}/{name}": array for name, array in self.regressions.get(module, {}).items()}
            arrays |= {f"{module}/{_VECTORS}{name}": array for name, array in self.of_vectors.get(module, {}).items()}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)

    @classmethod
    def load(cls, path: Path) -> NewRows:
        """Read a file that `save` wrote."""
        arrays = read_safetensors(path)
        token_ids = arrays.pop("token_ids")
        arrays.pop(_TEACHER, None)  # before format 5, as are regressions from captions
        rows: dict[str, NDArray[Any]] = {}
        of_images: dict[str, dict[str, NDArray[Any]]] = {}
        of_vectors: dict[str, dict[str, NDArray[Any]]] = {}
        for key, array in arrays.items():
            module, _, name = key.partition("/")
            if name == _ROWS:
                rows[module] = array
            elif name.startswith(_VECTORS):
                of_vectors.setdefault(module, {})[name.removeprefix(_VECTORS)] = array
            elif not name.startswith(_CAPTIONS):
                of_images.setdefault(module, {})[name] = array
        return cls(token_ids, rows, of_images, of_vectors)


def weights_id(files: Mapping[str, FileEntry]) -> str | None:
    """Return twelve hex digits that identify the trained weights, or None without them."""
    names = (f"{ADAPTER}{MODEL}", NEW_ROWS, f"{UPDATE}{MODEL}")
    found = {name: files[name].sha256 for name in names if name in files}
    if names[0] not in found:
        return None
    if len(found) == 1:
        return found[names[0]][:12]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]


def image_key(record: Record, identifier: Identifier) -> str:
    """Return sixteen hex digits of a hash of the trained triple: image id, image content and identifier."""
    return hashlib.sha256(json.dumps([record.image_id, record.sha256, identifier]).encode()).hexdigest()[:16]


def write_images(into: Path, records: Iterable[Record], identifiers: Sequence[Identifier]) -> None:
    """Write the list of images that the adapter in a folder was trained on."""
    keys = sorted(image_key(record, identifier) for record, identifier in zip(records, identifiers, strict=True))
    (into / IMAGES).write_text(json.dumps(keys), encoding="utf-8")


def read_images(path: Path) -> frozenset[str]:
    """Return the `image_key` of every image of a training."""
    return frozenset(json.loads(path.read_text(encoding="utf-8")))
