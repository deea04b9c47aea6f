"""What a command shows: its result on stdout, as a table or one JSON object; logs and bars on stderr."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from llama_index_genret.errors import NotWritten
from llama_index_genret.store import Index
from llama_index_genret.store.model_state import unseen_rows

_STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def console(*, stderr: bool = False) -> Console:
    """Shows what it is given as it is: what stands in brackets or between colons may be a caption or a file name."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


log = console(stderr=True)


def visible(text: str) -> str:
    """With escapes in place of what would steer a terminal, or turn the direction of its text."""
    return _STEERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def take_any_character() -> None:
    """Let stdout say what it has no character for as an escape; a folder may be named by bytes that are no text."""
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")


def bar(label: str) -> Any:
    """Return a wrapper of iterables that draws a progress bar on stderr, where that is a terminal."""
    return partial(tqdm, desc=label, leave=False, disable=None)


@contextmanager
def counting_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar on stderr, where that is a terminal, and yield what sets the number that is done."""
    with tqdm(total=total, desc=label, disable=None) as bar:
        yield lambda done: bar.update(done - bar.n)


def emit(as_json: bool, value: dict[str, Any], table: Table) -> None:
    """Print a result: one JSON object on a line, or a table for people.

    Raises:
        NotWritten: stdout is a file on a full disk.
    """
    try:
        if as_json:
            is_utf_8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
            print(json.dumps(value, ensure_ascii=not is_utf_8), flush=True)
        else:
            console().print(table)
    except BrokenPipeError:  # whoever read it has seen enough
        raise
    except OSError as error:
        sys.stdout = None  # what is left in its buffer would be written, and fail, once more
        raise NotWritten(f"the result could not be told: {error}. What the command does is done.") from error


class _VisibleTable(Table):
    def add_row(self, *cells: Any, **others: Any) -> None:
        super().add_row(*(visible(cell) if isinstance(cell, str) else cell for cell in cells), **others)


def new_table(*columns: str, title: str | None = None) -> Table:
    """A table that folds what is too wide."""
    table = _VisibleTable(title=None if title is None else visible(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def n_pseudo_queries(loaded: Index) -> int:
    """Of all images together."""
    return sum(len(loaded.pseudo_queries_of(record)) for record in loaded.records)


def facts_of(loaded: Index) -> dict[str, Any]:
    """What `genret inspect` says of an index."""
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
        "untrained_images": None if unseen is None else len(unseen),
        "captions": sum(len(record.captions) for record in loaded.records),
        "pseudo_queries": n_pseudo_queries(loaded),
        "tuned": loaded.manifest.tuned and loaded.manifest.tuned.model_dump(),
        "missing_images": [r.file_name for r in loaded.records if not r.path.is_file()],
    }


def facts_table(loaded: Index) -> Table:
    """The same for people."""
    table = new_table("", "")
    for key, value in facts_of(loaded).items():
        table.add_row(key.replace("_", " "), str(value))
    return table
