"""CLIP in the same run: every image and query is encoded and ranked by exact cosine over the same pools.

Zero-shot: nothing is trained, so transductive and inductive are one. Depends on a checkpoint that transformers loads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from integration.reproduce.karpathy import Karpathy
from integration.reproduce.runs import DEPTH, POOLS, Pool, Ranked, bar, write_whole
from llama_index_genret.corpus.images import load_image

BATCH = 64
Vectors = NDArray[np.float32]


def clip_rankings(
    checkpoint: str,
    dataset: Karpathy,
    images: Path,
    queries: Sequence[tuple[str, str]],
    *,
    split: str,
    out: Path,
    device: str = "auto",
) -> dict[Pool, Ranked]:
    """Return for each pool the ten images nearest to every query (text, image id). Embeddings are cached in `out`.

    A query longer than the text tower's limit is cut, as is usual for CLIP. The note has the number of cut queries.
    Ties count against: the right image comes after all others of its score.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name}.npy" for name in ("images", "queries")}
    if not (all(file.exists() for file in files.values()) and (out / "cut.json").exists()):
        model = transformers.CLIPModel.from_pretrained(checkpoint).to(device).eval()
        processor = transformers.CLIPProcessor.from_pretrained(checkpoint)
        if not files["images"].exists():
            _save(files["images"], encode_images(model, processor, [images / i.file_name for i in dataset.images]))
        texts = [text for text, _ in queries]
        longest = model.config.text_config.max_position_embeddings
        _save(files["queries"], encode_texts(model, processor, texts, longest))
        lengths = map(len, processor.tokenizer(texts, truncation=False, verbose=False).input_ids)
        write_whole(out / "cut.json", json.dumps({"cut": sum(length > longest for length in lengths)}))
    cut = json.loads((out / "cut.json").read_text())["cut"]
    vectors = {name: np.load(file) for name, file in files.items()}
    ids = [image.image_id for image in dataset.images]
    rows: dict[Pool, list[int]] = {
        "split": [row for row, image in enumerate(dataset.images) if image.split == split],
        "full": list(range(len(ids))),
    }
    right = [name for _, name in queries]
    note = f"{cut} queries cut to what the text tower reads" if cut else ""
    return {
        pool: Ranked(
            nearest(vectors["images"][rows[pool]], [ids[row] for row in rows[pool]], vectors["queries"], right), 0, note
        )
        for pool in POOLS
    }


def encode_images(model: Any, processor: Any, paths: Sequence[Path]) -> Vectors:
    """Return (n, d) image embeddings of length one."""
    rows = []
    with torch.inference_mode():
        for start in bar("CLIP, images")(range(0, len(paths), BATCH)):
            pixels = processor.image_processor(
                images=[load_image(path) for path in paths[start : start + BATCH]], return_tensors="pt"
            )
            rows.append(_unit(model.get_image_features(pixel_values=pixels["pixel_values"].to(model.device))))
    return np.concatenate(rows)


def encode_texts(model: Any, processor: Any, texts: Sequence[str], longest: int) -> Vectors:
    """Return (n, d) text embeddings of length one."""
    rows = []
    with torch.inference_mode():
        for start in bar("CLIP, queries")(range(0, len(texts), BATCH)):
            tokens = processor.tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(model.device)
            found = model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            rows.append(_unit(found))
    return np.concatenate(rows)


def nearest(
    images: Vectors, ids: Sequence[str], queries: Vectors, right: Sequence[str], *, depth: int = DEPTH
) -> tuple[tuple[str, ...], ...]:
    """Return the `depth` ids of highest dot product for each query, a right image after all others of its score.

    Args:
        images: (n, d), of `ids`. queries: (m, d). right: the expected id of each.
    """
    place = {image_id: row for row, image_id in enumerate(ids)}
    ranked = []
    for start in range(0, len(queries), 256):
        for scores, expected in zip(queries[start : start + 256] @ images.T, right[start : start + 256], strict=True):
            row = place[expected]
            others = scores.copy()
            others[row] = -np.inf
            most = min(depth, len(ids) - 1)
            best = np.argpartition(-others, most - 1)[:most]
            best = best[np.argsort(-others[best], kind="stable")]
            ahead = int((others >= scores[row]).sum())
            ranked.append(tuple(ids[i] for i in [*best[:ahead], row, *best[ahead:]][:depth]))
    return tuple(ranked)


def _unit(features: Any) -> Vectors:
    vectors = getattr(features, "pooler_output", features).float()
    return torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()


def _save(path: Path, vectors: Vectors) -> None:
    part = path.with_suffix(".part.npy")
    np.save(part, vectors)
    part.replace(path)
