"""How well identifiers use their symbols, level by level: what decides how many beams a search needs.

Knows identifiers as symbols; nothing of images, tokenizers or models.
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
    """One level: the choice of the symbol at one place of an identifier.

    images: that have a symbol at this place.
    nodes: distinct beginnings of identifiers up to and with this level.
    mean_fan_out, max_fan_out: children of a node of the level above that goes on.
    random_image_fan_out: the mean over images: among how many children the choice is for an image drawn at random.
    codes_used, codes_available: distinct symbols; None where the scheme fixes no number.
    entropy_bits: of the symbol of an image drawn at random, whatever came before, base 2.
    relative_entropy: of the most that so many images could have over the codes; 1 where nothing could vary.
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
    """All levels, and the images that the scheme's own levels did not tell apart; None where it fixes no levels."""

    levels: tuple[LevelDiagnosis, ...]
    collisions: int | None

    def to_json(self) -> dict[str, Any]:
        """As nested plain values."""
        return asdict(self)


def diagnose(identifiers: Sequence[Identifier], codes_per_level: Sequence[int] = ()) -> Diagnosis:
    """Figures of unique identifiers.

        for level: nodes = {i[:level + 1] for i in identifiers}; children of a node = the nodes that begin with it

    Args:
        codes_per_level: as `Scheme.codes_per_level`; a longer identifier has a suffix because its codes were taken.
    """
    depth = max(map(len, identifiers), default=0)
    available = [*codes_per_level, *([None] * depth)]
    levels = tuple(
        _level([i for i in identifiers if len(i) > level], level, available[level]) for level in range(depth)
    )
    longer = sum(len(identifier) > len(codes_per_level) for identifier in identifiers)
    return Diagnosis(levels, longer if codes_per_level else None)


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
    """-sum p log2 p of the shares p of the counts."""
    share = np.array([count for count in counts if count], np.float64)
    share /= share.sum()
    return float(-(share * np.log2(share)).sum() + 0.0)
