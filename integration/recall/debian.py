"""Packages of Debian that hold data, unpacked without being installed."""

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path

from llama_index_genret.errors import CorpusError


def unpacked(packages: Mapping[str, str], version: str, downloads: Path) -> Path:
    """Download and unpack the packages into the folder `downloads`, and return it.

    Args:
        packages: their names, each with the sha256 of its file.
    Raises:
        CorpusError: the registry serves another file than this was written for.
        subprocess.CalledProcessError: apt cannot find or fetch it (it may need `apt-get update`).
    """
    for package, expected in packages.items():
        subprocess.run(["apt-get", "download", "-q", f"{package}={version}"], cwd=downloads, check=True, stdout=2)
        (path,) = downloads.glob(f"{package}_*.deb")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if sha256 != expected:
            raise CorpusError(f"{package} {version} has sha256 {sha256}, expected {expected}.")
        subprocess.run(["dpkg-deb", "-x", str(path), str(downloads)], check=True)
    return downloads
