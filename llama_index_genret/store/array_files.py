"""Read the array files of an index. The content is untrusted: damage is an error that names the file.

Depends on NPY and safetensors; independent of the meaning of the arrays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from llama_index_genret.errors import IndexDamaged


def read_npy(path: Path) -> NDArray[Any]:
    """Return the array of an NPY file. Nothing is unpickled.

    Raises:
        IndexDamaged: the file is not a single NPY array.
    """
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):  # np.load returns an NpzFile for a zip archive
            raise ValueError("it is an archive")
    except Exception as error:  # numpy parses the header as Python, which raises many types
        raise _damage_error(path, error) from error
    return array


def read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a safetensors file by name.

    Raises:
        IndexDamaged: the file is not a safetensors file.
    """
    try:
        arrays: dict[str, NDArray[Any]] = load_file(path)
    except Exception as error:  # SafetensorError, a numpy error for an unknown dtype, or MemoryError
        raise _damage_error(path, error) from error
    return arrays


def _damage_error(path: Path, error: Exception) -> IndexDamaged:
    return IndexDamaged(f"{path} holds no readable arrays: {error!r:.300}. Restore it, or create the index again.")
