"""Arrays of an index's files, whose content may be anything: damage is an error that names the file.

Knows NPY and safetensors; nothing of what the arrays mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from llama_index_genret.errors import IndexDamaged


def read_npy(path: Path) -> NDArray[Any]:
    """The array of an NPY file; nothing is unpickled.

    Raises:
        IndexDamaged: it is none.
    """
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):  # a zip of several
            raise ValueError("it is an archive")
    except Exception as error:  # the header is parsed as Python, which fails in many ways
        raise _damage_error(path, error) from error
    return array


def read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file by name.

    Raises:
        IndexDamaged: it is none.
    """
    try:
        arrays: dict[str, NDArray[Any]] = load_file(path)
    except Exception as error:  # of the library's own, of numpy for an unknown type, of memory
        raise _damage_error(path, error) from error
    return arrays


def _damage_error(path: Path, error: Exception) -> IndexDamaged:
    return IndexDamaged(f"{path} holds no arrays: {error!r:.300}. Restore it, or make the index anew.")
