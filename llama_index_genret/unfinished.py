"""The file that a long run writes as it goes, so that a run that was killed goes on: who holds it, and what it answers.

Knows files; nothing of what they hold.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel

from llama_index_genret.errors import BatchError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def locked(path: Path, *, way_out: str) -> Iterator[BinaryIO]:
    """The file, opened to read and append, while nobody else holds it.

    Args:
        way_out: what else a user may do, "name another --out".
    Raises:
        BatchError: it cannot be written, the disk has become full, or another run holds it.
    """
    try:
        file = path.open("a+b")
    except OSError as error:
        raise BatchError(f"{path} cannot be written: {error}. Make its folder, or {way_out}.") from error
    try:
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BatchError(f"another run is writing {path}: wait for it, or {way_out}.") from error
            yield file
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise BatchError(
            f"{path} could not be written: {error}. Free space there, and run the command again: it goes on."
        ) from error


def size(file: BinaryIO) -> int:
    """Bytes in an open file."""
    return os.fstat(file.fileno()).st_size


def difference(part: Path, earlier: BaseModel | None, asked: BaseModel, *, way_out: str) -> str:
    """In what an unfinished run differs from the one that would go on with it, for an error."""
    if earlier is None:
        return f"{part} is there, but not what it answers: {way_out}"
    before, now = earlier.model_dump(), asked.model_dump()
    differing = ", ".join(f"{key} {before[key]!r} (now {now[key]!r})" for key in now if before[key] != now[key])
    return f"{part} is an unfinished run with {differing}. Repeat the command that began it to go on with it, {way_out}"
