"""Durable files, folders that appear whole or not at all, locks, and the partial file of a resumable run.

A rename happens after the content has reached the disk, and the new name is synced afterwards: first the content, then
the folder that names it, then the rename, then the folder again.

Independent of what the files hold.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout, lock_descriptor
from pydantic import BaseModel
from safetensors import SafetensorError

from llama_index_genret.errors import BatchError, IndexBusy, NotWritten


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Tell what a full, broken or read-only disk says as an error that names the folder and the way out.

    Raises:
        NotWritten: for an OSError inside, or what Rust makes of one, which must come of writing to `folder` only.
    """
    try:
        yield
    except Exception as error:
        if not _comes_of_files(error):
            raise
        raise NotWritten(
            f"{folder} could not be written: {error}. What was there is as it was. Free space there, or make it "
            "writable, and run the command again."
        ) from error


def _comes_of_files(error: Exception) -> bool:
    """Tokenizers raises a bare Exception, in which only the words tell."""
    bare = type(error) is Exception and "(os error " in str(error)
    return bare or isinstance(error, (OSError, SafetensorError))


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    """Open a file or a folder to read, and close it on leaving."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    with _descriptor(path) as descriptor:
        os.fsync(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` all files in a folder, and then the folders, itself included.

    Files become readable to whom the folder is: safetensors makes them readable to their owner only.
    """
    found, mode = sorted(folder.rglob("*")), folder.stat().st_mode & 0o666
    for path in (path for path in found if path.is_file()):
        path.chmod(mode)
        sync(path)
    for path in (path for path in found if path.is_dir()):
        sync(path)
    sync(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing; their names are on the disk afterwards."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, in place of an older one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` on leaving; on an error nothing is left of it.

    It lies beside `out`, so that the rename stays on one file system; what killed runs left there is removed.

    Args:
        out: free, or an empty folder. A symbolic link is followed.
    Raises:
        NotWritten: the disk is full, or read only.
    """
    out = out.resolve()
    with writing(out):
        make_folder(out.parent)
        for path in out.parent.glob(f".{out.name}.*.part"):
            remove_unheld(path)
        temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:12]}.part"
        temporary.mkdir()
    try:
        with writing(out), _descriptor(temporary) as held:
            with suppress(OSError):  # file systems without locks on folders
                lock_descriptor(held)
            yield temporary
            sync_tree(temporary)
            temporary.rename(out)
            sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unheld(folder: Path) -> None:
    """Remove a folder of `new_folder` that a killed process has left; one that is being written stays."""
    with suppress(OSError), _descriptor(folder) as held:  # an OSError: it is gone
        if lock_descriptor(held, blocking=False):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def only_writer(lock: Path, *, busy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file, which is gone afterwards. That of a killed process is free.

    Args:
        busy: the error's text.
        wait_s: how long to wait for another holder.
    Raises:
        IndexBusy: another process, or thread, holds it. OSError: it cannot be made.
    """
    lock.parent.stat()  # FileLock would make a folder that is gone
    try:
        held = FileLock(lock, timeout=wait_s, fallback_to_soft=False).acquire()
    except Timeout as error:
        raise IndexBusy(busy) from error
    with held:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # before it is free, so that nobody's new one is removed


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
            if not lock_descriptor(file.fileno(), blocking=False):
                raise BatchError(f"another run is writing {path}: wait for it, or {way_out}.")
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
