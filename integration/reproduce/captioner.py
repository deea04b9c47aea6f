"""Pseudo-queries by the model under test itself, through `genret write-queries`.

The model sees an index of the held-out images alone, without any of their captions, and some captions of train images
for their style. Depends on the command and on the file of its queries; independent of protocols.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from integration.reproduce.karpathy import Karpathy
from integration.reproduce.runs import bar, write_whole
from llama_index_genret.corpus import Corpus, Record
from llama_index_genret.errors import TrainingError
from llama_index_genret.models.mllm import load_mllm
from llama_index_genret.store import load_index
from llama_index_genret.store.build import build_index

STYLE_SAMPLES = 200
"""Number of captions of train images that the model sees in turns."""

STORED = "pseudo_queries.jsonl"
"""The file of an index with one image a line: `image_id` and `queries`, each with its `text`."""


def write_pseudo_queries(
    out: Path, dataset: Karpathy, records: Sequence[Record], *, per_image: int, images: Path, model: str, device: str
) -> Path:
    """Let `model` write queries for the held-out `records`, and return the file for `read_pseudo_queries`.

    After a kill it resumes, as the command does.
    Raises:
        TrainingError: the command fails, or an image of `records` has captions.
    """
    written = out / "written.jsonl"
    if written.exists():
        return written
    if any(record.captions for record in records):
        raise TrainingError(
            "the writer of pseudo-queries must not see captions, but records have some: give records without."
        )
    folder, style = out / "index", out / "style.txt"
    if not folder.exists():
        mllm = load_mllm(model, device=device)
        build_index(Corpus(images, tuple(records)), folder, mllm, scheme="numeric", progress=bar("Encoding"))
        del mllm
    train = [caption for image in dataset.images if image.is_trained_on for caption in image.captions]
    samples = train[:: max(1, len(train) // STYLE_SAMPLES)][:STYLE_SAMPLES]
    write_whole(style, "".join(f"{' '.join(sample.split())}\n" for sample in samples))
    options = ["--per-image", str(per_image), "--style", str(style), "--device", device, "--json"]
    command = [sys.executable, "-m", "llama_index_genret.cli", "write-queries", str(folder), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise TrainingError(f"`genret write-queries` ended with {done.returncode}: see above, or use --pseudo-queries.")
    stored = load_index(folder).file(STORED).read_text(encoding="utf-8").splitlines()
    rows = [(row["image_id"], [query["text"] for query in row["queries"]]) for row in map(json.loads, stored)]
    write_whole(written, "".join(json.dumps({"image_id": name, "text": texts}) + "\n" for name, texts in rows))
    return written
