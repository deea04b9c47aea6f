"""Definitions of words, as queries that nobody wrote for an image. The model imitates a teacher on them.

Depends on the layout of one Debian package, WordNet 3.0 (its own free licence); independent of models.
"""

import re
import tempfile
from pathlib import Path

import numpy as np

from integration.recall.debian import unpacked

VERSION = "1:3.0-37"
SHA256 = "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"
THINGS = ("05", "06", "08", "13", "15", "17", "18", "19", "20")
"""Files of nouns that can be drawn: animals, artefacts, the body, food, places, objects, people, phenomena, plants."""


def definitions(n: int, *, seed: int = 0) -> tuple[str, ...]:
    """Sample `n` definitions of things, without their examples.

    Raises:
        CorpusError, subprocess.CalledProcessError: see `debian.unpacked`.
    """
    with tempfile.TemporaryDirectory() as downloads:
        folder = unpacked({"wordnet-base": SHA256}, VERSION, Path(downloads)) / "usr/share/wordnet"
        lines = (folder / "data.noun").read_text(encoding="utf-8").splitlines()
    fields = re.compile(rf"\d+ (?:{'|'.join(THINGS)}) .* \| (.+)")
    found = [match[1].split('; "')[0].strip() for match in map(fields.fullmatch, lines) if match]
    known = list(dict.fromkeys(found))
    chosen = np.random.default_rng(seed).choice(len(known), n, replace=False)
    return tuple(known[place] for place in chosen)
