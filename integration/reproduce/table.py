"""One table: our measurements beside the published ones, each row with its certainty.

Depends on ranked ids and figures; independent of models. Every query counts. A failed one is a miss, and so is an
image with the same codes as the right image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from integration.reproduce.published import Published, published
from integration.reproduce.runs import DEPTH, Ranked
from llama_index_genret.evaluation.metrics import bootstrap_interval

REAL_POOLS = {"flickr30k": (1_000, 31_014), "coco": (5_000, 123_287)}
"""Number of images of the test split and of the whole dataset in published work."""

METRICS = ("recall@1", "recall@5", "recall@10", f"mrr@{DEPTH}")


@dataclass(frozen=True)
class Figure:
    """A mean over queries, and its 95 % interval over draws of images."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One row of ours. setting: transductive, inductive, or zero-shot. pool: "full", or the split that was searched."""

    system: str
    setting: str
    pool: str
    pool_size: int
    queries: int
    failed: int
    figures: dict[str, Figure]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return nested plain values."""
        return asdict(self)


def measured(
    system: str, setting: str, pool: str, pool_size: int, ranked: Ranked, right: Sequence[str], note: str = ""
) -> Measured:
    """Return the figures of one ranking. right: the image id of each query."""
    places = [ids.index(name) if name in ids else None for ids, name in zip(ranked.ids, right, strict=True)]
    scores = {f"recall@{k}": [float(place is not None and place < k) for place in places] for k in (1, 5, 10)} | {
        f"mrr@{DEPTH}": [0.0 if place is None else 1 / (1 + place) for place in places]
    }
    figures = {
        name: Figure(sum(values) / len(values), *bootstrap_interval(values, right)) for name, values in scores.items()
    }
    notes = "; ".join(filter(None, (note, ranked.note)))
    return Measured(system, setting, pool, pool_size, len(right), ranked.failed, figures, notes)


def markdown(dataset: str, rows: Sequence[Measured], notes: Sequence[str] = ()) -> str:
    """Return our rows and the published ones as one table, with notes for its reader."""
    header = ("system", "setting", "pool", "R@1", "R@5", "R@10", f"MRR@{DEPTH}", "queries (failed)", "how sure", "note")
    lines = [_line(header), _line(["---"] * len(header))]
    lines += [_line(_ours(row)) for row in rows]
    lines += [_line(_theirs(row)) for row in published(dataset)]
    real = dict(zip(("test", "full"), REAL_POOLS[dataset], strict=True))
    sizes = {row.pool: row.pool_size for row in rows}
    foot = [
        f"{dataset}, text -> image, in percent, with 95 % intervals over draws of images. "
        "Image -> text is not measured.",
        *([f"NOT COMPARABLE: the pools have {sizes} images, those of published work {real}."] if sizes != real else []),
        *notes,
    ]
    return "\n".join([*foot, "", *lines]) + "\n"


def _ours(row: Measured) -> list[str]:
    figures = [
        f"{100 * f.value:.1f} [{100 * f.low:.1f}, {100 * f.high:.1f}]" for f in (row.figures[name] for name in METRICS)
    ]
    pool = f"{row.pool}, {row.pool_size:,} images"
    return [row.system, row.setting, pool, *figures, f"{row.queries:,} ({row.failed:,})", "measured here", row.note]


def _theirs(row: Published) -> list[str]:
    figures = ["-" if value is None else f"{value:g}" for value in row.recall]
    pool = f"test, {REAL_POOLS[row.dataset][0]:,} images"
    return [row.system, row.setting, pool, *figures, "-", "-", row.certainty.value, row.source]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
