"""Print the result of a command to stdout, as a table or one JSON object. Logs and progress bars go to stderr."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from llama_index_genret.errors import NotWritten
from llama_index_genret.store import Index
from llama_index_genret.store.model_state import unseen_rows
from llama_index_genret.store.vectors import VectorSources

SOURCES = {
    "captions": "from captions",
    "images": "from images by the encoder",
    "projected": "projected from image features",
    "missing": "missing",
}
"""How a table names the fields of `VectorSources`."""

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def console(*, stderr: bool = False) -> Console:
    """Return a console without markup: text in brackets or between colons may be a caption or a file name."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


log = console(stderr=True)


def visible(text: str) -> str:
    """Escape characters that control a terminal or change the direction of its text."""
    return _CONTROL_CHARACTERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escape_unencodable() -> None:
    """Make stdout escape characters that it cannot encode. A folder name may hold bytes that are not text."""
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")


def bar(label: str) -> Any:
    """Return a wrapper of iterables that draws a progress bar on stderr, if stderr is a terminal."""
    return partial(tqdm, desc=label, leave=False, disable=None)


@contextmanager
def counting_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar on stderr, if stderr is a terminal. Yield a function that sets the number done."""
    with tqdm(total=total, desc=label, disable=None) as bar:
        yield lambda done: bar.update(done - bar.n)


def emit(as_json: bool, value: dict[str, Any], table: Table) -> None:
    """Print a result, as one line of JSON or as a table.

    Raises:
        NotWritten: stdout cannot be written, for example because the disk is full.
    """
    try:
        if as_json:
            is_utf_8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
            print(json.dumps(value, ensure_ascii=not is_utf_8), flush=True)
        else:
            console().print(table)
    except BrokenPipeError:  # the reader has closed the pipe
        raise
    except OSError as error:
        sys.stdout = None  # Python would flush the buffer at exit and fail again
        raise NotWritten(f"the result could not be printed: {error}. The command itself is complete.") from error


class _VisibleTable(Table):
    def add_row(self, *cells: Any, **others: Any) -> None:
        super().add_row(*(visible(cell) if isinstance(cell, str) else cell for cell in cells), **others)


def new_table(*columns: str, title: str | None = None) -> Table:
    """Return a table that folds cells that are too wide."""
    table = _VisibleTable(title=None if title is None else visible(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def n_pseudo_queries(loaded: Index) -> int:
    """Return the number of pseudo-queries of all images."""
    return sum(len(loaded.pseudo_queries_of(record)) for record in loaded.records)


def facts_of(loaded: Index) -> dict[str, Any]:
    """Return the facts that `genret inspect` prints about an index."""
    trie, unseen = loaded.trie.base, unseen_rows(loaded)
    return {
        "index": str(loaded.folder),
        "images": len(loaded.records),
        "scheme": loaded.manifest.scheme,
        "scheme_options": loaded.manifest.scheme_options,
        "alphabet": loaded.manifest.alphabet,
        "identifier_length": trie.depth,
        "nodes_per_level": list(trie.level_sizes),
        "mean_fan_out_per_level": [
            round(below / above, 2) for above, below in zip((1, *trie.level_sizes), trie.level_sizes, strict=False)
        ],
        "model": loaded.manifest.model.name_or_path,
        "trained": loaded.is_trained,
        "training": loaded.manifest.training,
        "update": loaded.manifest.update,
        "untrained_images": len(loaded.records) if not loaded.is_trained else None if unseen is None else len(unseen),
        "encoder": _encoder_facts(loaded),
        "captions": sum(len(record.captions) for record in loaded.records),
        "pseudo_queries": n_pseudo_queries(loaded),
        "tuned": loaded.manifest.tuned and loaded.manifest.tuned.model_dump(),
        "missing_images": [r.file_name for r in loaded.records if not r.path.is_file()],
    }


def _encoder_facts(loaded: Index) -> dict[str, Any] | None:
    """Return the name and dimension of the encoder, the bytes it takes per image, and the sources of the vectors."""
    entry, vectors = loaded.manifest.encoder, loaded.vectors
    if entry is None or vectors is None:
        return None
    sources = asdict(VectorSources.of(entry, loaded.records, vectors))
    size = vectors.itemsize * entry.dimension
    return {"name": entry.name, "dimension": entry.dimension, "bytes_per_image": size, "vectors": sources}


def facts_table(loaded: Index) -> Table:
    """Return `facts_of` as a table."""
    table = new_table("", "")
    for key, value in facts_of(loaded).items():
        if key == "encoder" and value:
            table.add_row("encoder", f"{value['name']}, {value['dimension']} dimensions")
            table.add_row("bytes per image", f"{value['bytes_per_image']} for its vector")
            shares = (f"{count} {SOURCES[source]}" for source, count in value["vectors"].items() if count)
            table.add_row("vectors", ", ".join(shares))
        else:
            table.add_row(key.replace("_", " "), str(value))
    return table
