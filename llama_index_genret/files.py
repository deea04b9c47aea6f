"""Write durable files and atomic folders, lock files, and open the partial file of a resumable run.

The order of a durable write: sync the content, sync its folder, rename, sync the folder again.

Depends on the file system; independent of the content of the files.
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
    """Convert errors of a full, broken or read-only disk into NotWritten, which names the folder and the fix.

    The body may raise such errors only for writes to `folder`.

    Raises:
        NotWritten: the body raised OSError, or the error that a Rust library raises in its place.
    """
    try:
        yield
    except Exception as error:
        if not _comes_of_files(error):
            raise
        raise NotWritten(
            f"{folder} could not be written: {error}. Its content is unchanged. Free space there, or make it "
            "writable, and run the command again."
        ) from error


def _comes_of_files(error: Exception) -> bool:
    """Tell whether an error is a file error. Tokenizers raises a bare Exception, recognised by its message."""
    bare = type(error) is Exception and "(os error " in str(error)
    return bare or isinstance(error, (OSError, SafetensorError))


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    """Open a file or a folder for reading, and close it on exit."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until a file's content, or the entries of a folder, are on the disk."""
    with _descriptor(path) as descriptor:
        os.fsync(descriptor)


def sync_tree(folder: Path) -> None:
    """Call `sync` for all files in a folder, and then for all folders, `folder` included.

    Files get the read and write permissions of the folder. Safetensors makes files readable by their owner only.
    """
    found, mode = sorted(folder.rglob("*")), folder.stat().st_mode & 0o666
    for path in (path for path in found if path.is_file()):
        path.chmod(mode)
        sync(path)
    for path in (path for path in found if path.is_dir()):
        sync(path)
    sync(folder)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents. Their directory entries are on the disk afterwards."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically, in place of an older one."""
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
    """Yield a temporary folder that is renamed to `out` on exit. On an error it is removed.

    The temporary folder is beside `out`, so that the rename stays on one file system. Remains of killed runs are
    removed.

    Args:
        out: a path that does not exist, or an empty folder. A symbolic link is followed.
    Raises:
        NotWritten: the disk is full or read-only.
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
            with suppress(OSError):  # some file systems cannot lock folders
                lock_descriptor(held)
            yield temporary
            sync_tree(temporary)
            temporary.rename(out)
            sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unheld(folder: Path) -> None:
    """Remove a folder of `new_folder` that a killed process has left. A folder that is being written is kept."""
    with suppress(OSError), _descriptor(folder) as held:  # OSError: another process has removed it
        if lock_descriptor(held, blocking=False):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def only_writer(lock: Path, *, busy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock file and remove it on exit. The lock of a killed process is free.

    Args:
        busy: message of IndexBusy.
        wait_s: seconds to wait for another holder.
    Raises:
        IndexBusy: another process or thread holds the lock.
        OSError: the lock file cannot be created.
    """
    lock.parent.stat()  # FileLock would create a missing folder
    try:
        held = FileLock(lock, timeout=wait_s, fallback_to_soft=False).acquire()
    except Timeout as error:
        raise IndexBusy(busy) from error
    with held:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # before the release, so that no other holder's new lock is removed


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def locked(path: Path, *, way_out: str) -> Iterator[BinaryIO]:
    """Open a file for reading and appending, and hold an exclusive lock on it.

    Args:
        way_out: the alternative that an error offers to the user, such as "choose another --out".
    Raises:
        BatchError: the file cannot be written, the disk is full, or another run holds the lock.
    """
    try:
        file = path.open("a+b")
    except OSError as error:
        raise BatchError(f"{path} cannot be written: {error}. Create its folder, or {way_out}.") from error
    try:
        with file:
            if not lock_descriptor(file.fileno(), blocking=False):
                raise BatchError(f"another run is writing {path}: wait for it, or {way_out}.")
            yield file
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise BatchError(
            f"{path} could not be written: {error}. Free space there, and run the command again: it resumes."
        ) from error


def size(file: BinaryIO) -> int:
    """Return the size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def difference(part: Path, earlier: BaseModel | None, current: BaseModel, *, way_out: str) -> str:
    """Return an error message with the options in which an unfinished run differs from the current run."""
    if earlier is None:
        return f"{part} exists, but its header is missing or damaged: {way_out}"
    before, now = earlier.model_dump(), current.model_dump()
    differing = ", ".join(f"{key} {before[key]!r} (now {now[key]!r})" for key in now if before[key] != now[key])
    return f"{part} is an unfinished run with {differing}. Repeat the original command to resume it, {way_out}"
