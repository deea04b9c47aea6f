"""Read JSON Lines: metadata, queries and pseudo-queries.

Only a line feed ends a line, because a JSON string may contain U+2028 and similar characters.

Depends on the format; independent of the meaning of the objects.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_index_genret.errors import MetadataError


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their line ends, without a byte order mark. Reads lazily.

    Raises:
        MetadataError: the file cannot be read, or a line is not UTF-8. The message gives file and line.
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
    """Parse the JSON object in a line.

    Values that cannot be written as JSON again are refused: NaN, 1e999, half a surrogate pair.

    Args:
        text: the line.
        where: the beginning of error messages, "FILE, line N: ".
        example: an object to show in error messages.
    Raises:
        MetadataError: the line is not such an object, or it has a key twice.
    """
    try:
        fields = json.loads(text, object_pairs_hook=_without_repeated_keys)
        # A value that cannot be written again would break the stored index much later.
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise MetadataError(f"{where}not valid JSON: {error}. Write one JSON object per line.") from error
    if not isinstance(fields, dict):
        raise MetadataError(f"{where}a {type(fields).__name__}, not an object. Write {example}, one per line.")
    return fields


def objects(path: Path, *, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE, line N: ", object) for every line that is not empty.

    Raises:
        MetadataError: the file cannot be read, or a line is not a JSON object. The message gives file and line.
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
