"""Measure reading a folder of a million rows: `metadata.jsonl`, every image decoded and hashed, no model.

All rows share one small image, so that the figures measure the reader, not a disk or a decoder.

    python -m integration.bench.corpus_bench --sizes 1e6
"""

from __future__ import annotations

import json
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from integration.bench.timing import Report, measured, options
from llama_index_genret.corpus import read_corpus


def main(argv: Sequence[str] | None = None) -> Report:
    """Measure every size, the smallest first, because the memory figure is the peak so far."""
    args = options(__doc__ or "", sizes=(10_000, 100_000), argv=argv)
    report = Report("corpus_bench", args.seed)
    for n in args.sizes:
        report.section(f"{n:,} rows")
        with tempfile.TemporaryDirectory() as folder:
            measure(report, n, Path(folder))
    report.write(args.json)
    return report


def measure(report: Report, n: int, folder: Path) -> None:
    """Measure one size."""
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for row in range(n):
            fields = {"file_name": "a.png", "image_id": f"image-{row}", "text": f"picture {row}", "year": row % 100}
            file.write(f"{json.dumps(fields)}\n")
    before = _peak_mib()
    seconds, corpus = measured(lambda: read_corpus(folder))
    assert len(corpus) == n
    assert corpus.records[-1].captions == (f"picture {n - 1}",)
    report.value(f"reading, N={n}", seconds, "s of CPU")
    report.value(f"reading a row, N={n}", seconds / n * 1e6, "us of CPU per row")
    report.value(f"memory, N={n}", _peak_mib() - before, "MiB more at the peak")


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
