"""JSON Lines as people write them: metadata, queries, what an index keeps of its images.

A line ends at a line feed and nowhere else: U+2028 and its like may stand in a JSON text.

Knows the format; nothing of what the objects mean.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_index_genret.errors import MetadataError


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file as they are needed, their ends included; a byte order mark is left out.

    Raises:
        MetadataError: the file cannot be read, or a line is not UTF-8; names file and line.
    """
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                try:
                    yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise MetadataError(f"{path}, line {line}: not UTF-8 ({error}). Save the file as UTF-8.") from error
    except (OSError, ValueError) as error:
        raise MetadataError(f"{path} cannot be read: {error}. Make it a readable file.") from error


def parse_object(text: str, where: str, *, example: str = '{"file_name": ...}') -> dict[str, Any]:
    """The JSON object in a line; of one that could not be written again (NaN, 1e999, half a surrogate pair) none.

    Raises:
        MetadataError: it is no such object, or gives a key twice. Begins with `where`, "FILE, line N: ".
    """
    try:
        fields = json.loads(text, object_pairs_hook=_without_repeated_keys)
        # What cannot be written again would break the stored index much later.
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise MetadataError(f"{where}no valid JSON: {error}. Write one JSON object a line.") from error
    if not isinstance(fields, dict):
        raise MetadataError(f"{where}a {type(fields).__name__}, not an object. Write {example}, one a line.")
    return fields


def objects(path: Path, *, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object of every line that is not empty, with "FILE, line N: " before it.

    Raises:
        MetadataError: the file cannot be read, or a line is no JSON object; names file and line.
    """
    for line, text in enumerate(read_lines(path), 1):
        if text.strip():
            where = f"{path}, line {line}: "
            yield where, parse_object(text, where, example=example)


def _without_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"a key is given twice, {twice!r:.200}")
    return fields
