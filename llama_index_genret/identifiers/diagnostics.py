"""Measures how well identifiers use their symbols, level by level. This decides how many beams a search needs.

Depends on identifiers as symbols; independent of images, tokenizers and models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llama_index_genret.identifiers.base import Identifier


@dataclass(frozen=True)
class LevelDiagnosis:
    """Figures of one level: the choice of the symbol at one position of an identifier.

    images: number of images that have a symbol at this position.
    nodes: number of distinct prefixes that end with this level.
    mean_fan_out: mean number of children of the inner nodes of the level above.
    max_fan_out: largest number of children of these nodes.
    random_image_fan_out: mean over images of the number of children from which the symbol is chosen.
    codes_used: number of distinct symbols in use.
    codes_available: number of symbols that the scheme fixes for the level; None if it fixes none.
    entropy_bits: entropy, base 2, of the symbol of a random image, without regard to earlier symbols.
    relative_entropy: entropy divided by the largest value possible for so many images and codes. It is 1 if only one
        symbol is possible.
    """

    images: int
    nodes: int
    mean_fan_out: float
    max_fan_out: int
    random_image_fan_out: float
    codes_used: int
    codes_available: int | None
    entropy_bits: float
    relative_entropy: float


@dataclass(frozen=True)
class Diagnosis:
    """Figures of all levels, one entry per level."""

    levels: tuple[LevelDiagnosis, ...]

    def to_json(self) -> dict[str, Any]:
        """Return nested plain values."""
        return asdict(self)


def diagnose(identifiers: Sequence[Identifier], codes_per_level: Sequence[int] = ()) -> Diagnosis:
    """Compute the figures of unique identifiers.

        for level: nodes = {i[:level + 1] for i in identifiers}; children of a node = the nodes that begin with it

    Args:
        codes_per_level: see `Scheme.codes_per_level`.
    """
    depth = max(map(len, identifiers), default=0)
    available = [*codes_per_level, *([None] * depth)]
    levels = tuple(
        _level([i for i in identifiers if len(i) > level], level, available[level]) for level in range(depth)
    )
    return Diagnosis(levels)


def _level(identifiers: Sequence[Identifier], level: int, available: int | None) -> LevelDiagnosis:
    nodes = {identifier[: level + 1] for identifier in identifiers}
    children = Counter(node[:level] for node in nodes)
    symbols = Counter(identifier[level] for identifier in identifiers)
    entropy = entropy_bits(symbols.values())
    most = np.log2(min(len(identifiers), available or len(symbols)))
    return LevelDiagnosis(
        images=len(identifiers),
        nodes=len(nodes),
        mean_fan_out=len(nodes) / len(children),
        max_fan_out=max(children.values()),
        random_image_fan_out=sum(children[identifier[:level]] for identifier in identifiers) / len(identifiers),
        codes_used=len(symbols),
        codes_available=available,
        entropy_bits=entropy,
        relative_entropy=float(entropy / most) if most else 1.0,
    )


def entropy_bits(counts: Iterable[int]) -> float:
    """Return -sum p log2 p, where p are the counts divided by their sum."""
    share = np.array([count for count in counts if count], np.float64)
    share /= share.sum()
    return float(-(share * np.log2(share)).sum() + 0.0)
