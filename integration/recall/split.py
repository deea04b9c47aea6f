"""The split of queries into validation, on which choices are made, and test.

Depends on image ids and JSON lines; independent of images and retrievers.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SEED, VALIDATION_OF = 0, 8


def is_validation(image_id: str, *, seed: int = SEED) -> bool:
    """Return True for about an eighth of all image ids, the same in every query set: a function of the id alone."""
    digest = hashlib.sha256(f"{seed}:{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % VALIDATION_OF == 0


def write_queries(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write NAME.jsonl, and its parts NAME-validation.jsonl and NAME-test.jsonl by the `image_id` of each row."""
    rows = list(rows)
    validation = [row for row in rows if is_validation(row["image_id"])]
    test = [row for row in rows if not is_validation(row["image_id"])]
    for suffix, part in (("", rows), ("-validation", validation), ("-test", test)):
        write_lines(folder / f"{name}{suffix}.jsonl", part)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
