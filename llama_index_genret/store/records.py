"""Read and write `records.jsonl`: one image per line, with its identifier and its folder's position in the manifest.

Depends on files; independent of tries and models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llama_index_genret.corpus import Record
from llama_index_genret.errors import CorpusError, IndexDamaged
from llama_index_genret.identifiers import Identifier

RECORDS = "records.jsonl"


def write_records(
    into: Path, records: Sequence[Record], identifiers: Sequence[Identifier], folders: Sequence[int]
) -> None:
    """Write `records.jsonl` into a folder. folders: position of the image folder of each record."""
    lines = (
        json.dumps({**record.to_json(), "identifier": identifier, "folder": folder}, ensure_ascii=False)
        for record, identifier, folder in zip(records, identifiers, folders, strict=True)
    )
    (into / RECORDS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def read_records(path: Path, folders: Sequence[Path]) -> tuple[tuple[Record, ...], tuple[Identifier, ...]]:
    """Return the records and their identifiers. folders: absolute image folders.

    Raises:
        IndexDamaged: the file cannot be read, or a line has another format than `write_records` writes. The error
            names file and line.
    """
    records: list[Record] = []
    identifiers: list[Identifier] = []
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:  # captions may contain other line separators
            for text in lines:
                row = json.loads(text)
                identifiers.append(_identifier(row.pop("identifier")))
                records.append(Record.from_json(row, _folder(folders, row.pop("folder"))))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, CorpusError) as error:
        raise IndexDamaged(
            f"{path}, line {len(records) + 1}: no record of an image: {error!r:.500}. "
            "Restore it, or create the index again."
        ) from error
    return tuple(records), tuple(identifiers)


def _identifier(symbols: object) -> Identifier:
    if not isinstance(symbols, list) or not symbols or not all(isinstance(symbol, str) for symbol in symbols):
        raise ValueError(f"the identifier must be a list of texts, got {symbols!r:.200}")
    return tuple(symbols)


def _folder(folders: Sequence[Path], place: object) -> Path:
    if type(place) is not int or not 0 <= place < len(folders):
        raise ValueError(f"the image folder must be a position below {len(folders)}, got {place!r}")
    return folders[place]
